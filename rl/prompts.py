"""The prompts that answers are sampled to, from a dataset or from a file of dialogues."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs import ConfigError
from data.formats import Dialogue, Prompt, detect, read_example
from data.messages import Message
from data.row_files import RowError, files_of, has_lone_surrogates, read_rows
from data.shards import MANIFEST, DatasetError, open_dataset


def read_prompts(source: str | os.PathLike, most: int = 0) -> list[list[Message]]:
    """The messages of each prompt, in the order of the source; `most` 0: all.

    Args:
      source: a dataset of kind "prompt", or a JSONL, JSON or Parquet file (or a folder of them) in a format of
        data/formats.py. Of a dialogue or preference, the prompt is what stands before the last answer.

    Raises:
      ConfigError, DatasetError: no prompts, or one that is none; names file and line.
    """
    if not str(source):
        raise ConfigError("give config.prompts: a dataset of prompts, or a JSONL file of them.")
    found = []
    for where, messages in _prompts(Path(source)):
        if not messages or messages[-1]["role"] == "assistant":
            raise DatasetError(f"{where}: nothing is asked. Wanted messages that end with the user's.")
        if has_lone_surrogates(messages):
            raise DatasetError(f"{where}: the text is not valid Unicode (a lone surrogate).")
        found.append(messages)
        if len(found) == most:
            break
    if not found:
        raise DatasetError(f"{source}: holds no prompt.")
    return found


def shown(messages: Sequence[Mapping[str, Any]]) -> str:
    """A dialogue as text, for a judge: a line for each message."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _prompts(source: Path) -> Iterator[tuple[str, list[Message]]]:
    if (source / MANIFEST).is_file():
        dataset = open_dataset(source)
        if dataset.kind != "prompt":
            raise DatasetError(f"{source} is a dataset of kind {dataset.kind!r}; wanted 'prompt'.")
        for i, record in enumerate(dataset):
            _refuse_tools(record.get("tools"), f"{source}, record {i}")
            yield f"{source}, record {i}", record["messages"]
        return
    for path in files_of((str(source),)):
        for row in read_rows(path):
            where = f"{path}, {row.where}"
            try:
                if isinstance(row.value, RowError):
                    raise row.value
                example = read_example(row.value, detect(row.value))
            except RowError as error:
                raise DatasetError(f"{where}: {error}") from error
            _refuse_tools(example.tools, where)
            if isinstance(example, Dialogue):
                answers = [i for i, m in enumerate(example.messages) if m["role"] == "assistant"]
                yield where, example.messages[: answers[-1]]
            elif isinstance(example, Prompt):
                yield where, example.messages
            elif hasattr(example, "prompt"):
                yield where, list(example.prompt)


def _refuse_tools(tools: object, where: str) -> None:
    if tools:
        raise DatasetError(f"{where}: a prompt with tools. Answers are text here; leave such prompts out.")

"""`python -m data.conversations`: dialogues, preferences, labelled answers and prompts in the formats people have, as
datasets to fine-tune on, to prefer by and to sample from.

    workdir/chat/{train,validation}          dialogues, trained on what the assistant says
    workdir/preferences/{train,validation}   a chosen and a rejected answer to one prompt
    workdir/labelled/{train,validation}      an answer and whether it is desired (KTO)
    workdir/prompts/{train,validation}       what to sample from, with the right answer where it is known

Files are JSON arrays, JSONL (also .gz, .zst) and Parquet; each file's first row says its format (data/formats.py).
"""

from __future__ import annotations

import collections
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import configs
from data.formats import (
    FORMATS,
    Dialogue,
    Example,
    FormatName,
    Labelled,
    Makes,
    Preference,
    Prompt,
    detect,
    read_example,
)
from data.load import load_tokenizer
from data.row_files import RowError, files_of, read_rows
from data.shards import DatasetError, hash_of, is_current, read_manifest, write_dataset
from data.templates import ChatTemplateError
from data.tokenize import TokenCount, answer_record, chat_record, describe, fingerprint
from data.tokenizer import Tokenizer

DESCRIPTION = __doc__
FOLDERS: dict[Makes, str] = {
    "chat": "chat",
    "preference": "preferences",
    "labelled": "labelled",
    "prompt": "prompts",
}


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """Which files, what they hold, and what happens to rows that are not as they should be."""

    files: tuple[str, ...] = ()  # files, or folders of them
    tokenizer: str = ""  # tokenizer, model or run folder; its chat template writes the dialogues
    format: Literal["auto"] | FormatName = "auto"  # auto: as each file's first row
    on_bad: Literal["error", "skip"] = "error"  # the first bad row ends the run, or is counted and left out
    max_bad: int = 100  # with "skip": more than this end the run all the same
    validation: float = 0.0  # part of the prompts held out, by a hash of each
    licence: str = "unknown"


class Conversations:
    """The examples of files, and the bad rows among them.

    Attributes: `formats` {file: format}; `counts` {file: rows read}; `bad` {reason: count}; `first_bad` {reason: the
    whole message of its first row}.
    """

    def __init__(self, files: list[Path], format: str = "auto", on_bad: str = "error", max_bad: int = 100):
        self.files, self._on_bad, self._max_bad = files, on_bad, max_bad
        self.formats: dict[Path, FormatName] = {}
        for path in files:
            self.formats[path] = _format_of(path) if format == "auto" else format  # type: ignore[assignment]
        self.reset()

    def reset(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.bad: collections.Counter[str] = collections.Counter()
        self.first_bad: dict[str, str] = {}

    def of_kind(self, makes: Makes) -> list[Path]:
        return [path for path, name in self.formats.items() if FORMATS[name].makes == makes]

    def map(self, makes: Makes, use: Callable[[Example, str], Any]) -> Iterator[tuple[Any, float]]:
        """(use(example, where), part of the files read) of each good row; `use` may raise what makes a row bad."""
        paths = self.of_kind(makes)
        for i, path in enumerate(paths):
            for row in read_rows(path):
                where = f"{path}, {row.where}"
                try:
                    if isinstance(row.value, RowError):
                        raise row.value
                    made = use(read_example(row.value, self.formats[path]), where)
                except (RowError, ChatTemplateError) as error:
                    self._count_bad(where, error)
                    continue
                self.counts[str(path)] += 1
                yield made, (i + row.done) / len(paths)

    def _count_bad(self, where: str, error: Exception) -> None:
        reason = error.reason if isinstance(error, RowError) else "the chat template can't render it"
        self.bad[reason] += 1
        text = str(error) if str(error).startswith(where) else f"{where}: {error}"
        self.first_bad.setdefault(reason, text)
        if self._on_bad == "error":
            raise DatasetError(
                f'{text} Mend the row, or set config.on_bad="skip" to leave such rows out.'
            ) from error
        if self.bad.total() > self._max_bad:
            raise DatasetError(
                f"{self.bad.total()} bad rows, more than config.max_bad={self._max_bad}: {self.bad_rows()} Mend the "
                "file, give config.format where the guess is wrong, or raise config.max_bad."
            )

    def bad_rows(self) -> str:
        return " ".join(
            f"{count} x {reason} (first: {self.first_bad[reason]})."
            for reason, count in self.bad.most_common()
        )


def _format_of(path: Path) -> FormatName:
    """The format of the first row that is one."""
    first = None
    for row in read_rows(path):
        if first is None:
            first = row
        if not isinstance(row.value, RowError):
            try:
                return detect(row.value)
            except RowError as error:
                raise DatasetError(f"{path}, {row.where}: {error}") from error
    if first is None:
        raise DatasetError(f"{path} has no rows.")
    raise DatasetError(f"{path}, {first.where}: {first.value}")


def write_conversations(
    config: ConversationConfig, workdir: Path, log: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, Any]]:
    """Makes the datasets that are missing or out of date; returns {folder: manifest}. Raises DatasetError that names
    file, line, what was wrong and what was wanted."""
    files = files_of(config.files)
    if not files:
        raise configs.ConfigError("give config.files: files of dialogues, preferences or prompts.")
    if not 0 <= config.validation < 1:
        raise configs.ConfigError(f"config.validation={config.validation} is no part: wanted 0 to below 1.")
    conversations = Conversations(files, config.format, config.on_bad, config.max_bad)
    kinds: list[Makes] = [makes for makes in FOLDERS if conversations.of_kind(makes)]
    tokenizer = None
    if any(makes != "prompt" for makes in kinds):
        if not config.tokenizer:
            raise configs.ConfigError("give config.tokenizer: a tokenizer, model or run folder.")
        tokenizer = load_tokenizer(config.tokenizer)
        if tokenizer.chat_template is None:
            raise configs.ConfigError(f"{config.tokenizer} has no chat template to write dialogues with.")
    configs.save(config, workdir / "config.json")
    manifests = {}
    for makes in kinds:
        state = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in conversations.of_kind(makes)]
        known = None if tokenizer is None else fingerprint(tokenizer)
        for split in ("train", "validation") if config.validation else ("train",):
            key = hash_of("conversations", makes, split, configs.to_dict(config), state, known)
            folder = workdir / FOLDERS[makes] / split
            if not is_current(folder, key):
                _write(conversations, makes, split, config, tokenizer, folder, key, log)
            manifests[str(folder)] = read_manifest(folder)
    return manifests


def _write(
    conversations: Conversations,
    makes: Makes,
    split: str,
    config: ConversationConfig,
    tokenizer: Tokenizer | None,
    folder: Path,
    key: str,
    log: Callable[[str], None],
) -> None:
    conversations.reset()
    count, began, shown = TokenCount(), time.monotonic(), time.monotonic()

    def use(example: Example, where: str) -> Any:
        held_out = _part_of(example) < config.validation
        return _record(example, tokenizer, where, count) if held_out == (split == "validation") else None

    def records() -> Iterator[Any]:
        nonlocal shown
        for n, (record, done) in enumerate(conversations.map(makes, use), start=1):
            if record is not None:
                yield record
            now = time.monotonic()
            if now - shown > 5:
                shown, spent = now, now - began
                left = spent * (1 - done) / max(done, 1e-9)
                log(f"{folder}: {n:,} rows, {n / spent:,.0f} rows/s, {done:.0%}, {left:,.0f} s left")

    def facts() -> dict[str, Any]:
        sources = [
            {"name": str(path), "licence": config.licence, "format": conversations.formats[path],
             "rows": conversations.counts[str(path)]}
            for path in conversations.of_kind(makes)
        ]  # fmt: skip
        about = {} if tokenizer is None else count | describe(tokenizer)
        return about | {"key": key, "sources": sources, "bad_rows": dict(conversations.bad)}

    write_dataset(folder, records(), makes, facts)


def _record(example: Example, tokenizer: Tokenizer | None, where: str, count: TokenCount) -> Any:
    """What `write_dataset` takes for this kind of example."""
    if isinstance(example, Prompt):
        return dataclasses.asdict(example)
    assert tokenizer is not None
    if isinstance(example, Dialogue):
        whole = {"messages": example.messages, "tools": example.tools}
        records = [chat_record(whole, tokenizer, where, example.untrained)]
    elif isinstance(example, Preference):
        answers = (example.chosen, example.rejected)
        records = [answer_record(example.prompt, a, example.tools, tokenizer, where) for a in answers]
    else:
        records = [answer_record(example.prompt, example.answer, example.tools, tokenizer, where)]
    for record in records:
        count.add_record(record)
    if isinstance(example, Labelled):
        return records[0], example.label
    return tuple(records) if isinstance(example, Preference) else records[0]


def _part_of(example: Example) -> float:
    """A hash in [0, 1) of what is asked, so that one question is never in both splits."""
    messages = example.messages if isinstance(example, (Dialogue, Prompt)) else example.prompt
    asked = []
    for message in messages:
        if message["role"] == "assistant":
            break
        asked.append([message["role"], message["content"]])
    return int(hash_of("split", asked)[:8], 16) / 2**32


def main(config: ConversationConfig, workdir: Path) -> int:
    manifests = write_conversations(config, workdir, lambda line: print(line, file=sys.stderr, flush=True))
    for folder, manifest in manifests.items():
        tokens = f", {manifest['tokens']:,} tokens" if "tokens" in manifest else ""
        print(f"{folder}: {manifest['records']:,} records{tokens}")
        for source in manifest["sources"]:
            print(f"  {source['name']}: {source['rows']:,} rows of format {source['format']}")
        for reason, count in manifest["bad_rows"].items():
            print(f"  left out: {count:,} x {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(configs.run(main, ConversationConfig, description=DESCRIPTION))

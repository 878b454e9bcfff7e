"""`python -m data.conversations`: dialogues, preferences, labelled answers and prompts in the formats people have, as
datasets to fine-tune on, to prefer by and to sample from.

    workdir/chat/{train,validation}          dialogues, trained on what the assistant says
    workdir/preferences/{train,validation}   a chosen and a rejected answer to one prompt
    workdir/labelled/{train,validation}      an answer and whether it is desired (KTO)
    workdir/steps/{train,validation}         an answer in steps and their labels (process reward models)
    workdir/prompts/{train,validation}       what to sample from, with the right answer where it is known

Files are JSON arrays, JSONL (also .gz, .zst) and Parquet; each file's first row says its format (data/formats.py).
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import configs
from configs.files import remove_leftovers
from data import storage
from data.formats import (
    FORMATS,
    Dialogue,
    Example,
    FormatName,
    Labelled,
    Makes,
    Prompt,
    Steps,
    detect,
    read_example,
)
from data.load import load_tokenizer
from data.row_files import RowError, files_of, read_rows
from data.shards import DatasetError, hash_of, is_current, read_manifest, write_dataset
from data.steps import steps_record
from data.templates import ChatTemplateError
from data.tokenize import TokenCount, answer_record, chat_record, describe, fingerprint
from data.tokenizer import Tokenizer

DESCRIPTION = __doc__ or ""
FOLDERS: dict[Makes, str] = {
    "chat": "chat",
    "preference": "preferences",
    "labelled": "labelled",
    "steps": "steps",
    "prompt": "prompts",
}


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """Which files, what they hold, and what happens to rows that are not as they should be."""

    files: tuple[str, ...] = ()  # files, or folders of them
    tokenizer: str = ""  # tokenizer, model or run folder; its chat template writes the dialogues
    format: Literal["auto"] | FormatName = "auto"  # auto: as each file's first row
    on_bad: Literal["error", "skip"] = "skip"  # the first bad row ends the run, or is counted and left out
    max_bad: int = 100  # with "skip": more than this, and than one row in a hundred, end the run all the same
    workers: int = 0  # processes; 0: one a core where the files are large; changes nothing in what is written
    validation: float = 0.0  # part of the prompts held out, by a hash of each
    licence: str = "unknown"


class Conversations:
    """The examples of files, and the bad rows among them.

    Attributes: `formats` {file: format}; `counts` {file: rows read}; `bad` {reason: count}; `first_bad` {reason: the
    whole message of its first row}.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike],
        format: str = "auto",
        on_bad: str = "skip",
        max_bad: int = 100,
    ):
        files = [os.fspath(path) for path in files]
        self.files, self._on_bad, self._max_bad = files, on_bad, max_bad
        self.formats: dict[str, FormatName] = {}
        for path in files:
            self.formats[path] = _format_of(path) if format == "auto" else format  # type: ignore[assignment]
        self.reset()

    def reset(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.bad: collections.Counter[str] = collections.Counter()
        self.first_bad: dict[str, str] = {}

    def of_kind(self, makes: Makes) -> list[str]:
        return [path for path, name in self.formats.items() if FORMATS[name].makes == makes]

    def map(
        self, makes: Makes, use: Callable[[Example, str], Any], workers: int = 1
    ) -> Iterator[tuple[Any, float]]:
        """(use(example, where), part of the files read) of each good row, in the order of the rows.

        `use` may raise what makes a row bad; with more than one worker it is called in other processes.
        """
        for made in ordered_map(functools.partial(_use, use), _chunks(self._tasks(makes)), workers):
            for task, value, bad in made:
                if bad is not None:
                    self._count_bad(task.where, *bad)
                    continue
                self.counts[task.path] += 1
                yield value, task.done

    def _tasks(self, makes: Makes) -> Iterator[_Task]:
        paths = self.of_kind(makes)
        for i, path in enumerate(paths):
            for row in read_rows(path):
                done = (i + row.done) / len(paths)
                yield _Task(path, f"{path}, {row.where}", self.formats[path], row.value, done)

    def _count_bad(self, where: str, reason: str, message: str) -> None:
        self.bad[reason] += 1
        text = message if message.startswith(where) else f"{where}: {message}"
        text = text if text.endswith((".", "!", "?")) else text + "."
        self.first_bad.setdefault(reason, text)
        if self._on_bad == "error":
            raise DatasetError(f'{text} Mend the row, or set config.on_bad="skip" to leave such rows out.')
        read = self.counts.total() + self.bad.total()
        if self.bad.total() > max(self._max_bad, read // 100):
            raise DatasetError(
                f"{self.bad.total()} bad rows of {read}, more than config.max_bad={self._max_bad}: {self.bad_rows()} "
                "Mend the file, give config.format where the guess is wrong, or raise config.max_bad."
            )

    def bad_rows(self) -> str:
        return " ".join(
            f"{count} x {reason} (first: {self.first_bad[reason]})."
            for reason, count in self.bad.most_common()
        )


class _Task(NamedTuple):
    """A row on its way to an example."""

    path: str
    where: str
    format: FormatName
    row: Any
    done: float


def _use(use: Callable[[Example, str], Any], tasks: list[_Task]) -> list[tuple[_Task, Any, Any]]:
    """(task without its row, what was made of it, (reason, message) where it is bad)."""
    made = []
    for task in tasks:
        value = bad = None
        try:
            if isinstance(task.row, RowError):
                raise task.row
            value = use(read_example(task.row, task.format), task.where)
        except RowError as error:
            bad = error.reason, str(error)
        except ChatTemplateError as error:
            bad = "the chat template can't render it", str(error)
        made.append((task._replace(row=None), value, bad))
    return made


def ordered_map(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`map` in `workers` processes, in order, with a few items on their way at a time."""
    if workers == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")  # threads of this process may hold locks
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker)
    try:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already


def _chunks(tasks: Iterator[_Task], size: int = 64) -> Iterator[list[_Task]]:
    while chunk := list(itertools.islice(tasks, size)):
        yield chunk


def _format_of(path: str) -> FormatName:
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
    remove_leftovers(workdir)
    configs.save(config, workdir / "config.json")
    manifests = {}
    for makes in kinds:
        state = [(path, *storage.state(path)) for path in conversations.of_kind(makes)]
        known = None if tokenizer is None else fingerprint(tokenizer)
        for split in ("train", "validation") if config.validation else ("train",):
            settings = configs.to_dict(config) | {"workers": None}
            key = hash_of("conversations", makes, split, settings, state, known)
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
    use = functools.partial(_records, config.tokenizer, config.validation, split)
    workers = config.workers or _workers_for(conversations.of_kind(makes))

    def records() -> Iterator[Any]:
        nonlocal shown
        for n, (made, done) in enumerate(conversations.map(makes, use, workers), start=1):
            if isinstance(made, dict):
                yield made
            elif made is not None:
                tokens, label = made
                for record in tokens:
                    count.add_record(record)
                if makes in ("labelled", "steps"):
                    yield tokens[0], label
                else:
                    yield tokens[0] if makes == "chat" else tokens
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
        about = {} if tokenizer is None or makes == "prompt" else count | describe(tokenizer)
        return about | {"key": key, "sources": sources, "bad_rows": dict(conversations.bad)}

    write_dataset(folder, records(), makes, facts)


def _workers_for(paths: Sequence[str]) -> int:
    """One a core, where there is work enough to be worth starting processes for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if sum(storage.state(path)[0] for path in paths) > _WORTH_PROCESSES else 1


_WORTH_PROCESSES = 16 << 20  # bytes; some ten seconds of work
_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


def _records(tokenizer_path: str, validation: float, split: str, example: Example, where: str) -> Any:
    """(token records, label or labels) of an example, the record of a prompt, or None: it is of the other split."""
    if (_part_of(example) < validation) != (split == "validation"):
        return None
    if isinstance(example, Prompt):
        return dataclasses.asdict(example)
    tokenizer = _tokenizer(tokenizer_path)
    if isinstance(example, Dialogue):
        whole = {"messages": example.messages, "tools": example.tools}
        return (chat_record(whole, tokenizer, where, example.untrained),), None
    if isinstance(example, Steps):
        return (steps_record(example.prompt, example.steps, tokenizer, where, example.tools),), example.labels
    answers = [example.answer] if isinstance(example, Labelled) else [example.chosen, example.rejected]
    records = [answer_record(example.prompt, a, example.tools, tokenizer, where) for a in answers]
    return tuple(records), example.label if isinstance(example, Labelled) else None


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
        if folder.endswith("validation"):
            continue  # of the same rows
        for source in manifest["sources"]:
            print(f"  {source['name']}: {source['rows']:,} rows of format {source['format']}")
        for reason, count in manifest["bad_rows"].items():
            print(f"  left out: {count:,} x {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(configs.run(main, ConversationConfig, description=DESCRIPTION))

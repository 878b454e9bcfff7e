"""What of a benchmark may not stand in a training text: hashes of all runs of n words of its items, and of the whole of
items that are shorter. An item of fewer than `min_words` words ("Name the largest moon of Saturn.") stands in innocent
texts too, so it counts only as a line of its own, with `_PREFIX` more words at most ("Question 3: ..."); one of fewer
than `LINE_WORDS` is not looked for.

Words are letters and digits in small letters; punctuation and white space make no difference. The arrays are built
once, kept as files by the hash of what they are of, and mapped into every process that looks things up.
"""

# W words of a text

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.files import replacing
from configs.typed import ConfigError
from data import storage
from data.dedup.lines import hash64
from data.dedup.substring import window_hashes
from data.shards import hash_of
from data.sources.files import BadLine, json_rows
from data.words import UNSPACED

_WORD = re.compile(rf"[^\W_{UNSPACED}]+|[{UNSPACED}]")
_VERSION = 2  # raised when the same files give other hashes
_ITEMS = "items.json"
LINE_WORDS = 3  # of an item that is looked for as a line, or more
_PREFIX = 2


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A file of items: JSONL, JSON, CSV, Parquet, or text with an item a line. `fields` are those that hold an item's
    text, with dots into nested ones ("choices.text"); none: all text that an item holds."""

    path: str
    fields: tuple[str, ...] = ()
    name: str = ""  # default: the file's name


class Item(NamedTuple):
    """One text of an item of a benchmark."""

    benchmark: str
    number: int  # of the item in its file, from 0
    text: str


class Words:
    """The words of a text: `hashes`, uint64 [W], and where each stands in it, which few texts are asked for."""

    def __init__(self, text: str):
        words = _WORD.findall(text)
        self.hashes = np.fromiter(map(_hash, words), np.uint64, len(words))
        self._text = text

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Start and stop of each word in characters, int64 [W, 2]."""
        return np.array([match.span() for match in _WORD.finditer(self._text)], np.int64).reshape(-1, 2)

    def is_line(self, first: int, count: int) -> bool:
        """Whether these words are a line, but for a few before or after them."""
        start, stop = self.span(first, count)
        begin = self._text.rfind("\n", 0, start) + 1
        end = self._text.find("\n", stop)
        around = self._text[begin:start], self._text[stop : len(self._text) if end < 0 else end]
        return sum(len(_WORD.findall(part[:200])) for part in around) <= _PREFIX

    def span(self, first: int, count: int) -> tuple[int, int]:
        """(start, stop) of `count` words."""
        return int(self.places[first, 0]), int(self.places[first + count - 1, 1])


class Index:
    """Runs of words of all items, by length; `runs[length]` is (hashes, ascending; the item of each).

    `counts`, by benchmark: items, texts of them that are too short to be looked for, and broken lines of the file.
    """

    def __init__(self, folder: Path):
        facts = json.loads((folder / _ITEMS).read_text())
        self.counts: dict[str, dict[str, int]] = facts["counts"]
        self.min_words: int = facts["min_words"]
        self.items = [Item(*row) for row in facts["items"]]
        self.runs = {
            int(length): tuple(
                np.load(folder / f"{part}{length}.npy", mmap_mode="r") for part in ("run", "item")
            )
            for length in facts["lengths"]
        }

    def hits(self, words: Words) -> list[tuple[int, int, np.ndarray]]:
        """(first word, number of words, items) of every run of the text that is one of an item, in their order."""
        found = []
        for length, (hashes, items) in self.runs.items():
            if len(words.hashes) < length:
                continue
            runs = window_hashes(words.hashes, length)
            left = np.searchsorted(hashes, runs)
            inside = left < len(hashes)
            inside[inside] = hashes[left[inside]] == runs[inside]
            for at in np.flatnonzero(inside).tolist():
                if length < self.min_words and not words.is_line(at, length):
                    continue
                right = int(np.searchsorted(hashes, runs[at], side="right"))
                found.append((at, length, np.unique(items[int(left[at]) : right])))
        return sorted(found, key=lambda hit: (hit[0], hit[1]))


def read_words(text: str) -> Words:
    """The words of a text as they are compared."""
    return Words(text)


def open_index(benchmarks: Sequence[Benchmark], ngram_words: int, min_words: int) -> Index:
    """The index of these files, built where it is not kept yet. Raises ConfigError where there is nothing to index."""
    states = tuple((benchmark, storage.state(benchmark.path)) for benchmark in benchmarks)
    return _open(states, ngram_words, min_words)


def read_items(benchmark: Benchmark) -> Iterator[Item]:
    """The texts of a benchmark's items. Raises ConfigError for fields that no item has, and for a damaged file."""
    return (item for item in _items(benchmark) if isinstance(item, Item))


def name_of(benchmark: Benchmark) -> str:
    return benchmark.name or os.path.basename(benchmark.path)


def _items(benchmark: Benchmark) -> Iterator[Item | BadLine]:
    name, found = name_of(benchmark), False
    for number, row in _whole_rows(benchmark.path):
        if isinstance(row, BadLine):
            yield row
            continue
        if benchmark.fields:
            texts = [text for field in benchmark.fields for text in _strings(_field(row, field.split(".")))]
        else:
            texts = list(_strings(row))
        for text in texts:
            found = True
            yield Item(name, number, text)
    if not found:
        what = f"a text under {', '.join(benchmark.fields)}" if benchmark.fields else "any text"
        raise ConfigError(f"{benchmark.path}: no item has {what}. Give fields=(NAME, ...) that are there.")


@functools.lru_cache(maxsize=4)
def _open(states: tuple[tuple[Benchmark, tuple[int, int]], ...], ngram_words: int, min_words: int) -> Index:
    files = [(dataclasses.astuple(benchmark), state) for benchmark, state in states]
    key = hash_of(_VERSION, files, ngram_words, min_words)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crucible" / "benchmarks"
    if not (cache / key / _ITEMS).is_file():
        _build([benchmark for benchmark, _ in states], ngram_words, min_words, cache / key)
    return Index(cache / key)


def _build(benchmarks: Sequence[Benchmark], ngram_words: int, min_words: int, folder: Path) -> None:
    items: list[Item] = []
    counts: dict[str, Counter[str]] = {}
    for benchmark in benchmarks:
        count = counts.setdefault(name_of(benchmark), Counter(items=0, short=0, broken=0))
        found = list(_items(benchmark))
        items += [item for item in found if isinstance(item, Item)]
        count["items"] += len({item.number for item in found if isinstance(item, Item)})
        count["broken"] += sum(isinstance(item, BadLine) for item in found)
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for number, item in enumerate(items):
        words = read_words(item.text).hashes
        length = min(ngram_words, len(words))
        if is_looked_for(length, min_words):
            runs = window_hashes(words, length)
            parts.setdefault(length, []).append((runs, np.full(len(runs), number, np.int32)))
        else:
            counts[item.benchmark]["short"] += 1
    if not parts:
        raise ConfigError(f"the benchmarks hold no text of {LINE_WORDS} words or more.")
    with replacing(folder, _ITEMS) as new:
        for length, pairs in sorted(parts.items()):
            runs, owners = (np.concatenate(part) for part in zip(*pairs))
            order = np.argsort(runs, kind="stable")
            np.save(new / f"run{length}.npy", runs[order])
            np.save(new / f"item{length}.npy", owners[order])
        facts = {"items": items, "lengths": sorted(parts), "counts": counts, "min_words": min_words}
        (new / _ITEMS).write_text(json.dumps(facts))


def is_looked_for(words: int, min_words: int) -> bool:
    """Whether an item of so many words is."""
    return words >= min(min_words, LINE_WORDS)


def _whole_rows(path: str) -> Iterator[tuple[int, Any]]:
    try:
        yield from _rows(path)
    except storage.unreadable() as error:
        raise ConfigError(f"{path} can't be read to its end: {error}") from error


def _rows(path: str) -> Iterator[tuple[int, Any]]:
    """(number, item) of a file by its suffix."""
    ending = storage.suffix(path)
    if ending in (".jsonl", ".ndjson"):
        yield from json_rows(path)
    elif ending == ".json":
        with storage.open_bytes(path) as file:
            held = json.load(file)
        lists = [held] if isinstance(held, list) else [v for v in held.values() if isinstance(v, list)]
        yield from enumerate(lists[0] if lists else [held])
    elif ending == ".parquet":
        import pyarrow.parquet as pq

        yield from enumerate(pq.read_table(storage.open_raw(path)).to_pylist())
    elif ending == ".csv":
        with storage.open_bytes(path) as file:
            yield from enumerate(csv.DictReader(io.StringIO(file.read().decode("utf-8", "replace"))))
    else:
        for i, line in enumerate(storage.lines(path)):
            yield i, line.decode("utf-8", "replace").strip()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _field(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_field(inner, names) for inner in value]
    if not names:
        return value
    return _field(value.get(names[0]), names[1:]) if isinstance(value, dict) else None


@functools.lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return hash64(word.lower())

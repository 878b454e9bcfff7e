"""The documents of a text dataset as ids, piece by piece, by several processes; what is done is there after a kill.

OUT is the dataset to write. .OUT.pieces/KEY/ holds the tokenizer and a file for each piece, until the dataset is whole:
    piece-00012.npz     ids of all its documents one after the other, how many each has, and its bytes of text
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.files import temporary_beside
from data.curation.workers import Workers, map_items, stop_idle
from data.load import load_tokenizer
from data.shards import Dataset, open_dataset
from data.tokenizer import Tokenizer
from data.tokenizer.word_cache import WordCache, word_cache

_BYTES = 4 << 20  # of text in a piece, about
_BATCH = 512


class Piece(NamedTuple):
    """Consecutive documents: `ids` int32 of all of them, `lengths` and `sizes` (in bytes of text) of each."""

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray

    def documents(self) -> Iterator[tuple[np.ndarray, int]]:
        at = 0
        for length, size in zip(self.lengths.tolist(), self.sizes.tolist()):
            yield self.ids[at : at + length], size
            at += length


class Task(NamedTuple):
    """Documents first to last of a dataset, and where their piece goes."""

    dataset: Path
    tokenizer: Path
    first: int
    last: int
    target: Path

    @property
    def label(self) -> str:
        return f"documents {self.first} to {self.last} of {self.dataset}"


class Pieces:
    """The pieces of a dataset in order, as they are done. Use it as a context: a whole one takes its files away."""

    def __init__(
        self,
        text: Dataset,
        tokenizer: Tokenizer,
        out: Path,
        key: str,
        processes: int,
        log: Callable[[str], None],
    ):
        self._text, self._tokenizer, self._processes, self._log = text, tokenizer, processes, log
        self._name = "/".join(out.parts[-2:])
        packed = sum(shard["bytes"] for shard in text.manifest["shards"])
        size = text.manifest.get("bytes") or 2 * packed
        count = max(1, round(size / _BYTES))
        step = max(1, -(-len(text) // count))
        self._bounds = [(at, min(at + step, len(text))) for at in range(0, len(text), step)]
        self._megabytes = size / 1e6
        self._parent = out.parent / f".{out.name}.pieces"
        self._folder = self._parent / key

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        stop_idle()
        if kind is None:
            shutil.rmtree(self._parent, ignore_errors=True)

    def __iter__(self) -> Iterator[Piece]:
        if len(self._bounds) <= 1:  # nothing to share or to go on with
            cache = word_cache(self._tokenizer)
            yield from (encode(self._text, self._tokenizer, cache, *bounds) for bounds in self._bounds)
            return
        for other in self._parent.glob("*"):
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)
        where = self._folder / "tokenizer"
        if not where.exists():
            made = temporary_beside(where)
            self._tokenizer.save(made)
            made.rename(where)
        tasks = [
            Task(self._text.folder, where, first, last, self._folder / f"piece-{number:05d}.npz")
            for number, (first, last) in enumerate(self._bounds)
        ]
        done = {task.target for task in tasks if task.target.exists()}
        left = [task for task in tasks if task.target not in done]
        results = map_items(
            Workers(processes=self._processes, min_megabytes=4), write_piece, left, self._megabytes
        )
        began = said = time.monotonic()
        for number, task in enumerate(tasks, start=1):
            if task.target not in done:
                next(results)
            if time.monotonic() - said > 2 and number < len(tasks):
                said = time.monotonic()
                share = max(number - len(done), 1) / max(len(left), 1)
                rate, more = (
                    self._megabytes * number / len(tasks) / (said - began),
                    (said - began) * (1 / share - 1),
                )
                self._log(f"{self._name}: {number}/{len(tasks)} pieces, {rate:.1f} MB/s, {more:.0f} s left")
            with np.load(task.target) as arrays:
                yield Piece(arrays["ids"], arrays["lengths"], arrays["sizes"])


def write_piece(task: Task) -> None:
    """What a worker does."""
    tokenizer, cache = _tokenizer(task.tokenizer)
    piece = encode(open_dataset(task.dataset), tokenizer, cache, task.first, task.last)
    temporary = temporary_beside(task.target)
    with open(temporary, "wb") as file:
        np.savez(file, **piece._asdict())
    temporary.rename(task.target)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> tuple[Tokenizer, WordCache | None]:
    tokenizer = load_tokenizer(folder)
    return tokenizer, word_cache(tokenizer)


def encode(text: Dataset, tokenizer: Tokenizer, cache: WordCache | None, first: int, last: int) -> Piece:
    """Documents first to last: bos, text, end token, where the vocabulary has them."""
    head = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int32)
    tail = np.array(list(tokenizer.eos_ids[:1]), np.int32)
    ids, lengths, sizes = [np.zeros(0, np.int32)], [], []
    for at in range(first, last, _BATCH):
        texts = [document["text"] for document in text.read(range(at, min(at + _BATCH, last)))]
        rows = tokenizer.encode_batch(texts) if cache is None else map(cache.encode, texts)
        for each, row in zip(texts, rows, strict=True):
            found = np.asarray(row, np.int32)
            ids += (head, found, tail)
            lengths.append(len(head) + len(found) + len(tail))
            sizes.append(len(each.encode("utf-8")))
    return Piece(np.concatenate(ids), np.array(lengths, np.int64), np.array(sizes, np.int64))

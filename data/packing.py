"""Which tokens go into which row: a pure function of document lengths, seed and epoch, so any row can be
found at once.

A row is a list of pieces (document, start, stop). Pretraining concatenates the shuffled documents and cuts
every T tokens, so nothing is lost and only the last row has padding. Dialogues are never cut: first fit.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import numpy as np

TooLong = Literal["drop", "truncate"]


class Piece(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


def shuffled(n: int, *seeds: int) -> np.ndarray:
    """A permutation of range(n), int64 [n]: the order of a hash of each index. The same on every machine and
    version.
    """
    keys = np.arange(n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for seed in seeds:
            keys = _splitmix(keys ^ _splitmix(np.uint64(seed & 0xFFFF_FFFF_FFFF_FFFF)))
    return np.argsort(keys, kind="stable")


def _splitmix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function; a bijection of uint64. Steele, Lea and Flood 2014."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class ConcatAndSplit:
    """Rows of T tokens cut from the concatenated documents; every token is in one row of each epoch."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int, shuffle: bool):
        """`lengths`: int64 [N], tokens of each document."""
        self.lengths, self.seq_len, self.seed, self.shuffle = (
            np.asarray(lengths, np.int64),
            seq_len,
            seed,
            shuffle,
        )
        self.rows_per_epoch = -(-int(self.lengths.sum()) // seq_len)
        self.dropped = 0
        # An epoch's plan is 24 bytes a document; two, because threads read ahead over the edge of an epoch.
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(order of documents, where each one ends in the concatenation, order of rows)."""
        documents, rows = len(self.lengths), self.rows_per_epoch
        if not self.shuffle:
            return np.arange(documents), np.cumsum(self.lengths), np.arange(rows)
        order = shuffled(documents, self.seed, epoch, 1)
        return order, np.cumsum(self.lengths[order]), shuffled(rows, self.seed, epoch, 2)

    def row(self, index: int) -> list[Piece]:
        """The pieces of row `index`, counted through all epochs."""
        epoch, within = divmod(index, self.rows_per_epoch)
        order, ends, rows = self._plan(epoch)
        start = int(rows[within]) * self.seq_len
        stop = min(start + self.seq_len, int(ends[-1]))
        pieces = []
        k = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            document, end = int(order[k]), int(ends[k])
            begin = end - int(self.lengths[document])
            upto = min(end, stop)
            if upto > start:
                pieces.append(Piece(document, start - begin, upto - begin))
            start, k = upto, k + 1
        return pieces


class FirstFit:
    """Whole dialogues, several to a row where they fit. The rows stay; each epoch shuffles their order."""

    open_rows = 64  # rows that are tried before a new one is begun

    def __init__(
        self, lengths: np.ndarray, seq_len: int, seed: int, shuffle: bool, too_long: TooLong = "drop"
    ):
        """`too_long`: what happens to dialogues of more than T tokens; `dropped` or `truncated` counts
        them.
        """
        self.seed, self.shuffle = seed, shuffle
        lengths = np.asarray(lengths, np.int64)
        long = lengths > seq_len
        self.dropped, self.truncated = (int(long.sum()), 0) if too_long == "drop" else (0, int(long.sum()))
        order = shuffled(len(lengths), seed, 1) if shuffle else np.arange(len(lengths))
        rows: list[list[Piece]] = []
        room: list[list[int]] = []  # [tokens left, row], oldest first
        for document in order.tolist():
            size = min(int(lengths[document]), seq_len)
            if size == 0 or (long[document] and too_long == "drop"):
                continue
            place = next((entry for entry in room if entry[0] >= size), None)
            if place is None:
                place = [seq_len, len(rows)]
                rows.append([])
                room.append(place)
            rows[place[1]].append(Piece(document, 0, size))
            place[0] -= size
            room = [entry for entry in room if entry[0] > 1][-self.open_rows :]
        self._rows = rows
        self.rows_per_epoch = len(rows)
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: shuffled(len(rows), seed, epoch, 2))

    def row(self, index: int) -> list[Piece]:
        """The pieces of row `index`, counted through all epochs."""
        epoch, within = divmod(index, self.rows_per_epoch)
        return self._rows[int(self._order(epoch)[within]) if self.shuffle else within]


class PairOrder:
    """Preference pairs in shuffled order; a pair with an answer of more than T tokens is left out or cut
    off.
    """

    def __init__(
        self, lengths: np.ndarray, seq_len: int, seed: int, shuffle: bool, too_long: TooLong = "drop"
    ):
        """`lengths`: int64 [N, 2], tokens of the chosen and the rejected dialogue."""
        long = lengths.max(axis=1, initial=0) > seq_len
        self.dropped, self.truncated = (int(long.sum()), 0) if too_long == "drop" else (0, int(long.sum()))
        self._kept = np.flatnonzero(~long) if too_long == "drop" else np.arange(len(lengths))
        self.rows_per_epoch = len(self._kept)
        self.shuffle = shuffle
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: shuffled(len(self._kept), seed, epoch))

    def pair(self, index: int) -> int:
        """The record of pair `index`, counted through all epochs."""
        epoch, within = divmod(index, self.rows_per_epoch)
        return int(self._kept[self._order(epoch)[within] if self.shuffle else within])

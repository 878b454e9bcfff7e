"""Which tokens go into which row: a pure function of document lengths, seed and epoch, so any row can be
found at once.

A row is a list of pieces (document, start, stop). Pretraining concatenates the shuffled documents and cuts
every T tokens, so nothing is lost and only the last row has padding. Dialogues are never cut: first fit. Rows of
whole documents with little padding are in data/best_fit.py, rows of related ones in data/related.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

TooLong = Literal["drop", "truncate"]


class Piece(NamedTuple):
    """Tokens [start, stop) of a document; `joined`: they go on in the segment of the piece before."""

    document: int
    start: int
    stop: int
    joined: bool = False


class Waste(NamedTuple):
    """What a packing costs, each a share: padding of all places in rows, and documents (of those with tokens)
    that are in more than one row or cut off; `needless` are those cut though they would fit a row.
    """

    padding: float
    cut: float
    needless: float


Orders = Callable[[int], np.ndarray | None]  # epoch -> order of the documents, int64 [N]; None: shuffled


def shuffled(n: int, *seeds: int) -> np.ndarray:
    """A permutation of range(n), int64 [n]: the order of a hash of each index. The same on every machine and
    version.
    """
    return np.argsort(hashes(n, *seeds), kind="stable")


def hashes(n: int, *seeds: int) -> np.ndarray:
    """A hash of each of range(n), uint64 [n]."""
    keys = np.arange(n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for seed in seeds:
            keys = _splitmix(keys ^ _splitmix(np.asarray(seed & 0xFFFF_FFFF_FFFF_FFFF, np.uint64)))
    return keys


def _splitmix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function; a bijection of uint64. Steele, Lea and Flood 2014."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class ConcatAndSplit:
    """Rows of T tokens cut from the concatenated documents; every token is in one row of each epoch."""

    def __init__(
        self, lengths: np.ndarray, seq_len: int, seed: int, shuffle: bool, orders: Orders | None = None
    ):
        """`lengths`: int64 [N], tokens of each document. Where `orders` gives one, rows keep to it."""
        self.lengths, self.seq_len, self.seed, self.shuffle = (
            np.asarray(lengths, np.int64),
            seq_len,
            seed,
            shuffle,
        )
        self.rows_per_epoch = -(-int(self.lengths.sum()) // seq_len)
        self.dropped = self.truncated = 0
        self._orders = orders or (lambda epoch: None)
        # An epoch's plan is 24 bytes a document; two, because threads read ahead over the edge of an epoch.
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(order of documents, where each one ends in the concatenation, order of rows)."""
        documents, rows = len(self.lengths), self.rows_per_epoch
        given = self._orders(epoch)
        if given is not None:
            return given, np.cumsum(self.lengths[given]), np.arange(rows)
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

    def waste(self) -> Waste:
        """That of the first epoch."""
        order, ends, _ = self._plan(0)
        sizes = self.lengths[order]
        last, first = (ends - 1) // self.seq_len, (ends - sizes) // self.seq_len
        cut = (sizes > 0) & (first != last)
        count = max(int((sizes > 0).sum()), 1)
        padding = 1 - int(ends[-1]) / (self.rows_per_epoch * self.seq_len) if self.rows_per_epoch else 0.0
        needless = int((cut & (sizes <= self.seq_len)).sum())
        return Waste(padding, int(cut.sum()) / count, needless / count)


class FirstFit:
    """Whole dialogues, several to a row where they fit. The rows stay; each epoch shuffles their order."""

    open_rows = 64  # rows that are tried before a new one is begun

    def __init__(
        self,
        lengths: np.ndarray,
        seq_len: int,
        seed: int,
        shuffle: bool,
        too_long: TooLong = "drop",
        orders: Orders | None = None,
    ):
        """`too_long`: what happens to dialogues of more than T tokens; `dropped` or `truncated` counts
        them. `orders`: where it gives one for the first epoch, rows keep to it then.
        """
        self.seed, self.shuffle = seed, shuffle
        lengths = np.asarray(lengths, np.int64)
        given = orders(0) if orders else None
        self._keep_first = given is not None
        long = lengths > seq_len
        self.dropped, self.truncated = (int(long.sum()), 0) if too_long == "drop" else (0, int(long.sum()))
        if given is not None:
            order = given
        else:
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
        self._room, self._documents = len(rows) * seq_len, max(int((lengths > 0).sum()), 1)
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: shuffled(len(rows), seed, epoch, 2))

    def row(self, index: int) -> list[Piece]:
        """The pieces of row `index`, counted through all epochs."""
        epoch, within = divmod(index, self.rows_per_epoch)
        as_made = not self.shuffle or (self._keep_first and epoch == 0)
        return self._rows[within if as_made else int(self._order(epoch)[within])]

    def waste(self) -> Waste:
        used = sum(piece.stop - piece.start for row in self._rows for piece in row)
        return Waste(1 - used / self._room if self._room else 0.0, self.truncated / self._documents, 0.0)


class PairOrder:
    """Preference pairs in shuffled order; a pair with an answer of more than T tokens is left out or cut
    off.
    """

    def __init__(
        self, lengths: np.ndarray, seq_len: int, seed: int, shuffle: bool, too_long: TooLong = "drop"
    ):
        """`lengths`: int64 [N, 2], tokens of the chosen and the rejected dialogue; [N, 1] of one alone."""
        self._lengths, self._seq_len = lengths, seq_len
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

    def waste(self) -> Waste:
        kept = np.minimum(self._lengths[self._kept], self._seq_len)
        padding = 1 - float(kept.sum()) / (kept.size * self._seq_len) if kept.size else 0.0
        return Waste(padding, self.truncated / max(len(self._lengths), 1), 0.0)

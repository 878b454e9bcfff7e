"""The merges of byte-pair encoding, learned from counted words with numpy: exact, 64-bit, and in a fixed order.

Sennrich et al. 2016, arXiv:1508.07909. The most frequent pair of neighbours becomes a symbol, again and again. Of
pairs that are equally frequent the one of the smaller ids goes first, so the result depends on the counts alone.
The symbols of all words lie in one array as a linked list, and a merge touches only the places where its pair stands.
Most pairs are too rare to be ever merged: only those above a floor are followed, and when none of them is left, all
words are gone through again with a lower one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import numpy as np

_BORDER, _GONE = -1, -2  # in place of a symbol: between words, and the right half of a merged pair
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1
_PAIR_MASK = (1 << 2 * _ID_BITS) - 1


def learn_merges(
    symbols: np.ndarray,
    lengths: np.ndarray,
    counts: np.ndarray,
    spellings: list[Any],
    join: Callable[[Any, Any], Any],
    size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[int, int]]:
    """Pairs of ids in the order in which they are merged; `spellings` grows by what they make.

    Args:
        symbols: int [sum of lengths], ids of the symbols of every word, one word after the other.
        lengths: int [W], symbols of each word.
        counts: int [W], how often each word occurs.
        spellings: what each id stands for.
        join: what stands for two of them together.
        size: ends when `spellings` has so many, or when no pair occurs twice.
        progress: called with the number of spellings now and then.
    """
    places = _Places(symbols, lengths, counts)
    merges: list[tuple[int, int]] = []
    while len(spellings) < size and (pair := places.most_frequent()) is not None:
        left, right = pair >> _ID_BITS, pair & _ID_MASK
        # No other pair ever makes the same whole: what stands between two borders is always merged in one order.
        places.merge(pair, len(spellings))
        spellings.append(join(spellings[left], spellings[right]))
        merges.append((left, right))
        if len(merges) % 256 == 0:
            progress(len(spellings))
    return merges


class _Places:
    """Every symbol of every word, how often each pair of neighbours occurs, and where.

    A pair of ids is one number, `left << 32 | right`; a place is the index of its left symbol.
    """

    def __init__(self, symbols: np.ndarray, lengths: np.ndarray, counts: np.ndarray):
        word_of_symbol = np.repeat(np.arange(len(lengths)), lengths)
        at = np.arange(len(symbols)) + word_of_symbol + 1
        total = len(symbols) + len(lengths) + 1
        self._symbol = np.full(total, _BORDER, np.int32)
        self._symbol[at] = symbols
        self._count = np.zeros(total, np.int64)
        self._count[at] = np.asarray(counts, np.int64)[word_of_symbol]
        self._next = np.arange(1, total + 1, dtype=np.int64 if total >= 1 << 31 else np.int32)
        self._before = self._next - 2
        self._frequency: dict[int, int] = {}
        self._where: dict[int, np.ndarray] = {}
        self._queue: list[int] = []  # frequency and pair in one number, the most frequent and smallest first
        self._floor = 0
        self._follow(int(self._count.max(initial=0)) >> 12)

    def most_frequent(self) -> int | None:
        """The pair that occurs most; None when no pair occurs twice."""
        while True:
            while self._queue:
                entry = heapq.heappop(self._queue)
                frequency, pair = -(entry >> 2 * _ID_BITS), entry & _PAIR_MASK
                now = self._frequency.get(pair, 0)
                if now == frequency:
                    return pair
                if now >= self._floor:  # it has become rarer since it was queued
                    heapq.heappush(self._queue, _entry(now, pair))
            if self._floor <= 2:
                return None
            self._follow(self._floor >> 4)

    def _follow(self, floor: int) -> None:
        """Finds all pairs that occur at least `floor` times, and no less than twice."""
        self._floor = max(floor, 2)
        self._frequency, self._where, self._queue = {}, {}, []
        at = np.flatnonzero(self._symbol >= 0).astype(self._next.dtype)
        at = at[self._symbol[self._next[at]] >= 0]
        self._add(_pairs(self._symbol[at], self._symbol[self._next[at]]), at)

    def merge(self, pair: int, whole: int) -> None:
        """Writes the symbol `whole` wherever `pair` stands."""
        symbol = self._symbol
        del self._frequency[pair]
        at = self._standing(pair, self._where.pop(pair))
        gone = self._next[at]
        left, right = self._before[at], self._next[gone]
        counts = self._count[at]
        symbol[gone] = _GONE
        apart = symbol[left] >= 0  # a place that follows a merged one shares its left pair with it
        left, left_at, left_counts = symbol[left[apart]], left[apart], counts[apart]
        self._subtract(_pairs(left, pair >> _ID_BITS), left_counts)
        inside = symbol[right] >= 0
        self._subtract(_pairs(pair & _ID_MASK, symbol[right[inside]]), counts[inside])
        symbol[at] = whole
        self._next[at], self._before[right] = right, at
        pairs = [_pairs(left, whole), _pairs(whole, symbol[right[inside]])]
        self._add(np.concatenate(pairs), np.concatenate([left_at, at[inside]]))

    def _standing(self, pair: int, at: np.ndarray) -> np.ndarray:
        """The places among `at` where `pair` still stands, without those that overlap an earlier one."""
        left, right = pair >> _ID_BITS, pair & _ID_MASK
        at = at[(self._symbol[at] == left) & (self._symbol[self._next[at]] == right)]
        if left != right or len(at) < 2:
            return at
        at = np.sort(at)  # "aaa" holds "aa" twice, but only the first is merged
        starts = np.concatenate([[True], at[1:] != self._next[at[:-1]]])
        index = np.arange(len(at))
        return at[(index - np.maximum.accumulate(np.where(starts, index, 0))) % 2 == 0]

    def _subtract(self, pairs: np.ndarray, counts: np.ndarray) -> None:
        frequency = self._frequency
        if len(pairs) > 64:
            pairs, starts, order = _grouped(pairs)
            counts = np.add.reduceat(counts[order], starts)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            if pair in frequency:  # neither rare nor the merged one
                frequency[pair] -= count

    def _add(self, pairs: np.ndarray, at: np.ndarray) -> None:
        if not len(pairs):
            return
        pairs, starts, order = _grouped(pairs)
        at = at[order]
        totals = np.add.reduceat(self._count[at], starts)
        often = np.flatnonzero(totals >= self._floor)
        stops = np.append(starts[1:], len(at))[often].tolist()
        rows = zip(pairs[often].tolist(), totals[often].tolist(), starts[often].tolist(), stops, strict=True)
        for pair, total, start, stop in rows:
            self._frequency[pair] = total
            self._where[pair] = at[start:stop].copy()  # a view would keep all of `at`
            heapq.heappush(self._queue, _entry(total, pair))


def _grouped(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different pairs, where each begins in the sorted order, and that order."""
    order = np.argsort(pairs)
    pairs = pairs[order]
    starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
    return pairs[starts], starts, order


def _pairs(left: Any, right: Any) -> np.ndarray:
    return np.asarray(left, np.int64) << _ID_BITS | np.asarray(right, np.int64)


def _entry(frequency: int, pair: int) -> int:
    return (-frequency << 2 * _ID_BITS) | pair

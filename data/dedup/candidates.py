"""Which pairs of a MinHash are verified, so that the work grows with the documents also where thousands of unlike pages
share a band: the pages of one template, just below the threshold.

In a bucket of up to `SMALL` documents all pairs are verified. In a larger one:
  leaders    the best document is compared with all others, then the best one that no leader reached, and so on, until
             `VAIN` leaders in a row reach less than a hundredth of the bucket each
  shared     documents that share a shingle which at most `RARE` documents of large buckets have; of those with a
             common one each with the next, in the order of the rule

So a pair above the threshold is missed only where all that it shares is common, and neither a leader nor the next of
its kind connects it. Of the documents with a twin on made templated pages 0.99 are found (tests/data/test_dedup.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.dedup.corpus import components, groups

SMALL = 32  # documents of a bucket in which all pairs are verified
LEADERS, VAIN = 64, 4  # of a large bucket at most; in a row that reach less than a hundredth
RARE = 16  # documents of large buckets that have a rare shingle
_PIECE = 1 << 24  # shingles sorted at once
_BLOCK = 1 << 22  # shingles compared at once
Verify = Callable[[np.ndarray], np.ndarray]  # of pairs, int64 [n, 2], those that hold


class Store(NamedTuple):
    """Files with the numbers of documents (ascending), their shingles one after the other, and where each ends."""

    documents: Path
    shingles: Path
    ends: Path

    def load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        documents, shingles, ends = (np.load(path, mmap_mode="r") for path in self)
        return documents, shingles, ends


class Buckets(NamedTuple):
    """Groups of documents that share a band, each group once."""

    members: np.ndarray  # int64, the best first in each group
    ends: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, order: np.ndarray) -> Buckets:
        """`keys`: uint64 [N, bands + 1], the last one 0 for a document of no bucket; `order`: from best to worst."""
        spoken = order[keys[order, -1] > 0]
        seen: dict[bytes, None] = {}
        parts: list[np.ndarray] = []
        for band in range(keys.shape[1] - 1):
            members, ends = groups(keys[spoken, band])
            for group in np.split(spoken[members], ends[:-1]) if len(ends) else []:
                raw = group.tobytes()
                name = raw if len(raw) <= 64 else hashlib.blake2b(raw, digest_size=16).digest()
                if name not in seen:
                    seen[name] = None
                    parts.append(group)
        return cls.joined(parts)

    @classmethod
    def joined(cls, parts: list[np.ndarray]) -> Buckets:
        if not parts:
            return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))
        return cls(np.concatenate(parts), np.cumsum([len(part) for part in parts]))

    def parts(self) -> list[np.ndarray]:
        return np.split(self.members, self.ends[:-1]) if len(self.ends) else []

    def documents(self, count: int) -> np.ndarray:
        """Those in any group, ascending, of `count`."""
        inside = np.zeros(count, bool)
        inside[self.members] = True
        return np.flatnonzero(inside)

    def stars(self) -> np.ndarray:
        """(best of its group, each other): distinct pairs, int64 [n, 2]."""
        starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)
        firsts = np.repeat(self.members[starts], np.diff(np.concatenate([[0], self.ends])))
        return distinct(np.stack([firsts, self.members], axis=1)[firsts != self.members])

    def across(self, component: np.ndarray) -> np.ndarray:
        """All pairs of one group and of two components, distinct, int64 [n, 2]."""
        made = [np.zeros((0, 2), np.int64)]
        for group in self.parts():
            kinds = component[group]
            if (kinds != kinds[0]).any():
                i, j = np.triu_indices(len(group), 1)
                other = kinds[i] != kinds[j]
                made.append(np.stack([group[i[other]], group[j[other]]], axis=1))
        return distinct(np.concatenate(made))


def similar_pairs(
    buckets: Buckets, keys: np.ndarray, order: np.ndarray, store: Store, verify: Verify
) -> np.ndarray:
    """Pairs that hold, enough of them that their components are those of all that hold, int64 [n, 2]."""
    count, sizes = len(keys), np.diff(np.concatenate([[0], buckets.ends]))
    if not count or not len(sizes):
        return np.zeros((0, 2), np.int64)
    groups_of = buckets.parts()
    small = Buckets.joined([group for group in groups_of if len(group) <= SMALL])
    large = [group for group in groups_of if len(group) > SMALL]
    tested = _Tested(count, verify)
    if len(small.ends):
        tested.add(small.stars())
        tested.add(small.across(components(count, tested.held)))
    _leaders(large, tested)
    if large:
        inside = np.zeros(count, bool)
        inside[np.concatenate(large)] = True
        for pairs in _sharing(store, order[inside[order]]):
            component = components(count, tested.held)
            apart = component[pairs[:, 0]] != component[pairs[:, 1]]
            tested.add(pairs[apart & _share_a_band(keys, pairs)])
    return tested.held


class _Tested:
    """Pairs that were verified, each once, and those of them that held."""

    def __init__(self, count: int, verify: Verify):
        self.count, self._verify = count, verify
        self._keys = np.zeros(0, np.int64)
        self.held = np.zeros((0, 2), np.int64)

    def add(self, pairs: np.ndarray) -> None:
        keys = pairs.min(1) * self.count + pairs.max(1) if len(pairs) else np.zeros(0, np.int64)
        fresh = ~np.isin(keys, self._keys)
        self._keys = np.concatenate([self._keys, keys[fresh]])
        self.held = np.concatenate([self.held, self._verify(pairs[fresh])])


def _leaders(large: list[np.ndarray], tested: _Tested) -> None:
    reached = [np.zeros(len(group), bool) for group in large]
    vain = [0] * len(large)
    for _ in range(LEADERS):
        component = components(tested.count, tested.held)
        pairs, leaders = [], {}
        for number, group in enumerate(large):
            if vain[number] < VAIN and not reached[number].all():
                at = int(np.argmin(reached[number]))
                leaders[number] = at
                others = group[component[group] != component[group[at]]]
                pairs.append(np.stack([np.full(len(others), group[at]), others], axis=1))
        if not pairs:
            return
        tested.add(distinct(np.concatenate(pairs)))
        component = components(tested.count, tested.held)
        for number, at in leaders.items():
            group = large[number]
            before = np.count_nonzero(reached[number])
            reached[number] |= component[group] == component[group[at]]
            gained = np.count_nonzero(reached[number]) - before
            vain[number] = 0 if gained > max(1, len(group) // 100) else vain[number] + 1


def _sharing(store: Store, inside: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs of the documents `inside` that share a shingle, piece by piece of the shingles."""
    documents, values, ends = store.load()
    at = np.searchsorted(documents, inside)
    starts, sizes = ends[at], ends[at + 1] - ends[at]
    pieces = max(1, -(-int(sizes.sum()) // _PIECE))
    for piece in range(pieces):
        found, owners = [], []
        for first, last in blocks(sizes):
            block = values[ranges(starts[first:last], sizes[first:last])]
            owner = np.repeat(inside[first:last], sizes[first:last])
            mine = (block >> np.uint64(40)) % np.uint64(pieces) == piece
            found.append(block[mine])
            owners.append(owner[mine])
        yield _pairs_of_shared(np.concatenate(found), np.concatenate(owners))


def _pairs_of_shared(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """All pairs of owners of a rare value, and each owner of a common one with the next, distinct."""
    order = np.argsort(values, kind="stable")
    values, owners = values[order], owners[order]
    run = np.cumsum(np.concatenate([[True], values[1:] != values[:-1]])) - 1
    rare = np.bincount(run)[run] <= RARE
    made = [np.zeros((0, 2), np.int64)]
    for apart in range(1, min(RARE, len(run))):
        same = run[apart:] == run[:-apart]
        same = np.flatnonzero(same if apart == 1 else same & rare[apart:])
        made.append(distinct(np.stack([owners[same], owners[same + apart]], axis=1)))
    return distinct(np.concatenate(made))


def _share_a_band(keys: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """bool [n]."""
    shared = np.zeros(len(pairs), bool)
    for band in range(keys.shape[1] - 1):
        shared |= keys[pairs[:, 0], band] == keys[pairs[:, 1], band]
    return shared


def verify_some(item: tuple[Store, float, np.ndarray]) -> np.ndarray:
    """Whether each pair (store, least similarity, pairs sorted by their first) holds, bool [n]."""
    store, wanted, pairs = item
    documents, values, ends = store.load()
    at = np.searchsorted(documents, pairs)
    starts, sizes = ends[at], ends[at + 1] - ends[at]
    held = sizes.min(1) >= wanted * sizes.max(1)
    left = np.flatnonzero(held)
    runs = np.split(left, np.flatnonzero(np.diff(pairs[left, 0])) + 1) if len(left) else []
    for run in runs:
        begin, size = starts[run[0], 0], sizes[run[0], 0]
        leader = np.asarray(values[begin : begin + size])
        for first, last in blocks(sizes[run, 1]):
            some = run[first:last]
            lengths = sizes[some, 1]
            others = values[ranges(starts[some, 1], lengths)]
            place = np.minimum(np.searchsorted(leader, others), size - 1)
            shared = np.add.reduceat(leader[place] == others, np.cumsum(lengths) - lengths, dtype=np.int64)
            held[some] = shared / (size + lengths - shared) >= wanted
    return held


def blocks(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive entries with about `_BLOCK` bytes together."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
        yield first, last
        first = last


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each, one after the other, int64."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))


def distinct(pairs: np.ndarray) -> np.ndarray:
    """int64 [n, 2], sorted by the first."""
    return np.unique(pairs, axis=0) if len(pairs) else pairs.reshape(-1, 2).astype(np.int64)

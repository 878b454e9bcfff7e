"""Which values stand before, among all shards, found in pieces that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

_PIECE = 1 << 25  # values sorted at once: half a gigabyte with their places


def later_copies(
    shards: list[str], values_of: Callable[[str], np.ndarray], copies: int = 1
) -> Iterator[tuple[str, np.ndarray]]:
    """(shard, bool mask of its values) of values that stand `copies` times before, or more often: in the order of
    shards, and in the order of each shard's values (uint64).

    Memory: one piece of the values, chosen by their hash, and a byte for each value.
    """
    sizes = [len(values_of(shard)) for shard in shards]
    pieces = max(1, -(-sum(sizes) // _PIECE))
    masks = [np.zeros(size, bool) for size in sizes]
    for piece in range(pieces):
        found = [np.flatnonzero(_piece_of(values_of(shard), pieces) == piece) for shard in shards]
        values = np.concatenate([np.zeros(0, np.uint64), *(values_of(s)[at] for s, at in zip(shards, found))])
        late = _rank_in_group(values) >= copies
        for mask, at, part in zip(masks, found, np.split(late, np.cumsum([len(at) for at in found])[:-1])):
            mask[at] = part
    yield from zip(shards, masks)


def _piece_of(values: np.ndarray, pieces: int) -> np.ndarray:
    return (values >> np.uint64(40)) % np.uint64(pieces)


def _rank_in_group(values: np.ndarray) -> np.ndarray:
    """How often each value stands before, int64 [n]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, bool)
    first = np.maximum.accumulate(np.where(starts, np.arange(len(values)), 0))
    rank = np.empty(len(values), np.int64)
    rank[order] = np.arange(len(values)) - first
    return rank

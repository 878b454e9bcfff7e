"""In which order a source gives its documents first: from short to long, or by a score of theirs, in buckets that
run into each other. Bengio et al. 2009, "Curriculum Learning"; shuffling again from the second epoch on."""

from __future__ import annotations

import numpy as np

from data.mixture import Curriculum
from data.packing import Orders, hashes, shuffled


def curriculum_orders(keys: np.ndarray, curriculum: Curriculum, seed: int) -> Orders:
    """The first epoch in the order of `keys` [N], later ones left to the shuffle."""

    def orders(epoch: int) -> np.ndarray | None:
        return curriculum_order(keys, curriculum, seed) if epoch == 0 else None

    return orders


def curriculum_order(keys: np.ndarray, curriculum: Curriculum, seed: int) -> np.ndarray:
    """int64 [N]: documents in the order of bucket / buckets + max(blend, 1 / buckets) * hash, hash in [0, 1)."""
    n = len(keys)
    mixed = shuffled(n, seed, 3)  # so that equal keys fall into buckets by chance
    keys = -keys[mixed] if curriculum.descending else keys[mixed]
    ranks = np.empty(n, np.int64)
    ranks[mixed[np.argsort(keys, kind="stable")]] = np.arange(n)
    buckets = ranks * curriculum.buckets // max(n, 1)
    moved = hashes(n, seed, 4) / 2.0**64
    width = max(curriculum.blend, 1 / curriculum.buckets)
    return np.argsort(buckets / curriculum.buckets + width * moved, kind="stable")

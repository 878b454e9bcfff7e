"""Ways to merge one tensor of several models: plain functions of float32 arrays with the papers' symbols.

A model's tensor is theta (Model Stock: w), the base model's is theta_0. A task vector is tau = theta - theta_0; DARE
calls it delta. Several papers' methods share parts, so these are functions, too: `trim`, `drop`, `elect`.
Values are those of mergekit 0.1.5 (tests/goldens/make_merges.py).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

Array = np.ndarray
Rescale = Literal["none", "inverse", "l1"]

PARALLEL = 0.9995  # above this cosine, the arc of SLERP is a line in float32
EPS = 1e-6  # Model Stock: least product of lengths, and least divisor


def linear(theta: Iterable[Array], weights: Sequence[float], normalize: bool = True) -> Array:
    """sum(w_i theta_i), divided by sum(w_i) with `normalize`.

    Model soups, Wortsman et al. 2022, arXiv:2203.05482.
    """
    total = _weighted_sum(theta, weights)
    return total / np.float32(sum(weights)) if normalize else total


def slerp(theta_0: Array, theta_1: Array, t: float) -> Array:
    """Spherical interpolation: (sin((1 - t) omega) theta_0 + sin(t omega) theta_1) / sin(omega).

    omega is the angle between the tensors as vectors. Parallel and opposite ones are interpolated linearly. Shoemake
    1985, "Animating rotation with quaternion curves".
    """
    lengths = [np.sqrt(_dot(theta, theta)) for theta in (theta_0, theta_1)]
    cosine = _dot(theta_0, theta_1) / np.prod([length if length > 1e-8 else 1.0 for length in lengths])
    if abs(cosine) > PARALLEL:
        first, second = 1 - t, t
    else:
        omega = np.arccos(cosine)
        first, second = np.sin([(1 - t) * omega, t * omega]) / np.sin(omega)
    return np.float32(first) * theta_0 + np.float32(second) * theta_1


def task_arithmetic(
    theta_0: Array,
    tau: Iterable[Array],
    weights: Sequence[float],
    scale: float = 1.0,
    normalize: bool = False,
) -> Array:
    """theta_0 + lambda sum(w_i tau_i), with `normalize` divided by sum(w_i); `scale` is lambda.

    Ilharco et al. 2022, arXiv:2212.04089. With task vectors of `drop`, it is DARE.
    """
    total = _weighted_sum(tau, weights)
    return theta_0 + np.float32(scale / sum(weights) if normalize else scale) * total


def ties(
    theta_0: Array, tau: Iterable[Array], weights: Sequence[float], scale: float = 1.0, normalize: bool = True
) -> Array:
    """theta_0 + lambda times the mean of those w_i tau_i that have the elected sign; `scale` is lambda.

    Yadav et al. 2023, arXiv:2306.01708; its first step, `trim`, is the caller's. The mean weighs by w_i; without
    `normalize` it is a sum. With task vectors of `drop`, it is DARE with elected signs.
    """
    weighted = [np.float32(w) * tau_i for w, tau_i in zip(weights, tau, strict=True)]
    gamma = elect(weighted)
    total, divisor = np.zeros_like(theta_0), np.zeros_like(theta_0)
    for w, tau_i in zip(weights, weighted, strict=True):
        agrees = np.sign(tau_i) == gamma
        np.add(total, tau_i, out=total, where=agrees)
        np.add(divisor, np.float32(w), out=divisor, where=agrees)
    if normalize:
        np.divide(total, divisor, out=total, where=divisor != 0)
    total *= np.float32(scale)
    return np.add(theta_0, total, out=total)


def elect(tau: Sequence[Array]) -> Array:
    """TIES' elected sign gamma of each number: that of the sum over models, +1 where it is zero."""
    total = functools.reduce(np.add, tau)
    return np.where(total >= 0, np.float32(1), np.float32(-1))


def trim(tau: Array, density: float, rescale: Rescale = "none") -> Array:
    """TIES' first step: all but the largest share `density` of the numbers become zero, at least one stays.

    Of equal magnitudes at the limit, the first ones stay.
    """
    if density >= 1 or tau.size == 0:
        return tau
    size = np.abs(tau).ravel()
    count = max(1, int(density * size.size))
    limit = np.partition(size, size.size - count)[size.size - count]
    kept = size > limit
    if limit > 0:  # zeros stay zeros
        equal = np.flatnonzero(size == limit)
        kept[equal[: count - np.count_nonzero(kept)]] = True
    return keep(tau, kept.reshape(tau.shape), density, rescale)


def drop(delta: Array, density: float, rng: np.random.Generator, rescale: Rescale = "inverse") -> Array:
    """DARE: each number becomes zero with probability p = 1 - density, and the others are rescaled.

    Yu et al. 2023, arXiv:2311.03099. With the paper's 1 / (1 - p), "inverse", the expectation is delta.
    """
    if density >= 1:
        return delta
    return keep(delta, rng.random(delta.shape, np.float32) < density, density, rescale)


def keep(tau: Array, kept: Array, density: float, rescale: Rescale) -> Array:
    """tau where `kept`, else 0; times 1 / density ("inverse"), or to the sum of magnitudes of tau ("l1")."""
    sparse = np.where(kept, tau, np.float32(0))
    if rescale == "inverse":
        return sparse * np.float32(1 / density)
    if rescale == "l1":
        before, after = (np.abs(x).sum(dtype=np.float64) for x in (tau, sparse))
        if min(before, after) >= 1e-7:
            sparse *= np.float32(before / after)
    return sparse


def model_stock(w_0: Array, w: Sequence[Array], filter_wise: bool = False) -> Array:
    """t mean(w_i) + (1 - t) w_0 with t = N cos(theta) / (1 + (N - 1) cos(theta)).

    theta is the angle between two offsets w_i - w_0, its cosine the mean over pairs: of whole tensors, or of each row
    (a filter) with `filter_wise`. Jang et al. 2024, arXiv:2403.19522. Where t has no value, w_0 stays.
    """
    filters = (-1, w_0.shape[-1]) if filter_wise and w_0.ndim else (1, -1)
    offsets = [(w_i - w_0).reshape(filters) for w_i in w]
    lengths = [np.sqrt(_row_dots(offset, offset)) for offset in offsets]
    cosines = [
        np.clip(_row_dots(offsets[i], offsets[j]) / np.maximum(lengths[i] * lengths[j], EPS), -1, 1)
        for i, j in itertools.combinations(range(len(w)), 2)
    ]
    cosine = np.mean(cosines, axis=0)
    divisor = 1 + (len(w) - 1) * cosine
    defined = np.abs(divisor) >= EPS
    t = np.where(defined, len(w) * cosine / np.where(defined, divisor, 1), 0).astype(np.float32)[:, None]
    mean = functools.reduce(np.add, offsets) / np.float32(len(w))
    return w_0 + (t * mean).reshape(w_0.shape)


def _weighted_sum(arrays: Iterable[Array], weights: Sequence[float]) -> Array:
    total: Array | None = None
    for w, array in zip(
        weights, arrays, strict=True
    ):  # arrays are read one by one, to hold one beside the sum
        part = np.float32(w) * array
        if total is None:
            total = part
        else:
            total += part
    if total is None:
        raise ValueError("nothing to merge: give at least one model.")
    return total


def _dot(a: Array, b: Array) -> float:
    """The product of two tensors as vectors, summed in float64."""
    return float(_row_dots(a.reshape(1, -1), b.reshape(1, -1))[0])


def _row_dots(a: Array, b: Array) -> Array:
    return np.einsum("ri,ri->r", a, b, dtype=np.float64)

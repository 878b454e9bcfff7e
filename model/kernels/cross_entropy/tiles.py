"""The contribution of a tile of logits to its tokens' scores, and its gradient: the maths that plain stripes and the
TPU kernels of cross-entropy share.

The running maximum and sum are those of Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

# N tokens of a tile, S entries of the vocabulary in a tile; `_N1` a column, one number a token

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # value of a masked logit
LEAST = -5e29  # start of a running maximum: far above MASKED, so exp(MASKED - maximum) is always 0
NOWHERE = 2**30  # index of a masked entry


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """Tokens, entries of the vocabulary and channels of one step of a kernel."""

    tokens: int = 512
    entries: int = 1024
    width: int = 512

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if any(size < 1 or size % 128 for size in sizes) or (self.entries > 128 and self.entries % 256):
            raise ValueError(
                f"{self}: tiles are multiples of the 128 lanes of a vector, and entries of 256 or 128."
            )


@dataclasses.dataclass(frozen=True)
class CrossEntropyCall:
    """The static options of one cross-entropy."""

    scale: float = 1.0  # logits: softcap * tanh(scale * (hidden . head + bias) / softcap)
    softcap: float | None = None
    mean: bool = False  # whether to compute the mean logit
    likeliest: bool = False  # whether to compute the likeliest entry
    stripe_bytes: int = 128 << 20  # most memory for logits, or their gradients, of all tokens
    tiles: TileSizes | None = None  # tile sizes of the TPU kernels; None: plain jnp
    interpret: bool = False

    def stripe(self, N: int, V: int, itemsize: int) -> int:
        """Entries of the vocabulary in a stripe."""
        fitting, tile = self.stripe_bytes // max(N * itemsize, 1), self.tiles.entries if self.tiles else 128
        return min(V, max(tile, fitting // tile * tile))


class Scores(NamedTuple):
    """Scores of each token over a part of the vocabulary."""

    chosen: jax.Array  # the target's logit, 0 if the target is not in this part
    log_z: jax.Array  # log-sum-exp of the logits
    mean: jax.Array | None  # mean logit under the part's own distribution
    best: jax.Array | None  # the highest logit among allowed choices
    likeliest: jax.Array | None  # int32, the first entry with it


class Running(NamedTuple):
    """The running state of each token over the entries so far."""

    top_N1: jax.Array
    total_N1: jax.Array  # sum of exp(logit - top)
    chosen_N1: jax.Array
    weighted_N1: jax.Array | None  # sum of exp(logit - top) * logit
    best_N1: jax.Array | None
    likeliest_N1: jax.Array | None


class Cotangents(NamedTuple):
    """The parts of a token's gradient: d logit = weight * (shift + slope * logit) + chosen [at the target]."""

    log_z_N1: jax.Array
    chosen_N1: jax.Array
    shift_N1: jax.Array
    slope_N1: jax.Array | None


def initial_state(call: CrossEntropyCall, N: int) -> Running:
    filled = lambda value: jnp.full((N, 1), value, jnp.float32)
    weighted_N1 = filled(0) if call.mean else None
    best = (filled(LEAST), jnp.zeros((N, 1), jnp.int32)) if call.likeliest else (None, None)
    return Running(filled(LEAST), filled(0), filled(0), weighted_N1, *best)


def update(
    call: CrossEntropyCall,
    state: Running,
    logits_NS: jax.Array,
    entries_NS: jax.Array,
    targets_N1: jax.Array,
    choices,
) -> Running:
    """The state after one more tile; masked entries are MASKED and NOWHERE.

    Args:
      choices: this and larger entries are never the likeliest.
    """
    top_N1 = jnp.maximum(state.top_N1, logits_NS.max(axis=1, keepdims=True))
    weights_NS, shrink_N1 = jnp.exp(logits_NS - top_N1), jnp.exp(state.top_N1 - top_N1)
    total_N1 = state.total_N1 * shrink_N1 + weights_NS.sum(axis=1, keepdims=True)
    hit_NS = jnp.where(entries_NS == targets_N1, logits_NS, 0.0)
    chosen_N1 = state.chosen_N1 + hit_NS.sum(axis=1, keepdims=True)
    weighted_N1, best_N1, likeliest_N1 = state.weighted_N1, state.best_N1, state.likeliest_N1
    if weighted_N1 is not None:
        weighted_N1 = weighted_N1 * shrink_N1 + (weights_NS * logits_NS).sum(axis=1, keepdims=True)
    if best_N1 is not None and likeliest_N1 is not None:
        candidates_NS = jnp.where(entries_NS < choices, logits_NS, MASKED)
        here_N1 = candidates_NS.max(axis=1, keepdims=True)
        first_N1 = jnp.where(candidates_NS == here_N1, entries_NS, NOWHERE).min(axis=1, keepdims=True)
        likeliest_N1 = jnp.where(here_N1 > best_N1, first_N1, likeliest_N1)
        best_N1 = jnp.maximum(best_N1, here_N1)
    return Running(top_N1, total_N1, chosen_N1, weighted_N1, best_N1, likeliest_N1)


def final_scores(state: Running) -> Scores:
    """Columns, [N, 1]."""
    mean_N1 = None if state.weighted_N1 is None else state.weighted_N1 / state.total_N1
    log_z_N1 = state.top_N1 + jnp.log(state.total_N1)
    return Scores(state.chosen_N1, log_z_N1, mean_N1, state.best_N1, state.likeliest_N1)


def logits_of(call: CrossEntropyCall, products_NS: jax.Array, bias_1S: jax.Array | None) -> jax.Array:
    """Logits from products of hidden states and the head, float32."""
    logits_NS = products_NS if bias_1S is None else products_NS + bias_1S
    logits_NS = logits_NS if call.scale == 1 else logits_NS * call.scale
    return logits_NS if call.softcap is None else call.softcap * jnp.tanh(logits_NS / call.softcap)


def product_gradients(
    call: CrossEntropyCall,
    logits_NS: jax.Array,
    entries_NS: jax.Array,
    targets_N1: jax.Array,
    cotangents: Cotangents,
) -> jax.Array:
    """Gradient of the products of hidden states and the head, float32."""
    shift = (
        cotangents.shift_N1
        if cotangents.slope_N1 is None
        else cotangents.shift_N1 + cotangents.slope_N1 * logits_NS
    )
    at_target_NS = jnp.where(entries_NS == targets_N1, cotangents.chosen_N1, 0.0)
    d_NS = jnp.exp(logits_NS - cotangents.log_z_N1) * shift + at_target_NS
    if call.softcap is not None:
        d_NS *= 1 - jnp.square(logits_NS / call.softcap)
    return d_NS if call.scale == 1 else d_NS * call.scale

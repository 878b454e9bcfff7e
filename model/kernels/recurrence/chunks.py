"""Recurrences in chunks: a few matrix products within a chunk, and a state from chunk to chunk."""

# B batch, T tokens, Q tokens of a chunk

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.kernels.backend import Backend

SHORT = 16  # rows of at most this many tokens, as in decoding, are one small chunk, which needs no kernel


@dataclasses.dataclass(frozen=True)
class Request:
    """What an implementation of a recurrence reads to decide whether it can serve."""

    backend: Backend
    length: int  # tokens of a row
    decays_by_channel: bool = False  # a decay for each key channel instead of each head


def too_short(request: Request) -> str | None:
    return f"rows of {SHORT} tokens or fewer are one small chunk" if request.length <= SHORT else None


def scan_chunks(step: Callable, state: Any, inputs: Any, chunk: int) -> tuple[Any, Any]:
    """Run `step(state, inputs) -> (state, outputs)` over chunks of the token axis.

    Args:
      inputs: tree of [B, T, ...]; the last chunk is padded with zeros, which must not change the state.

    Returns:
      (the last state, the outputs joined to [B, T, ...]). The backward pass recomputes the values within a chunk.
    """
    B, T = jax.tree.leaves(inputs)[0].shape[:2]
    if T <= chunk:
        state, outputs = step(state, jax.tree.map(lambda x: _pad(x, chunk), inputs))
        return state, jax.tree.map(lambda y: y[:, :T], outputs)

    def split(x):
        return jnp.moveaxis(_pad(x, chunk).reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    def join(y):
        return jnp.moveaxis(y, 0, 1).reshape(B, -1, *y.shape[3:])[:, :T]

    state, outputs = jax.lax.scan(jax.checkpoint(step), state, jax.tree.map(split, inputs))
    return state, jax.tree.map(join, outputs)


def same_document(first_BQ: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The masks of a chunk; a document starts at each `first`.

    Returns:
      [B, Q, Q] whether the second token is at or before the first in the same document; [B, Q] whether a token sees the
      state before the chunk; [B, Q] whether the state after the chunk sees the token.
    """
    document_BQ = jnp.cumsum(first_BQ, axis=1)
    causal_QQ = jnp.tril(jnp.ones((first_BQ.shape[1],) * 2, bool))
    pairs_BQQ = causal_QQ & (document_BQ[:, :, None] == document_BQ[:, None, :])
    return pairs_BQQ, document_BQ == 0, document_BQ == document_BQ[:, -1:]


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    extra = -x.shape[1] % multiple
    return x if extra == 0 else jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))

"""The load-balance loss of a router, token by token, so that sums over parts of a batch add up to the batch's.

Fedus et al. 2021, arXiv:2101.03961; for each document as in DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
"""

# B batch, T tokens, E choices (experts, or numbers of recursions)

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from model.blocks.common import TokenInfo

Over = Literal["document", "batch"]


def token_weights(info: TokenInfo, real_BT: jax.Array) -> jax.Array:
    """[B, T] float32: each token's weight in the losses of blocks; 0 for padding."""
    weights_BT = jnp.ones(real_BT.shape, jnp.float32) if info.weights is None else info.weights
    return jnp.where(real_BT, weights_BT, 0.0)


def balance_of_tokens(
    counts_BTE: jax.Array, probabilities_BTE: jax.Array, real_BT: jax.Array, info: TokenInfo, over: Over
) -> jax.Array:
    """[B, T] float32: E * sum_e load_e * probability_e, with the load of the token's document (or of the whole batch).

    Its mean over a document is the number of choices a token for even loads and probabilities, and larger if frequent
    choices are also probable. The gradient goes through the probabilities.

    Args:
      counts_BTE: how often each token made each choice.
    """
    counts_BTE = jax.lax.stop_gradient(jnp.where(real_BT[..., None], counts_BTE, 0)).astype(jnp.float32)
    E = counts_BTE.shape[-1]
    if over == "batch":
        load_E = counts_BTE.sum((0, 1)) / jnp.maximum(real_BT.sum(), 1)
        return E * jnp.einsum("BTE,E->BT", probabilities_BTE, load_E)
    if info.segment_ids is None:
        return E * jnp.einsum("BTE,BE->BT", probabilities_BTE, counts_BTE.mean(1))
    return E * jnp.sum(probabilities_BTE * document_mean(counts_BTE, info.segment_ids), axis=-1)


def document_mean(x_BTE: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """[B, T, E]: the mean of `x` over each token's document, from differences of running sums."""
    T, at_T = segment_ids_BT.shape[1], jnp.arange(segment_ids_BT.shape[1])
    change_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts_BT = jnp.pad(change_BT, ((0, 0), (1, 0)), constant_values=True)
    ends_BT = jnp.pad(change_BT, ((0, 0), (0, 1)), constant_values=True)
    first_BT = jax.lax.cummax(jnp.where(starts_BT, at_T, 0), axis=1)
    last_BT = jax.lax.cummin(jnp.where(ends_BT, at_T, T - 1), axis=1, reverse=True)
    sums_BTE = jnp.pad(jnp.cumsum(x_BTE, axis=1), ((0, 0), (1, 0), (0, 0)))
    at = lambda index_BT: jnp.take_along_axis(sums_BTE, index_BT[..., None], axis=1)
    return (at(last_BT + 1) - at(first_BT)) / (last_BT + 1 - first_BT)[..., None]

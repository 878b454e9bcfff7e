"""Text embeddings: pooled hidden states of an encoder or decoder. Reimers and Gurevych 2019, arXiv:1908.10084."""

# B texts, T tokens, D model width

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.function import Params, apply
from model.inputs import Inputs


def embed(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    pooling: str = "mean",
    normalize: bool = True,
) -> jax.Array:
    """A vector for each text; with `normalize`, dot products are cosines.

    Args:
      tokens: [B, T] int32, special tokens included.
      mask: [B, T], 1 for a token, 0 for padding on either side; default: all are tokens.
      pooling: "mean", "cls" (the first token) or "last" of a text's hidden states.

    Returns:
      [B, D] float32.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is not one of {', '.join(POOLINGS)}.")
    mask = jnp.ones(tokens.shape, jnp.int32) if mask is None else jnp.asarray(mask, jnp.int32)
    return _embed(cfg, params, jnp.asarray(tokens), mask, pooling, normalize)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _embed(cfg, params, tokens_BT, mask_BT, pooling, normalize):
    positions_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)
    hidden_BTD = apply(cfg, params, Inputs(tokens_BT, positions_BT, mask_BT)).hidden.astype(jnp.float32)
    vectors_BD = POOLINGS[pooling](hidden_BTD, mask_BT)
    if not normalize:
        return vectors_BD
    # The square is bounded, not its root, whose gradient at the zero vector of an empty text is no number.
    square_B1 = jnp.sum(jnp.square(vectors_BD), axis=-1, keepdims=True)
    return vectors_BD / jnp.sqrt(jnp.maximum(square_B1, 1e-24))


def _mean(hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    total_BD = jnp.einsum("BTD,BT->BD", hidden_BTD, mask_BT.astype(jnp.float32))
    return total_BD / jnp.maximum(mask_BT.sum(axis=1, keepdims=True), 1)


def _first(hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    return _at(hidden_BTD, jnp.argmax(mask_BT, axis=1))


def _last(hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    return _at(hidden_BTD, mask_BT.shape[1] - 1 - jnp.argmax(mask_BT[:, ::-1], axis=1))


def _at(hidden_BTD: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(hidden_BTD, index_B[:, None, None], axis=1)[:, 0]


POOLINGS = {"mean": _mean, "cls": _first, "last": _last}

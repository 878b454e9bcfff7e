"""Dispatch of tokens to rows of their experts, and of the outputs back to tokens: gathers in both directions.

Autodiff makes the gradient of a gather a scatter, which on TPUs needs float32 arrays of all rows. Here the rows are a
permutation of the pairs of a token and one of its experts, so the gradient is a gather, too.
"""

# N tokens, K experts of a token, M = N * K rows, D width

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.kernels.derivatives import differentiable


class Places(NamedTuple):
    """A permutation of the pairs n * K + k, and its inverse; int32."""

    pair_M: jax.Array  # of each row
    row_M: jax.Array  # of each pair


def sorted_by(key_M: jax.Array) -> Places:
    """Rows in the order of their pairs' keys."""
    pair_M = jnp.argsort(key_M)
    return Places(pair_M, jnp.argsort(pair_M))


def to_rows(x_ND: jax.Array, places: Places) -> jax.Array:
    """[M, D]: each row's token."""
    forward = lambda x_ND, places: (_to_rows(x_ND, places), places)
    tangent = lambda places, moved: _to_rows(moved[0], places)
    backward = lambda places, d_MD: (_sums_of_tokens(d_MD, places, len(x_ND)), None)
    return differentiable(forward, tangent, backward)(x_ND, places)


def _to_rows(x_ND: jax.Array, places: Places) -> jax.Array:
    return _taken(x_ND, places.pair_M // (len(places.pair_M) // len(x_ND)))


def _sums_of_tokens(d_MD: jax.Array, places: Places, N: int) -> jax.Array:
    return _of_tokens(d_MD, places, N).astype(jnp.float32).sum(1).astype(d_MD.dtype)


def from_rows(y_MD: jax.Array, weights_NK: jax.Array, places: Places) -> jax.Array:
    """[N, D] float32: the weighted sum of each token's rows."""
    return differentiable(_from_rows_forward, _from_rows_tangent, _from_rows_backward)(
        y_MD, weights_NK, places
    )


def _from_rows(y_MD: jax.Array, weights_NK: jax.Array, places: Places) -> jax.Array:
    y_NKD = _of_tokens(y_MD, places, len(weights_NK)).astype(jnp.float32)
    return (y_NKD * weights_NK[..., None]).sum(1)


def _from_rows_forward(y_MD: jax.Array, weights_NK: jax.Array, places: Places):
    return _from_rows(y_MD, weights_NK, places), (y_MD, weights_NK, places)


def _from_rows_tangent(saved, tangents):
    (y_MD, weights_NK, places), (moved_MD, moved_NK, _) = saved, tangents
    return _from_rows(moved_MD, weights_NK, places) + _from_rows(y_MD, moved_NK, places)


def _from_rows_backward(saved, d_ND: jax.Array):
    y_MD, weights_NK, places = saved
    # in the dtype of the rows, so a bfloat16 model also rounds gradients here
    d_MD = to_rows(d_ND.astype(y_MD.dtype), places).astype(jnp.float32)
    dweights_M = (d_MD * y_MD.astype(jnp.float32)).sum(1)
    dy_MD = d_MD * weights_NK.reshape(-1)[places.pair_M][:, None]
    return dy_MD.astype(y_MD.dtype), dweights_M[places.row_M].reshape(weights_NK.shape), None


def _of_tokens(rows_MD: jax.Array, places: Places, N: int) -> jax.Array:
    """[N, K, D]."""
    return _taken(rows_MD, places.row_M).reshape(N, -1, rows_MD.shape[1])


def _taken(rows: jax.Array, places: jax.Array) -> jax.Array:
    return rows.at[places].get(mode="promise_in_bounds")

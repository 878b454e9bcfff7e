"""Tokens to the rows that their experts multiply, and what those found back to the tokens: gathers in both directions.

Left to autodiff, the gradient of a gather is a scatter, which on TPUs adds up in float32 arrays of all rows. Rows are
here a permutation of the pairs of a token and one of its experts, so each direction has the other's places.
"""

# N tokens, K experts of a token, M = N * K rows, D width

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """A permutation of the pairs n * K + k, and its inverse; int32."""

    pair_M: jax.Array  # of each row
    row_M: jax.Array  # of each pair


def sorted_by(key_M: jax.Array) -> Places:
    """Rows in the order of their pairs' keys."""
    pair_M = jnp.argsort(key_M)
    return Places(pair_M, jnp.argsort(pair_M))


@jax.custom_vjp
def to_rows(x_ND: jax.Array, places: Places) -> jax.Array:
    """[M, D]: each row's token."""
    return _taken(x_ND, places.pair_M // (len(places.pair_M) // len(x_ND)))


def _to_rows_forward(x_ND: jax.Array, places: Places):
    return to_rows(x_ND, places), (places, len(x_ND))


def _to_rows_backward(saved, d_MD: jax.Array):
    places, N = saved
    d_NKD = _of_tokens(d_MD, places, N).astype(jnp.float32)
    return d_NKD.sum(1).astype(d_MD.dtype), None


to_rows.defvjp(_to_rows_forward, _to_rows_backward)


@jax.custom_vjp
def from_rows(y_MD: jax.Array, weights_NK: jax.Array, places: Places) -> jax.Array:
    """[N, D] float32: of each token the sum of its rows, by their weights, float32."""
    y_NKD = _of_tokens(y_MD, places, len(weights_NK)).astype(jnp.float32)
    return (y_NKD * weights_NK[..., None]).sum(1)


def _from_rows_forward(y_MD: jax.Array, weights_NK: jax.Array, places: Places):
    return from_rows(y_MD, weights_NK, places), (y_MD, weights_NK, places)


def _from_rows_backward(saved, d_ND: jax.Array):
    y_MD, weights_NK, places = saved
    # to the rows in their own dtype: a model that computes in bfloat16 rounds what is found here, too
    d_MD = to_rows(d_ND.astype(y_MD.dtype), places).astype(jnp.float32)
    dweights_M = (d_MD * y_MD.astype(jnp.float32)).sum(1)
    dy_MD = d_MD * weights_NK.reshape(-1)[places.pair_M][:, None]
    return dy_MD.astype(y_MD.dtype), dweights_M[places.row_M].reshape(weights_NK.shape), None


from_rows.defvjp(_from_rows_forward, _from_rows_backward)


def _of_tokens(rows_MD: jax.Array, places: Places, N: int) -> jax.Array:
    """[N, K, D]."""
    return _taken(rows_MD, places.row_M).reshape(N, -1, rows_MD.shape[1])


def _taken(rows: jax.Array, places: jax.Array) -> jax.Array:
    return rows.at[places].get(mode="promise_in_bounds")

"""Grouped products in plain jnp: the definition, and helpers of implementations."""

# M rows, I inputs, O outputs, E groups

from __future__ import annotations

import jax
import jax.numpy as jnp


def every_product(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Every row times every matrix, with zero weight for other groups."""
    E, M = w_EIO.shape[0], x_MI.shape[0]
    with_rest = jnp.append(sizes_E, M - sizes_E.sum())  # a group without a matrix
    of_group_ME = jax.nn.one_hot(group_of_rows(with_rest, M), E, dtype=x_MI.dtype)
    return jnp.einsum("MI,EIO,ME->MO", x_MI, w_EIO, of_group_ME)


def within_groups(sizes_E: jax.Array, rows_M: jax.Array) -> jax.Array:
    """The rows of groups, and zeros for rows beyond them."""
    return jnp.where(jnp.arange(len(rows_M))[:, None] < sizes_E.sum(), rows_M, 0)


def group_of_rows(sizes_E: jax.Array, length: int) -> jax.Array:
    """The group of each of `length` rows; rows beyond the sizes belong to the last group."""
    return jnp.repeat(jnp.arange(len(sizes_E)), sizes_E, total_repeat_length=length)

"""The places of each row's new tokens among the flat tokens of a call."""

# R rows, T tokens of all rows

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """The consecutive tokens of each row among T."""

    first_R: jax.Array  # the first token
    count_R: jax.Array  # how many; 0: none
    start_R: jax.Array  # the first one's position


def row_of_token(rows: Rows, T: int) -> jax.Array:
    """[T]: the last row that starts at or before each token."""
    return jnp.maximum(jnp.searchsorted(rows.first_R, jnp.arange(T), side="right") - 1, 0)

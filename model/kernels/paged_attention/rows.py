"""Where the new tokens of rows stand among the flat tokens of a call."""

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
    """[T]; the last row that begins at or before it."""
    return jnp.maximum(jnp.searchsorted(rows.first_R, jnp.arange(T), side="right") - 1, 0)

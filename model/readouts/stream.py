"""The residual stream at the points that readouts read."""

# B batch, T tokens, D model width

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax


class Stream(NamedTuple):
    embedded_BTD: jax.Array  # what the first block reads
    before_last: jax.Array  # what the last block reads
    hidden_BTD: jax.Array  # after the final norm
    pooled_BTD: jax.Array | None  # after the pooler, where there is one
    final_norm: Callable[[jax.Array], jax.Array]

"""The hidden states that readouts read."""

# B batch, T tokens, D model width

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax


class HiddenStates(NamedTuple):
    embedded_BTD: jax.Array  # input of the first block
    before_last: jax.Array  # the residual stream that the last block reads
    hidden_BTD: jax.Array  # after the final norm
    pooled_BTD: jax.Array | None  # after the pooler, if there is one
    final_norm: Callable[[jax.Array], jax.Array]

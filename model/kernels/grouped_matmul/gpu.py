"""Grouped products by tokamax, for GPUs first; it has a kernel for TPUs too."""

# M rows, I inputs, O outputs, E groups

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels import libraries
from model.kernels.backend import Backend
from model.kernels.grouped_matmul.reference import within_groups


def tokamax(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, chosen: Backend) -> jax.Array:
    dtype = jnp.result_type(x_MI, w_EIO)
    how = {"implementation": "xla"} if chosen.interpret else {}
    rows_MI = within_groups(sizes_E, x_MI.astype(dtype))
    y_MO = libraries.tokamax().ragged_dot(rows_MI, w_EIO.astype(dtype), sizes_E, **how)
    return within_groups(sizes_E, y_MO.astype(dtype))

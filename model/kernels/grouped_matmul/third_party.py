"""JAX's megablox for TPUs, with our arguments."""

# M rows, I inputs, O outputs, E groups

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.backend import Backend
from model.kernels.grouped_matmul.reference import within_groups

MEGABLOX_TILE = 512  # rows, inputs and outputs


def megablox(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, chosen: Backend) -> jax.Array:
    """jax.experimental.pallas.ops.tpu.megablox; it needs whole tiles of rows and writes no rows beyond the sizes."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    M, dtype = x_MI.shape[0], jnp.result_type(x_MI, w_EIO)
    x_MI = jnp.pad(within_groups(sizes_E, x_MI.astype(dtype)), ((0, -M % MEGABLOX_TILE), (0, 0)))
    tiles = (MEGABLOX_TILE, *(min(MEGABLOX_TILE, size) for size in w_EIO.shape[1:]))
    y_MO = gmm(x_MI, w_EIO.astype(dtype), sizes_E, dtype, tiles, interpret=chosen.interpret)
    return within_groups(sizes_E, y_MO[:M])

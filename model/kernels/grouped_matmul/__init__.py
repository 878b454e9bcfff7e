"""Grouped products: rows sorted into groups, each group times its own matrix, as in a mixture of experts.

`GROUPED_MATMUL` has the implementations; see model.kernels.choice.
"""

# M rows, I inputs, O outputs, E groups

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.choice import Implementation, Operation, Platform
from model.kernels.grouped_matmul.blocks import in_blocks
from model.kernels.grouped_matmul.gpu import tokamax
from model.kernels.grouped_matmul.third_party import megablox


def grouped_matmul(
    x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, transposed: bool = False
) -> jax.Array:
    """[M, O]: the first sizes_E[0] rows of `x` times w_EIO[0], the next sizes_E[1] rows times w_EIO[1], and so on.

    Args:
      sizes_E: int32 with a sum of at most M; rows beyond the sum become zeros.
      transposed: the matrices are [E, O, I], which our kernel reads without a copy.
    """
    chosen = backend.current()
    run = GROUPED_MATMUL.choose(Platform(chosen)).run
    if run is _by_kernel:
        return _by_kernel(x_MI, w_EIO, sizes_E, chosen, transposed)
    return run(x_MI, w_EIO.swapaxes(1, 2) if transposed else w_EIO, sizes_E, chosen)


def _by_kernel(
    x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, chosen: backend.Backend, transposed: bool = False
) -> jax.Array:
    # imported here, because Pallas is slow to import and only needed on TPUs
    from model.kernels.grouped_matmul.tpu import call_for, grouped_product

    dtype = jnp.result_type(x_MI, w_EIO)
    return grouped_product(call_for(chosen, transposed), x_MI.astype(dtype), w_EIO.astype(dtype), sizes_E)


def _in_blocks(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, chosen: backend.Backend) -> jax.Array:
    return in_blocks(x_MI, w_EIO, sizes_E)


def _ragged_dot(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, chosen: backend.Backend) -> jax.Array:
    return jax.lax.ragged_dot(x_MI, w_EIO, sizes_E)


_EVERYWHERE = ("plain", "gpu", "tpu")
GROUPED_MATMUL = Operation(
    "grouped",
    {
        "blocks": Implementation(_EVERYWHERE, _in_blocks),
        "ragged_dot": Implementation(_EVERYWHERE, _ragged_dot),
        "kernel": Implementation(("tpu",), _by_kernel),
        "megablox": Implementation(("tpu",), megablox),
        "tokamax": Implementation(("gpu", "tpu"), tokamax),
    },
    preferred={"cpu": ("blocks",), "plain": ("ragged_dot",), "gpu": ("ragged_dot",), "tpu": ("kernel",)},
)

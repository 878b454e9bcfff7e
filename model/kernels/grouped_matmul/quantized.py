"""Grouped products with matrices of 8 bits, for serving: int8 or float8_e4m3fn, one scale an output.

Only the matrices are rounded. Decoding is bound by reading them, so half the bytes take about half the time. Rows of 8
bits would add rounding and help only long prompts on chips with faster 8-bit products. Weights of 8 bits with a scale a
column: LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, section 2.
"""

# M rows, I inputs, O outputs, E groups

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.choice import Implementation, Operation, Platform
from model.kernels.grouped_matmul import grouped_matmul

LARGEST = {jnp.dtype("int8"): 127.0, jnp.dtype("float8_e4m3fn"): 448.0}


def quantize_matrices(w_EIO: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """(w of 8 bits [E, I, O], scales [E, O] float32); their product approximates `w`."""
    w_EIO, largest = w_EIO.astype(jnp.float32), LARGEST[_checked(jnp.dtype(dtype))]
    scales_EO = jnp.max(jnp.abs(w_EIO), axis=1) / largest
    scaled_EIO = w_EIO / jnp.where(scales_EO == 0, 1, scales_EO)[:, None]
    return (jnp.round(scaled_EIO) if dtype == jnp.int8 else scaled_EIO).astype(dtype), scales_EO


def quantized_grouped_matmul(
    x_MI: jax.Array, w_EIO: jax.Array, scales_EO: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """`grouped_matmul` of w_EIO * scales_EO, [M, O] in the dtype of `x`; forward only.

    Args:
      w_EIO, scales_EO: the results of `quantize_matrices`.
    """
    _checked(w_EIO.dtype)
    chosen = backend.current()
    return QUANTIZED_GROUPED_MATMUL.choose(Platform(chosen)).run(x_MI, w_EIO, scales_EO, sizes_E, chosen)


def _plain(x_MI, w_EIO, scales_EO, sizes_E, chosen: backend.Backend) -> jax.Array:
    exact_EIO = (w_EIO.astype(jnp.float32) * scales_EO[:, None]).astype(x_MI.dtype)
    return grouped_matmul(x_MI, exact_EIO, sizes_E)


def _by_kernel(x_MI, w_EIO, scales_EO, sizes_E, chosen: backend.Backend) -> jax.Array:
    # imported here, because Pallas is slow to import and only needed on TPUs
    from model.kernels.grouped_matmul.tpu import call_for, quantized_product

    return quantized_product(call_for(chosen), x_MI, w_EIO, scales_EO, sizes_E)


QUANTIZED_GROUPED_MATMUL = Operation(
    "quantized_grouped",
    {
        "plain": Implementation(("plain", "gpu", "tpu"), _plain),
        "kernel": Implementation(("tpu",), _by_kernel),
    },
    preferred={"plain": ("plain",), "gpu": ("plain",), "tpu": ("kernel",)},
)


def _checked(dtype: jnp.dtype) -> jnp.dtype:
    if dtype not in LARGEST:
        known = ", ".join(str(known) for known in LARGEST)
        raise ValueError(f"matrices of {dtype} are not of 8 bits. Use one of {known}.")
    return dtype

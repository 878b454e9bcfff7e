"""Products with rounded matrices: int8, int4, MXFP4 and fp8, with scales by blocks of inputs, and fp8 with fp8.

Decoding is bounded by reading the matrices, so a quarter of the bytes is about a quarter of the time. The kernel widens
what it reads in fast memory, never in the chip's main memory. `QUANTIZED_MATMUL` has the implementations.
"""

# M rows, I inputs, O outputs

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.choice import Implementation, Operation, Platform
from model.kernels.quantized_matmul.formats import QuantizedMatrix, dequantize
from model.kernels.quantized_matmul.reference import widened_whole


def quantized_matmul(x_MI: jax.Array, w: QuantizedMatrix, round_rows: bool = False) -> jax.Array:
    """x times the matrix, [M, O] in the dtype of `x`, added up in float32; with a gradient for `x` alone.

    Args:
      round_rows: rows are rounded to fp8 too, each of its blocks by its own scale, and multiplied as fp8 where the
        chip does that (tpu7x); w must be fp8.

    Raises:
      ValueError: shapes that do not fit, or rows to be rounded beside a matrix that is not fp8.
    """
    if x_MI.shape[1] != w.values_IO.shape[0]:
        raise ValueError(f"rows of {x_MI.shape[1]} do not fit a matrix of {w.values_IO.shape[0]} inputs.")
    if round_rows and w.kind != "fp8":
        raise ValueError(f"rows are rounded to fp8 beside a matrix of fp8; this one is {w.kind}.")
    chosen = backend.current()
    return QUANTIZED_MATMUL.choose(Platform(chosen)).run(x_MI, w, round_rows, chosen)


def _plain(x_MI: jax.Array, w: QuantizedMatrix, round_rows: bool, chosen: backend.Backend) -> jax.Array:
    return widened_whole(x_MI, w, round_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_kernel(x_MI: jax.Array, w: QuantizedMatrix, round_rows: bool, chosen: backend.Backend) -> jax.Array:
    # here, since Pallas takes long to import and is wanted on TPUs alone
    from model.kernels.quantized_matmul.tpu import product, tiles_for

    w = dataclasses.replace(w, scales_NO=w.scales_NO.astype(jnp.float32))
    if w.offsets_NO is None:
        return product(tiles_for(chosen), x_MI, w, round_rows)
    # (value + 8) * scale + offset: the kernel multiplies what is stored, and the rest is one number a block
    rest_NO = w.offsets_NO.astype(jnp.float32) + 8 * w.scales_NO
    sums_MN = x_MI.astype(jnp.float32).reshape(len(x_MI), -1, w.block).sum(-1)
    signed = QuantizedMatrix(w.values_IO, w.scales_NO, "int4")
    y_MO = product(tiles_for(chosen), x_MI, signed, round_rows).astype(jnp.float32)
    return (y_MO + jax.lax.dot(sums_MN, rest_NO, precision="highest")).astype(x_MI.dtype)


def _forward(x_MI: jax.Array, w: QuantizedMatrix, round_rows: bool, chosen: backend.Backend):
    return _by_kernel(x_MI, w, round_rows, chosen), w


def _backward(round_rows: bool, chosen: backend.Backend, w: QuantizedMatrix, d_MO: jax.Array):
    """Of x alone, as if its rows had not been rounded; the matrix is widened whole."""
    wide_IO = dequantize(w).astype(d_MO.dtype)
    return jax.lax.dot(d_MO, wide_IO.T, preferred_element_type=jnp.float32).astype(d_MO.dtype), None


_by_kernel.defvjp(_forward, _backward)


QUANTIZED_MATMUL = Operation(
    "quantized",
    {
        "plain": Implementation(("plain", "gpu", "tpu"), _plain),
        "kernel": Implementation(("tpu",), _by_kernel),
    },
    preferred={"plain": ("plain",), "gpu": ("plain",), "tpu": ("kernel",)},
)

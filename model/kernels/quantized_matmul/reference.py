"""The product with a quantized matrix in plain jnp: the definition."""

# M rows, I inputs, O outputs, N blocks of inputs, B inputs of a block

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.quantized_matmul.formats import QuantizedMatrix, dequantize, quantize_rows


def widened_whole(x_MI: jax.Array, w: QuantizedMatrix, round_rows: bool = False) -> jax.Array:
    """`quantized_matmul` in plain jnp, with the whole matrix dequantized."""
    wide_IO = dequantize(w)
    if round_rows:
        values_MI, scales_MN = quantize_rows(x_MI, w.block)
        x_MNB = values_MI.astype(jnp.float32).reshape(x_MI.shape[0], -1, w.block) * scales_MN[..., None]
        return (x_MNB.reshape(x_MI.shape) @ wide_IO).astype(x_MI.dtype)
    product = jax.lax.dot(x_MI, wide_IO.astype(x_MI.dtype), preferred_element_type=jnp.float32)
    return product.astype(x_MI.dtype)

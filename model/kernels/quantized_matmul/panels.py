"""Rounded matrices in the order in which a CPU reads them, and their product: see native/panels.cc.

Decoding on a CPU is bounded by reading the weights, so they stay packed in memory: 4 bits a value are two values a
byte. A product widens each value in registers and sums it up in the order of the inputs. So the bits of a row's result
depend neither on the other rows nor on the number of threads.
"""

# M rows, I inputs, O outputs, P panels, W outputs of a panel, N blocks of inputs, B inputs of a block, Z bytes

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct

from model.kernels.quantized_matmul.formats import Kind, QuantizedMatrix, widen

WIDTH = 32
BITS = {"int8": 8, "int4": 4, "uint4": 4, "mxfp4": 4, "nf4": 4, "bfloat16": 16}


@struct.dataclass
class Panels:
    """A matrix [I, O], in panels of 32 outputs. Axes before are allowed, such as that of layers."""

    values_PZ: jax.Array  # uint8: of a panel the inputs in order, of each input its 32 outputs
    scales_PNW: jax.Array  # float32 or float16; [0] for bfloat16
    offsets_PNW: jax.Array  # the same, or [0]: none
    kind: str = struct.field(pytree_node=False)
    outputs: int = struct.field(pytree_node=False)

    @property
    def inputs(self) -> int:
        return self.values_PZ.shape[-1] * 8 // BITS[self.kind] // WIDTH

    @property
    def nbytes(self) -> int:
        return self.values_PZ.nbytes + self.scales_PNW.nbytes + self.offsets_PNW.nbytes


def refusal(inputs: int, blocks: int, kind: str) -> str | None:
    """Why a matrix can't be in panels, as a clause; None: it can."""
    if kind not in BITS:
        return f"there are no panels of {kind}"
    if inputs % 2 or inputs % blocks or inputs // blocks % 2:
        return f"{inputs} inputs in {blocks} blocks are no pairs of inputs"
    return None


def pack(w: QuantizedMatrix) -> Panels:
    """A rounded matrix in panels. Scales of float16 stay so, others are float32."""
    (I, O), N = w.values_IO.shape, w.scales_NO.shape[0]
    if reason := refusal(I, N, w.kind):
        raise ValueError(f"this matrix can't be in panels: {reason}.")
    values_PIW = _in_panels(np.asarray(w.values_IO).astype(np.int8))
    if BITS[w.kind] == 4:
        nibbles = values_PIW.view(np.uint8) & 15
        values_PIW = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    dtype = np.float16 if w.scales_NO.dtype == jnp.float16 else np.float32
    scales, offsets = (
        np.zeros(0, dtype) if array is None else _in_panels(np.asarray(array, dtype))
        for array in (w.scales_NO, w.offsets_NO)
    )
    return Panels(jnp.asarray(_bytes(values_PIW)), jnp.asarray(scales), jnp.asarray(offsets), w.kind, O)


def pack_bfloat16(w_IO: jax.Array) -> Panels:
    """A matrix in bfloat16 as panels, without scales."""
    values_PIW = _in_panels(np.asarray(w_IO).astype(ml_dtypes.bfloat16).view(np.uint16))
    none = jnp.zeros(0, jnp.float32)
    return Panels(jnp.asarray(_bytes(values_PIW)), none, none, "bfloat16", w_IO.shape[1])


def product(x_MI: jax.Array, w: Panels) -> jax.Array:
    """x times the matrix, [M, O] in the dtype of x. Call it for CPUs only, where `native.missing()` is None."""
    result = jax.ShapeDtypeStruct((x_MI.shape[0], w.values_PZ.shape[0] * WIDTH), jnp.float32)
    call = jax.ffi.ffi_call("crucible_panels", result)
    table = jnp.asarray(_table(w.kind))
    y_MO = call(
        x_MI.astype(jnp.float32), w.values_PZ, w.scales_PNW, w.offsets_PNW, table, bits=np.int64(BITS[w.kind])
    )
    return y_MO[:, : w.outputs].astype(x_MI.dtype)


def widened(w: Panels) -> jax.Array:
    """What the matrix stands for, float32 [I, O]."""
    wide_PIW = _widen(w, w.values_PZ.reshape(*w.values_PZ.shape[:-1], -1, WIDTH))
    return wide_PIW.swapaxes(0, 1).reshape(w.inputs, -1)[:, : w.outputs]


def columns(w: Panels, output: jax.Array) -> jax.Array:
    """The inputs of some outputs, float32: indices [...] to [..., I]."""
    panel, place = output // WIDTH, output % WIDTH
    pick = lambda x: jnp.take_along_axis(
        jnp.take(x, panel, axis=0), place[..., None, None], axis=-1
    )  # [..., n, 1]
    kept = dataclasses.replace(
        w,
        scales_PNW=pick(w.scales_PNW) if w.scales_PNW.size else w.scales_PNW,
        offsets_PNW=pick(w.offsets_PNW) if w.offsets_PNW.size else w.offsets_PNW,
    )
    values = w.values_PZ
    if w.kind == "bfloat16":
        values = jax.lax.bitcast_convert_type(values.reshape(len(values), -1, 2), jnp.uint16)
    return _widen(kept, pick(values.reshape(len(values), -1, WIDTH)))[..., 0]


def _widen(w: Panels, values: jax.Array) -> jax.Array:
    """Stored values [..., pairs or inputs, outputs] as float32 [..., I, outputs]."""
    if w.kind == "bfloat16":
        if values.dtype == jnp.uint8:
            values = jax.lax.bitcast_convert_type(
                values.reshape(*values.shape[:-2], -1, WIDTH, 2), jnp.uint16
            )
        return jax.lax.bitcast_convert_type(values.astype(jnp.uint32) << 16, jnp.float32)
    if BITS[w.kind] == 4:
        nibbles = jnp.stack([values & 15, values >> 4], axis=-2)  # [..., pairs, 2, outputs]
        wide = jnp.asarray(_table(w.kind))[nibbles.reshape(*values.shape[:-2], -1, values.shape[-1])]
    else:
        wide = values.astype(jnp.int8).astype(jnp.float32)
    *lead, I, O = wide.shape
    wide = (
        wide.reshape(*lead, -1, I // w.scales_PNW.shape[-2], O)
        * w.scales_PNW.astype(jnp.float32)[..., None, :]
    )
    if w.offsets_PNW.size:
        wide += w.offsets_PNW.astype(jnp.float32)[..., None, :]
    return wide.reshape(*lead, I, O)


def _in_panels(array_IO: np.ndarray) -> np.ndarray:
    """[I, O] to [P, I, W], with zeros where the last panel has no output."""
    I, O = array_IO.shape
    padded = np.pad(array_IO, ((0, 0), (0, -O % WIDTH)))
    return np.ascontiguousarray(padded.reshape(I, -1, WIDTH).swapaxes(0, 1))


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def _table(kind: str) -> np.ndarray:
    """What the 16 values of 4 bits stand for, float32; zeros for other kinds."""
    if BITS[kind] != 4:
        return np.zeros(16, np.float32)
    codes = np.arange(16, dtype=np.uint8)
    with jax.ensure_compile_time_eval():
        return np.asarray(
            widen(jnp.asarray(np.where(codes < 8, codes, codes.astype(int) - 16)), cast(Kind, kind))
        )

"""How rounded matrices are stored: values of few bits, and a scale for each block of inputs of an output.

Block scales: Frantar et al. 2023, arXiv:2210.17323 (int4 by 128); OCP Microscaling Formats 1.0, 2023 (MXFP4: values of
e2m1, 32 to a power of two); DeepSeek-V3, arXiv:2412.19437, section 3.3 (fp8 by 128, rows rounded as they come); QLoRA,
Dettmers et al. 2023, arXiv:2305.14314 (NF4 by 64).
"""

# M rows, I inputs, O outputs, N blocks of inputs, B inputs of a block

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import struct

Kind = Literal["int8", "int4", "uint4", "mxfp4", "nf4", "fp8"]


class Format(NamedTuple):
    """How a kind is stored: the dtype of its values, the largest of them, and the inputs of a block unless one says."""

    dtype: jnp.dtype
    largest: float
    block: int


FORMATS: dict[str, Format] = {
    "int8": Format(jnp.dtype(jnp.int8), 127.0, 128),
    "int4": Format(jnp.dtype(jnp.int4), 7.0, 128),
    "uint4": Format(jnp.dtype(jnp.int4), 15.0, 32),  # the number 0 to 15, less 8; blocks have an offset too
    "mxfp4": Format(
        jnp.dtype(jnp.int4), 6.0, 32
    ),  # codes of e2m1: a sign, two bits of exponent, one of mantissa
    "nf4": Format(jnp.dtype(jnp.int4), 1.0, 64),  # the number of a level, less 8
    "fp8": Format(jnp.dtype(jnp.float8_e4m3fn), 448.0, 128),
}
# Levels of nf4: quantiles of the normal distribution, with one at 0 and the outermost at 1 (appendix E of QLoRA).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; the codes below 0 are their negatives


@struct.dataclass
class QuantizedMatrix:
    """A matrix [I, O] as `quantize` rounds it. Value times scale of its block is what it stands for."""

    values_IO: jax.Array  # of the format's dtype
    scales_NO: jax.Array  # float32 or float16, of mxfp4 powers of two
    kind: Kind = struct.field(pytree_node=False)
    offsets_NO: jax.Array | None = None  # float32, of uint4: value times scale plus offset

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.values_IO.shape[0] // self.scales_NO.shape[0]


def quantize(w_IO: jax.Array, kind: Kind, block: int | None = None) -> QuantizedMatrix:
    """Rounds a matrix to the nearest values of its kind, each block of inputs by its own scale.

    Args:
      block: inputs that share a scale; None: the format's. It must divide I; I itself is one scale an output.

    Raises:
      ValueError: an unknown kind, or a block that does not divide I.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind={kind!r} is no format of matrices. Use one of {', '.join(FORMATS)}.")
    form, (I, O) = FORMATS[kind], w_IO.shape
    block = block or form.block
    if I % block:
        raise ValueError(f"blocks of {block} do not divide {I} inputs. Use a block that does, e.g. {I}.")
    w_NBO = w_IO.astype(jnp.float32).reshape(I // block, block, O)
    if kind == "uint4":
        least_NO = jnp.min(w_NBO, axis=1)
        scales_NO = (jnp.max(w_NBO, axis=1) - least_NO) / form.largest
        steps_NBO = (w_NBO - least_NO[:, None]) / jnp.where(scales_NO == 0, 1, scales_NO)[:, None]
        values_IO = (jnp.round(steps_NBO) - 8).astype(form.dtype).reshape(I, O)
        return QuantizedMatrix(values_IO, scales_NO, kind, least_NO)
    most_NO = jnp.max(jnp.abs(w_NBO), axis=1)
    scales_NO = _power_of_two(most_NO) if kind == "mxfp4" else most_NO / form.largest
    scaled_NBO = w_NBO / jnp.where(scales_NO == 0, 1, scales_NO)[:, None]
    values_IO = _ROUND[kind](scaled_NBO).astype(form.dtype).reshape(I, O)
    return QuantizedMatrix(values_IO, scales_NO, kind)


def dequantize(w: QuantizedMatrix) -> jax.Array:
    """What it stands for, float32 [I, O]."""
    I, O = w.values_IO.shape
    wide_NBO = widen(w.values_IO, w.kind).reshape(-1, w.block, O) * w.scales_NO[:, None].astype(jnp.float32)
    if w.offsets_NO is not None:
        wide_NBO += w.offsets_NO[:, None].astype(jnp.float32)
    return wide_NBO.reshape(I, O)


def quantize_rows(x_MI: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """(fp8 values [M, I], scales [M, N] float32) of rows, each block of inputs by its own scale."""
    x_MNB = x_MI.astype(jnp.float32).reshape(x_MI.shape[0], -1, block)
    values_MNB, scales_MN1 = round_block(x_MNB)
    return values_MNB.reshape(x_MI.shape), scales_MN1[..., 0]


def round_block(x_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(fp8 values [..., B], scale [..., 1] float32) of blocks of inputs, float32."""
    form = FORMATS["fp8"]
    scale_1 = jnp.max(jnp.abs(x_B), axis=-1, keepdims=True) / form.largest
    return (x_B / jnp.where(scale_1 == 0, 1, scale_1)).astype(form.dtype), scale_1


def widen(values: jax.Array, kind: Kind) -> jax.Array:
    """Values as float32; the codes of mxfp4 and nf4 by arithmetic alone, as a kernel does it."""
    if kind == "nf4":
        level = values.astype(jnp.int32) + 8
        nearest = functools.reduce(lambda wide, i: jnp.where(level == i, NF4[i], wide), range(1, 16), NF4[0])
        return cast(jax.Array, nearest)
    if kind == "uint4":
        return values.astype(jnp.float32) + 8
    if kind != "mxfp4":
        return values.astype(jnp.float32)
    code = values.astype(jnp.int32)
    size = jnp.where(code < 0, code + 8, code)  # a code below 0 has the sign bit set: -8 is -0
    halves = jnp.where(size < 2, size, (2 + (size & 1)) << (jnp.maximum(size >> 1, 1) - 1))
    return jnp.where(code < 0, -0.5, 0.5) * halves.astype(jnp.float32)


def _power_of_two(most: jax.Array) -> jax.Array:
    """The scale of a block of mxfp4: the largest power of two that keeps the block's largest value at 4 or above."""
    # from the bits, because JAX's logarithms of powers of two are not exact
    _, exponent = jnp.frexp(jnp.maximum(most, 2.0**-126))
    return jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - 3, -126))


def _to_e2m1(scaled: jax.Array) -> jax.Array:
    """Codes -8 to 7 of the nearest values; ties go to the even mantissa."""
    size = jnp.abs(scaled)
    middles = jnp.asarray([(a + b) / 2 for a, b in zip(E2M1, E2M1[1:])])
    above = jnp.sum(size[..., None] > middles, axis=-1)
    tied = jnp.any(size[..., None] == middles, axis=-1)  # at a middle, `above` is the lower one
    code = above + (tied & (above % 2 == 1))
    return jnp.where(jnp.signbit(scaled) & (code > 0), code - 8, code)


def _to_nf4(scaled: jax.Array) -> jax.Array:
    """Codes -8 to 7 of the nearest levels; at a middle the lower one."""
    middles = jnp.asarray([(a + b) / 2 for a, b in zip(NF4, NF4[1:])])
    return jnp.sum(scaled[..., None] > middles, axis=-1) - 8


_ROUND = {
    "int8": jnp.round,
    "int4": jnp.round,
    "mxfp4": _to_e2m1,
    "nf4": _to_nf4,
    "fp8": lambda scaled: scaled,
}

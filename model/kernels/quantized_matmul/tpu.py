"""The product with a quantized matrix for TPUs: blocks of it are dequantized in fast memory and multiplied there.

A scale for all inputs of a step multiplies the step's sum; other scales multiply the values.
"""

# M rows, I inputs, O outputs, N blocks of inputs; R rows, X inputs, Y outputs of a step, n blocks of it

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.backend import Backend
from model.kernels.quantized_matmul.formats import FORMATS, QuantizedMatrix, round_block, widen


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """Sizes of a step.

    With few rows a step mainly reads X * Y values, so it should be large enough to hide the start of a copy (about 2000
    cycles). In float32 it must fit the 16 MiB of every chip: 1024 x 512 are 2 MiB, with several temporaries.
    """

    rows: int = 256
    inputs: int = 1024
    outputs: int = 512
    memory: int | None = None  # bytes; None: the chip's default
    fp8: bool = False  # whether the chip multiplies fp8
    interpret: bool = False


# v6e has 128 MiB and tpu7x 64 MiB of it, and more multipliers to a byte of main memory: more rows for each byte read.
TILE_SIZES = {
    "v4": TileSizes(),
    "v5e": TileSizes(),
    "v5p": TileSizes(),
    "v6e": TileSizes(rows=512, memory=64 << 20),
    "tpu7x": TileSizes(rows=512, memory=32 << 20, fp8=True),
}


def tiles_for(chosen: Backend) -> TileSizes:
    return dataclasses.replace(chosen.of_chip(TILE_SIZES, TileSizes()), interpret=chosen.interpret)


def product(tiles: TileSizes, x_MI: jax.Array, w: QuantizedMatrix, round_rows: bool) -> jax.Array:
    """[M, O] in the dtype of `x`."""
    (M, I), O, block = x_MI.shape, w.values_IO.shape[1], w.block
    R, X, Y = _fitted(tiles, M, I, O, block)
    n, N = max(X // block, 1), I // block  # scales of a step, and of all inputs
    rows = pl.cdiv(M, R) * R
    x_MI = jnp.pad(x_MI, ((0, rows - M), (0, 0)))
    in_specs = [
        pl.BlockSpec((R, X), lambda r, y, step: (r, step)),
        pl.BlockSpec((X, Y), lambda r, y, step: (step, y)),
    ]
    operands = [x_MI, w.values_IO]
    if n % 8 == 0 or n == N:  # rows of a tile; a scale a tile would take eight times the memory
        in_specs.append(pl.BlockSpec((n, Y), lambda r, y, step: (step, y)))
        operands.append(w.scales_NO)
    else:
        of_step = lambda step: jax.lax.div(step, jnp.int32(max(block // X, 1)))
        in_specs.append(pl.BlockSpec((n, 1, Y), lambda r, y, step: (of_step(step), 0, y)))
        operands.append(w.scales_NO[:, None])
    if round_rows:
        operands[0], scales_MN = _rounded(tiles, x_MI, block)
        in_specs.append(pl.BlockSpec((R, N), lambda r, y, step: (r, 0)))
        operands.append(scales_MN)
    if round_rows:
        kernel = functools.partial(_rounded_rows_kernel, tiles, n, max(block // X, 1))
    else:
        kernel = functools.partial(_kernel, w.kind, n)
    result = pl.pallas_call(
        kernel,
        grid=(rows // R, pl.cdiv(O, Y), I // X),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((R, Y), lambda r, y, step: (r, y)),
        out_shape=jax.ShapeDtypeStruct((rows, O), x_MI.dtype),
        scratch_shapes=[pltpu.VMEM((R, Y), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tiles.memory
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * I * O,
            bytes_accessed=x_MI.nbytes * pl.cdiv(O, Y)
            + rows // R * (_bytes(w.values_IO) + w.scales_NO.nbytes)
            + rows * O * x_MI.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=tiles.interpret,
        name=f"quantized_matmul_{w.kind}",
    )(*operands)
    return result[:M]


def _rounded(tiles: TileSizes, x_MI: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """`quantize_rows` in one pass: the compiler's version stores the rows in float32 up to twice."""
    (M, I), N = x_MI.shape, x_MI.shape[1] // block
    R = max(32, min(M, (1 << 20) // I // 32 * 32))  # 4 MiB of rows in float32; fp8 has tiles of 32 rows
    return pl.pallas_call(
        functools.partial(_round_kernel, block),
        grid=(pl.cdiv(M, R),),
        in_specs=[pl.BlockSpec((R, I), lambda r: (r, 0))],
        out_specs=[pl.BlockSpec((R, I), lambda r: (r, 0)), pl.BlockSpec((R, N), lambda r: (r, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((M, I), FORMATS["fp8"].dtype),
            jax.ShapeDtypeStruct((M, N), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tiles.memory
        ),
        interpret=tiles.interpret,
        name="round_rows_fp8",
    )(x_MI)


def _round_kernel(block: int, x_RI, values_RI, scales_RN):
    number_RN = jax.lax.broadcasted_iota(jnp.int32, scales_RN.shape, 1)
    known_RN = jnp.zeros(scales_RN.shape, jnp.float32)
    for i in range(
        scales_RN.shape[1]
    ):  # unrolled, because a dynamic slice must start at a multiple of the lanes
        inputs = slice(i * block, (i + 1) * block)
        values_RI[:, inputs], scale_R1 = round_block(x_RI[:, inputs].astype(jnp.float32))
        known_RN = jnp.where(number_RN == i, scale_R1, known_RN)
    scales_RN[...] = known_RN


def _kernel(kind, n: int, x_RX, w_XY, scales, y_RY, sum_RY):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def begin():
        sum_RY[...] = jnp.zeros_like(sum_RY)

    wide_XY = widen(w_XY[...], kind)
    X, Y = wide_XY.shape
    scales_n1Y = scales[...].reshape(n, 1, Y)
    if n == 1:
        sum_RY[...] += _dot(x_RX[...], wide_XY.astype(x_RX.dtype)) * scales_n1Y[0]
    else:
        wide_XY = (wide_XY.reshape(n, X // n, Y) * scales_n1Y).reshape(X, Y)
        sum_RY[...] += _dot(x_RX[...], wide_XY.astype(x_RX.dtype))

    @pl.when(step == pl.num_programs(2) - 1)
    def store():
        y_RY[...] = sum_RY[...].astype(y_RY.dtype)


def _rounded_rows_kernel(
    tiles: TileSizes, n: int, steps_a_scale: int, x_RX, w_XY, scales, row_scales_RN, y_RY, sum_RY
):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def begin():
        sum_RY[...] = jnp.zeros_like(sum_RY)

    X, Y = x_RX.shape[1] // n, w_XY.shape[1]
    scales_n1Y = scales[...].reshape(n, 1, Y)
    first = step * n if steps_a_scale == 1 else jax.lax.div(step, jnp.int32(steps_a_scale))
    number_RN = jax.lax.broadcasted_iota(jnp.int32, row_scales_RN.shape, 1)
    for i in range(n):
        x, w = x_RX[:, i * X : (i + 1) * X], w_XY[i * X : (i + 1) * X]
        if not tiles.fp8:  # bfloat16 has all values of e4m3
            x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        mine_RN = jnp.where(number_RN == first + i, row_scales_RN[...], 0.0)
        sum_RY[...] += _dot(x, w) * jnp.sum(mine_RN, axis=1, keepdims=True) * scales_n1Y[i]

    @pl.when(step == pl.num_programs(2) - 1)
    def store():
        y_RY[...] = sum_RY[...].astype(y_RY.dtype)


def _dot(x_RX: jax.Array, w_XY: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x_RX, w_XY, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _fitted(tiles: TileSizes, M: int, I: int, O: int, block: int) -> tuple[int, int, int]:
    """Sizes for this product: at most its rows, and inputs in whole blocks or whole parts of a block."""
    rows = min(tiles.rows, pl.cdiv(M, 32) * 32)
    outputs = min(tiles.outputs, pl.cdiv(O, 128) * 128)
    inputs = next((x for x in range(tiles.inputs, 0, -128) if I % x == 0 and _whole(x, block)), I)
    return rows, inputs, outputs


def _whole(inputs: int, block: int) -> bool:
    return inputs % block == 0 or block % inputs == 0


def _bytes(values: jax.Array) -> int:
    return values.size // 2 if values.dtype == jnp.int4 else values.nbytes

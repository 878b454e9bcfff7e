"""Grouped products for TPUs: rows sorted into groups, a matrix for each group, none of them padded or gathered.

Gale et al. 2022, arXiv:2211.15841. `jax.experimental.pallas.ops.tpu.
megablox` is such a kernel too. Beyond it: the rows need not be a multiple of a tile; rows beyond all groups are written
as zeros, in the same pass and without reading a matrix; of a tile that groups share, each computes only the parts that
hold rows of it (megablox: the whole tile, once for each of them), which counts where groups are shorter than tiles; a
tile of one group is not masked; and matrices may be of 8 bits.
"""

# M rows, I inputs, O outputs, E groups, V visits, R rows of a tile; X inputs and Y outputs of a block

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.backend import Backend
from model.kernels.grouped_matmul.tpu_visits import (
    StepSizes,
    TileSizes,
    Visits,
    parts_of_visit,
    rows_of_visit,
    visits_of,
)

# Sizes by chip. A step multiplies R x X with X x Y; it reads X * (R + Y) numbers, so it has R * Y / (R + Y) flops for a
# byte of bfloat16, which must be more than the chip has for a byte of its memory (v4 229, v5e 240, v5p 166, v6e 560,
# tpu7x 312): 512 x 1024 have 341, 1024 x 1024 have 512, 1024 x 2048 have 683. The gradient of the matrices has
# X * Y / (X + Y), not fewer. The first fit the 16 MiB that every chip gives; v6e has 128 MiB and tpu7x 64 MiB.
TILE_SIZES = {
    "v4": TileSizes(512, 1024, 1024),
    "v5e": TileSizes(512, 1024, 1024),
    "v5p": TileSizes(512, 1024, 1024),
    "v6e": TileSizes(1024, 1024, 2048, memory=64 << 20),
    "tpu7x": TileSizes(1024, 1024, 1024, memory=32 << 20),
}


@dataclasses.dataclass(frozen=True)
class GroupedCall:
    """The static arguments of a grouped product."""

    tiles: TileSizes = TileSizes()
    interpret: bool = False
    transposed: bool = False  # the matrices are [E, O, I] and are read as they are

    def flipped(self) -> GroupedCall:
        return dataclasses.replace(self, transposed=not self.transposed)


def call_for(chosen: Backend, transposed: bool = False) -> GroupedCall:
    return GroupedCall(chosen.of_chip(TILE_SIZES, TileSizes()), chosen.interpret, transposed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_product(call: GroupedCall, x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """[M, O] in the dtype of `x`, which is that of `w`; rows beyond the sizes' sum are zeros."""
    return products(call, x_MI, w_EIO, sizes_E)


def _forward(call: GroupedCall, x_MI, w_EIO, sizes_E):
    return products(call, x_MI, w_EIO, sizes_E), (x_MI, w_EIO, sizes_E)


def _backward(call: GroupedCall, saved, dy_MO):
    x_MI, w_EIO, sizes_E = saved
    dx_MI = products(call.flipped(), dy_MO, w_EIO, sizes_E)
    factors = (dy_MO, x_MI) if call.transposed else (x_MI, dy_MO)
    return dx_MI, matrix_gradients(call, *factors, sizes_E), None


grouped_product.defvjp(_forward, _backward)


def quantized_product(
    call: GroupedCall, x_MI: jax.Array, w_EIO: jax.Array, scales_EO: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """[M, O] in the dtype of `x`, of matrices that are `w` times the scales of their columns; it has no gradient."""
    # widening a block takes instructions by its size, and more of them take minutes to compile
    tiles = dataclasses.replace(call.tiles, outputs=min(call.tiles.outputs, 1024))
    return products(dataclasses.replace(call, tiles=tiles), x_MI, w_EIO, sizes_E, scales_EO)


def products(
    call: GroupedCall,
    x_MI: jax.Array,
    w_EIO: jax.Array,
    sizes_E: jax.Array,
    scales_EO: jax.Array | None = None,
) -> jax.Array:
    """Each row times its group's matrix, [M, O] in the dtype of `x`, added up in float32.

    Args:
      w_EIO: of the dtype of `x`, or of fewer bits: then it is widened in fast memory; [E, O, I] if `call.transposed`.
      scales_EO: what a column of a matrix is to be multiplied with.
    """
    transposed = call.transposed
    (M, I), O = x_MI.shape, w_EIO.shape[1 if transposed else 2]
    tiles = call.tiles.fitted(M, I, O, x_MI.dtype.itemsize)
    R, X, Y = tiles.rows, tiles.inputs, tiles.outputs
    visits, num_visits = visits_of(sizes_E, M, R, of_all_groups=False)
    steps, last_group = pl.cdiv(I, X), len(sizes_E) - 1

    def of_rows(y, v, step, *refs):
        visits = Visits(*refs)
        idle = visits.group[v] > last_group
        tile = jnp.minimum(visits.tile[v], visits.last_tile[0])
        return tile, jnp.where(idle, steps - 1, step)

    def of_matrices(y, v, step, *refs):
        group = Visits(*refs).group[v]
        step = jnp.where(group > last_group, steps - 1, step)
        return jnp.minimum(group, last_group), *((y, step) if transposed else (step, y))

    def of_scales(y, v, step, *refs):
        return jnp.minimum(Visits(*refs).group[v], last_group), 0, y

    return pl.pallas_call(
        functools.partial(_product_kernel, tiles, I, transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(O, Y), num_visits, steps),
            in_specs=[
                pl.BlockSpec((R, X), of_rows),
                pl.BlockSpec((None, Y, X) if transposed else (None, X, Y), of_matrices),
                None if scales_EO is None else pl.BlockSpec((None, 1, Y), of_scales),
            ],
            out_specs=pl.BlockSpec((R, Y), lambda y, v, step, *refs: (Visits(*refs).tile[v], y)),
            scratch_shapes=[pltpu.VMEM((R, Y), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((M, O), x_MI.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=call.tiles.memory
        ),
        cost_estimate=_cost(M, I, O, x_MI.nbytes * pl.cdiv(O, Y) + w_EIO.nbytes, x_MI.dtype.itemsize * M * O),
        interpret=call.interpret,
        name="grouped_products",
    )(*visits, x_MI, w_EIO, None if scales_EO is None else scales_EO[:, None])


def _product_kernel(tiles: StepSizes, inputs: int, transposed: bool, *refs):
    visits = Visits(*refs[: len(Visits._fields)])
    x_RX, w, scales_1Y, y_RY, sum_RY = refs[len(visits) :]
    v, step, R = pl.program_id(1), pl.program_id(2), tiles.rows
    group, start, stop = rows_of_visit(visits, v, R)
    real, whole = group < visits.start.shape[0] - 1, (start <= 0) & (stop >= R)
    last = step == pl.num_programs(2) - 1

    @pl.when(step == 0)
    def begin():
        sum_RY[...] = jnp.zeros_like(sum_RY)

    def add(rows):
        x, matrix = _inside(x_RX[rows], step, inputs, 1), w[...].astype(x_RX.dtype)
        matrix = _inside(matrix, step, inputs, 1 if transposed else 0)
        dims = (((1,), (1 if transposed else 0,)), ((), ()))
        sum_RY[rows] += jax.lax.dot_general(x, matrix, dims, preferred_element_type=jnp.float32)

    def scaled(sum_PY):
        return (sum_PY if scales_1Y is None else sum_PY * scales_1Y[...]).astype(y_RY.dtype)

    @pl.when(real & whole)
    def add_tile():
        add(slice(None))

    @pl.when(real & ~whole)
    def add_parts():
        _each_part(start, stop, tiles, lambda rows, _: add(rows))

    @pl.when(last & whole)
    def store_tile():
        y_RY[...] = scaled(sum_RY[...])

    @pl.when(last & ~whole)
    def store_parts():
        def store(rows, mine_P1):
            y_RY[rows] = jnp.where(mine_P1, scaled(sum_RY[rows]), y_RY[rows])

        _each_part(start, stop, tiles, store)


def matrix_gradients(call: GroupedCall, x_MI: jax.Array, dy_MO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """[E, I, O] in the dtype of `x`: for each group the sum of its rows' outer products, added up in float32."""
    (M, I), O = x_MI.shape, dy_MO.shape[1]
    tiles = call.tiles.fitted(M, I, O, x_MI.dtype.itemsize)
    R, X, Y = tiles.rows, tiles.inputs, tiles.outputs
    visits, num_visits = visits_of(sizes_E, M, R, of_all_groups=True)
    return pl.pallas_call(
        functools.partial(_gradient_kernel, tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(I, X), pl.cdiv(O, Y), num_visits),
            in_specs=[
                pl.BlockSpec((R, X), lambda x, y, v, *refs: (Visits(*refs).tile[v], x)),
                pl.BlockSpec((R, Y), lambda x, y, v, *refs: (Visits(*refs).tile[v], y)),
            ],
            out_specs=pl.BlockSpec((None, X, Y), lambda x, y, v, *refs: (Visits(*refs).group[v], x, y)),
            scratch_shapes=[pltpu.VMEM((X, Y), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((len(sizes_E), I, O), x_MI.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=call.tiles.memory
        ),
        cost_estimate=_cost(
            *(M, I, O, x_MI.nbytes * pl.cdiv(O, Y) + dy_MO.nbytes * pl.cdiv(I, X)),
            len(sizes_E) * I * O * x_MI.dtype.itemsize,
        ),
        interpret=call.interpret,
        name="grouped_matrix_gradients",
    )(*visits, x_MI, dy_MO)


def _gradient_kernel(tiles: StepSizes, *refs):
    visits = Visits(*refs[: len(Visits._fields)])
    x_RX, dy_RY, dw_XY, sum_XY = refs[len(visits) :]
    v, last_visit = pl.program_id(2), pl.num_programs(2) - 1
    group, start, stop = rows_of_visit(visits, v, tiles.rows)
    whole = (start <= 0) & (stop >= tiles.rows)

    @pl.when((v == 0) | (visits.group[jnp.maximum(v - 1, 0)] != group))
    def begin():
        sum_XY[...] = jnp.zeros_like(sum_XY)

    def add(x, dy):
        sum_XY[...] += jax.lax.dot_general(
            x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    @pl.when(whole)
    def add_tile():
        add(x_RX[...], dy_RY[...])

    @pl.when(~whole & (start < stop))
    def add_parts():
        # both, since numbers beyond the rows may be NaN, and NaN times 0 is NaN
        cleared = lambda x, mine_P1: jnp.where(mine_P1, x, jnp.zeros_like(x))
        _each_part(
            *(start, stop, tiles),
            lambda rows, mine_P1: add(cleared(x_RX[rows], mine_P1), cleared(dy_RY[rows], mine_P1)),
        )

    @pl.when((v == last_visit) | (visits.group[jnp.minimum(v + 1, last_visit)] != group))
    def store():
        dw_XY[...] = sum_XY[...].astype(dw_XY.dtype)


def _each_part(start, stop, tiles: StepSizes, use) -> None:
    """use(the rows of a part, which of them are the group's [P, 1]) of each part with rows of the group."""

    def body(i, _):
        first = pl.multiple_of(i * tiles.part, tiles.part)
        row_P1 = first + jax.lax.broadcasted_iota(jnp.int32, (tiles.part, 1), 0)
        use(pl.ds(first, tiles.part), (row_P1 >= start) & (row_P1 < stop))

    jax.lax.fori_loop(*parts_of_visit(start, stop, tiles), body, None)


def _inside(block: jax.Array, step, size: int, axis: int) -> jax.Array:
    """The block with zeros beyond `size` along the axis, where blocks extend beyond it."""
    width = block.shape[axis]
    if size % width == 0:
        return block
    place = step * width + jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(place < size, block, jnp.zeros_like(block))


def _cost(M: int, I: int, O: int, bytes_read: int, bytes_written: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=2 * M * I * O, bytes_accessed=bytes_read + bytes_written, transcendentals=0)

"""The kernels of grouped products, interpreted, against a loop over groups; then compiled for every TPU we name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.kernels import backend
from model.kernels.grouped_matmul import grouped_matmul
from model.kernels.grouped_matmul.blocks import in_blocks
from model.kernels.grouped_matmul.quantized import quantize_matrices, quantized_grouped_matmul
from model.kernels.grouped_matmul.reference import every_product
from model.kernels.grouped_matmul.tpu import (
    TILE_SIZES,
    GroupedCall,
    grouped_product,
    matrix_gradients,
    products,
)
from model.kernels.grouped_matmul.tpu_visits import TileSizes, parts_of_visit, rows_of_visit, visits_of

from ..conftest import compiled_fast as jit
from ..tpu import CHIPS, compile_for, needs_libtpu, sweep

SMALL = GroupedCall(TileSizes(256, 128, 128), interpret=True)


def draws(sizes, beyond, I, O, dtype=jnp.float32):
    """(x, w, sizes) and a direction."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    M = sum(sizes) + beyond
    return (normal(M, I), normal(len(sizes), I, O), jnp.asarray(sizes, jnp.int32)), normal(M, O)


def loop(x, w, sizes, dy):
    """(y, gradients of x and w along dy), group by group."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    ends = np.cumsum(sizes)
    for e, (size, end) in enumerate(zip(np.asarray(sizes), ends, strict=True)):
        own = slice(end - size, end)
        y[own], dx[own], dw[e] = x[own] @ w[e], dy[own] @ w[e].T, x[own].T @ dy[own]
    return y, dx, dw


@functools.cache
def pulled(form):
    def run(x, w, sizes, direction):
        y, pull = jax.vjp(lambda x, w: form(x, w, sizes), x, w)
        return (y, *pull(direction))

    return jit(run)


OURS = functools.partial(grouped_product, SMALL)


def assert_close(ours, wanted, atol):
    for got, want in zip(ours, wanted, strict=True):
        scale = max(1, np.abs(want).max())
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=atol * scale)


CASES = {  # sizes, rows beyond them, inputs, outputs
    "one row": ((0, 1), 0, 5, 3),
    "empty groups, lone rows, full tiles": ((0, 100, 0, 300, 1, 0, 255, 256, 128, 0), 0, 40, 24),
    "rows beyond, several blocks, none even": ((100, 0, 300, 1), 377, 300, 200),
    "no group has a row": ((0, 0, 0), 300, 16, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_a_loop_over_groups(case):
    inputs, direction = draws(*CASES[case])
    ours = pulled(OURS)(*inputs, direction)
    assert_close(ours, loop(*inputs, direction), 1e-6)
    total = sum(CASES[case][0])
    assert not ours[0][total:].any() and not ours[1][total:].any()


def test_matrices_that_lie_transposed_give_the_same():
    inputs, direction = draws(*CASES["rows beyond, several blocks, none even"])
    form = functools.partial(grouped_product, dataclasses.replace(SMALL, transposed=True))
    turned = lambda x, w, sizes: form(x, w.swapaxes(1, 2), sizes)
    assert_close(pulled(turned)(*inputs, direction), loop(*inputs, direction), 1e-6)


def test_bfloat16_is_as_near_as_its_rounding_and_is_added_up_in_float32():
    inputs, direction = draws((100, 0, 300, 1), 100, 300, 200, jnp.bfloat16)
    ours = pulled(OURS)(*inputs, direction)
    assert all(x.dtype == jnp.bfloat16 for x in ours)
    assert_close(ours, loop(*inputs, direction), 4e-3)
    ones = jnp.ones((700, 8), jnp.bfloat16)
    dw = jit(functools.partial(matrix_gradients, SMALL))(ones, ones, jnp.array([600, 100]))
    np.testing.assert_allclose(dw[:, 0, 0].astype(np.float32), [600, 100], rtol=4e-3)  # 257 ones are 256


def test_rows_that_are_no_numbers_reach_no_other_group():
    """Beyond the groups anything may lie."""
    (x, w, sizes), direction = draws((100, 0, 30), 170, 16, 8)
    wanted = loop(x, w, sizes, direction)
    ours = pulled(OURS)(x.at[130:].set(jnp.nan), w, sizes, direction.at[130:].set(jnp.inf))
    assert_close(ours, wanted, 1e-6)


@pytest.mark.parametrize("form", [every_product, in_blocks], ids=lambda f: f.__name__)
def test_plain_forms_leave_rows_beyond_the_groups_zero_too(form):
    inputs, direction = draws((3, 0, 9), 7, 5, 4)
    assert_close(pulled(form)(*inputs, direction), loop(*inputs, direction), 1e-5)


def test_the_kernel_is_picked_and_takes_the_wider_dtype():
    (x, w, sizes), direction = draws((7, 0, 2), 0, 8, 8)
    run = jit(lambda x, w: grouped_matmul(x, w, sizes))
    assert "grouped_products" not in str(run.trace(x, w).jaxpr)
    with backend.use("tpu", interpret=True):
        assert "grouped_products" in str(run.trace(x, w).jaxpr)
        y = run(x.astype(jnp.bfloat16), w)
    assert y.dtype == jnp.float32
    assert_close([y], loop(x.astype(jnp.bfloat16), w, sizes, direction)[:1], 1e-6)


def test_megablox_says_the_same():
    """jax's own kernel; its rows are multiples of its tile."""
    from jax.experimental.pallas.ops.tpu.megablox import ops

    inputs, direction = draws((100, 0, 411, 1), 0, 256, 128)

    def theirs(x, w, sizes):
        return ops.gmm(x, w, sizes, jnp.float32, (128, 128, 128), None, None, False, True)

    assert_close(pulled(OURS)(*inputs, direction), pulled(theirs)(*inputs, direction), 1e-6)


@pytest.mark.parametrize(
    "dtype, error, rows", [(jnp.int8, 5e-3, jnp.bfloat16), (jnp.float8_e4m3fn, 4e-2, jnp.float32)]
)
def test_matrices_of_eight_bits_are_near_and_both_forms_say_the_same(dtype, error, rows):
    (x, w, sizes), direction = draws((100, 0, 30, 1), 9, 300, 200)
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    w = w.at[:, :, 3].set(0).at[:, :, 5].multiply(1000)  # each output has its own scale
    exact = loop(x, w, sizes, direction)[0]
    narrow, scales = jit(lambda w: quantize_matrices(w, dtype))(w)
    assert narrow.dtype == dtype and scales.shape == (4, 200)
    run = jit(quantized_grouped_matmul)
    plain = np.asarray(run(x, narrow, scales, sizes))
    with backend.use("tpu", interpret=True):
        ours = run(x.astype(rows), narrow, scales, sizes)
    largest_O = np.abs(exact).max(0, keepdims=True) + 1e-9
    assert (np.sqrt(np.mean((plain - exact) ** 2, 0)) <= error * largest_O).all() and not plain[:, 3].any()
    assert ours.dtype == rows
    atol = 1e-5 if rows == jnp.float32 else 4e-3
    np.testing.assert_allclose(ours.astype(jnp.float32) / largest_O, plain / largest_O, atol=atol)


@functools.cache
def visits(M, R, of_all_groups):
    return jit(functools.partial(visits_of, M=M, R=R, of_all_groups=of_all_groups))


@settings(max_examples=30, deadline=None)
@given(
    ends=st.lists(st.integers(0, 1000), min_size=7, max_size=7),
    M=st.sampled_from([1024, 1100]),
    of_all_groups=st.booleans(),
)
def test_each_row_is_visited_once_by_its_group_and_tiles_are_visited_in_order(ends, M, of_all_groups):
    ends = np.sort(ends)
    step = TileSizes(256, 128, 128).fitted(M, 128, 128, 4)
    found, count = visits(M, step.rows, of_all_groups)(np.diff(ends, prepend=0))
    groups, seen_by = np.searchsorted(ends, np.arange(M), side="right"), np.full(M, -1)
    for v in range(int(count)):
        group, start, stop = (int(n) for n in rows_of_visit(found, v, step.rows))
        first, last = (int(n) * step.part for n in parts_of_visit(start, stop, step))
        own = np.arange(max(start, 0), min(stop, step.rows))
        assert len(own) == 0 or (first <= own[0] and own[-1] < last)
        assert (seen_by[int(found.tile[v]) * step.rows + own] == -1).all()
        seen_by[int(found.tile[v]) * step.rows + own] = group
    wanted = np.where(groups == 7, -1, groups) if of_all_groups else groups
    np.testing.assert_array_equal(seen_by, wanted)
    assert count <= len(found.tile) and (np.diff(found.tile[: int(count)]) >= 0).all()
    assert not of_all_groups or set(found.group[: int(count)].tolist()) == set(range(7))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="multiples of 128"):
        TileSizes(100, 128, 128)
    with pytest.raises(ValueError, match="bfloat16 are not of 8 bits"):
        quantized_grouped_matmul(*[jnp.zeros((1, 1, 1), jnp.bfloat16)] * 4)


# E, I, O, and the rows of 8192 tokens
MIXTRAL, DEEPSEEK_V3, GPT_OSS = (8, 4096, 14336, 16384), (256, 7168, 2048, 65536), (128, 2880, 2880, 32768)
SMALLEST = "v4"  # of the fast memories
shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_has_a_program_that_copies_nothing(chip):
    E, I, O, M = MIXTRAL

    def step(x, w, sizes, dy):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, pull(dy)

    bfloat16 = functools.partial(shaped, jnp.bfloat16)
    with backend.use("tpu", chip):
        program = compile_for(
            chip, step, bfloat16(M, I), bfloat16(E, I, O), shaped(jnp.int32, E), bfloat16(M, O)
        )
    assert all(name in program.as_text() for name in ("grouped_products", "grouped_matrix_gradients"))
    assert program.memory_analysis().temp_size_in_bytes < 4e6


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "chip, size", sweep([DEEPSEEK_V3, GPT_OSS, (8, 14336, 4096, 1000)], SMALLEST), ids=str
)
def test_chips_have_a_program_for_each_size(chip, size, dtype):
    """One by one: what DeepSeek-V3 reads and writes in all is more than some of them hold."""
    E, I, O, M = size
    if dtype == jnp.float32:
        E //= 4
    call, wide, sizes = GroupedCall(TILE_SIZES[chip]), functools.partial(shaped, dtype), shaped(jnp.int32, E)
    transposed = functools.partial(products, call.flipped())
    compile_for(chip, functools.partial(products, call), wide(M, I), wide(E, I, O), sizes)
    compile_for(chip, transposed, wide(M, O), wide(E, I, O), sizes)
    compile_for(chip, functools.partial(matrix_gradients, call), wide(M, I), wide(M, O), sizes)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_has_a_program_for_matrices_of_eight_bits(chip, dtype):
    for (E, I, O, _), rows in ((MIXTRAL, 16384), (DEEPSEEK_V3, 64)):
        x, w = shaped(jnp.bfloat16, rows, I), shaped(dtype, E, I, O)
        with backend.use("tpu", chip):
            program = compile_for(
                *(chip, quantized_grouped_matmul, x, w),
                *(shaped(jnp.float32, E, O), shaped(jnp.int32, E)),
            )
        assert program.memory_analysis().temp_size_in_bytes < 4e6  # no matrix is widened in memory


@pytest.mark.slow
@pytest.mark.parametrize("tiles", sorted(set(TILE_SIZES.values()), key=str), ids=str)
def test_many_rows_equal_the_loop(tiles):
    """A kernel can be right at small sizes and wrong at large ones."""
    sizes = np.random.default_rng(1).multinomial(8192, np.random.default_rng(2).dirichlet(np.full(64, 0.2)))
    inputs, direction = draws(tuple(sizes.tolist()), 500, 320, 128)
    form = functools.partial(grouped_product, GroupedCall(tiles, interpret=True))
    assert_close(pulled(form)(*inputs, direction), loop(*inputs, direction), 2e-6)

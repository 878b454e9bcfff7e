"""Products with rounded matrices: the formats against ml_dtypes, the kernel against the widened matrix, and
compiled."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from model.kernels import backend
from model.kernels.quantized_matmul import quantized_matmul
from model.kernels.quantized_matmul.formats import (
    E2M1,
    FORMATS,
    NF4,
    dequantize,
    quantize,
    quantize_rows,
    widen,
)
from model.kernels.quantized_matmul.reference import widened_whole

from ..conftest import compiled_fast as jit
from ..tpu import CHIPS, compile_for, needs_libtpu


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def test_scales_of_mxfp4_are_exact_powers_of_two():
    """Of a block's largest value, the exponent less the format's largest, as OCP Microscaling has it."""
    exponents = np.arange(-120, 128)
    for mantissa in (1.0, 1.5, 1.9999999):
        largest = np.float32(mantissa * 2.0**exponents)
        rounded = quantize(jnp.zeros((32, len(exponents))).at[5].set(largest), "mxfp4", 32)
        np.testing.assert_array_equal(rounded.scales_NO[0], 2.0 ** (exponents - 2.0))
        exact = {1.0: 1.0, 1.5: 1.5, 1.9999999: 1.5}[mantissa]  # beyond 6 there is no value
        np.testing.assert_array_equal(dequantize(rounded)[5], exact * 2.0**exponents)


def test_codes_of_mxfp4_are_those_of_the_format():
    codes = np.arange(16, dtype=np.uint8)
    wanted = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    ours = widen(jnp.asarray(np.where(codes < 8, codes, codes.astype(int) - 16), jnp.int4), "mxfp4")
    np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_array_equal(wanted[:8], E2M1)


def test_values_round_to_the_nearest_of_the_format_and_ties_to_even():
    grid = np.concatenate([np.linspace(-6, 6, 97), [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 4.0, 6.0]])
    column = np.resize(grid, 128).astype(np.float32)  # its largest is 6: scales are 1
    for kind, dtype in (("mxfp4", ml_dtypes.float4_e2m1fn), ("fp8", ml_dtypes.float8_e4m3fn)):
        w = quantize(jnp.asarray(column)[:, None], kind, 128)
        scale = float(w.scales_NO[0, 0])
        wanted = (column / scale).astype(dtype).astype(np.float32) * scale
        np.testing.assert_allclose(dequantize(w)[:, 0], wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_block_of_inputs_is_rounded_by_its_own_scale(kind):
    w = np.array(normal(128, 24))
    w[64:] *= 1000
    found = dequantize(quantize(jnp.asarray(w), kind, 64))
    alone = [dequantize(quantize(jnp.asarray(part), kind, 64)) for part in (w[:64], w[64:])]
    np.testing.assert_array_equal(found, np.concatenate(alone))
    step = {"int8": 0.5 / 127, "int4": 0.5 / 7, "uint4": 1 / 15, "mxfp4": 0.25, "nf4": 0.152, "fp8": 0.04}[
        kind
    ]
    largest = np.abs(w.reshape(2, 64, 24)).max(1, keepdims=True)
    assert (np.abs(found - w).reshape(2, 64, 24) <= step * largest * 1.001).all()
    np.testing.assert_array_equal(dequantize(quantize(jnp.zeros((64, 3)), kind, 64)), 0)


# rows, inputs, outputs, block: one row, outputs that are no multiple of a tile, a scale of several steps, of a part
SHAPES = [(1, 256, 128, 128), (33, 384, 200, 384), (7, 1024, 96, 1024), (40, 256, 130, 32)]


@functools.cache
def product(interpreted, round_rows=False):
    def run(x, w):
        if not interpreted:
            return widened_whole(x, w, round_rows)
        with backend.use("tpu", interpret=True):
            return quantized_matmul(x, w, round_rows)

    return jit(run)


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_kernel_multiplies_what_the_matrix_stands_for(kind, dtype, atol):
    for M, I, O, block in SHAPES if dtype == jnp.float32 else SHAPES[3:]:
        x, w = normal(M, I, dtype=dtype), quantize(normal(I, O, seed=1), kind, block)
        wanted = np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64)
        scale = np.abs(wanted).max()
        for interpreted in (False, True):
            ours = np.asarray(product(interpreted)(x, w), np.float64)
            np.testing.assert_allclose(ours, wanted, atol=atol * scale)


def test_rows_of_fp8_are_multiplied_as_rounded():
    for M, I, O, block in SHAPES[:2]:
        x, w = normal(M, I), quantize(normal(I, O, seed=1), "fp8", block)
        values, scales = quantize_rows(x, block)
        rounded = (
            np.asarray(values, np.float64).reshape(M, -1, block) * np.asarray(scales)[..., None]
        ).reshape(M, I)
        wanted = rounded @ np.asarray(dequantize(w), np.float64)
        for interpreted in (False, True):
            ours = product(interpreted, True)(x, w)
            np.testing.assert_allclose(ours, wanted, atol=1e-6 * np.abs(wanted).max())
        exact = np.asarray(x, np.float64) @ np.asarray(normal(I, O, seed=1), np.float64)
        assert np.abs(wanted - exact).std() < 0.06 * exact.std()


def test_levels_of_nf4_come_back_and_between_them_the_nearest():
    levels = np.resize(np.asarray(NF4, np.float32), 64)
    np.testing.assert_array_equal(dequantize(quantize(jnp.asarray(levels)[:, None], "nf4"))[:, 0], levels)
    column = np.linspace(-1, 1, 64).astype(np.float32)
    wanted = levels[np.abs(column[:, None] - levels[:16]).argmin(1)]
    np.testing.assert_array_equal(dequantize(quantize(jnp.asarray(column)[:, None], "nf4"))[:, 0], wanted)


def test_what_does_not_fit_is_an_error_that_says_what_does():
    with pytest.raises(ValueError, match="Use one of int8, int4, uint4, mxfp4, nf4, fp8"):
        quantize(normal(8, 8), "int3")
    with pytest.raises(ValueError, match="do not divide 100 inputs"):
        quantize(normal(100, 8), "int8")
    with pytest.raises(ValueError, match="rows of 64 do not fit a matrix of 128"):
        quantized_matmul(normal(2, 64), quantize(normal(128, 8), "int8"))
    with pytest.raises(ValueError, match="this one is int8"):
        quantized_matmul(normal(2, 128), quantize(normal(128, 8), "int8"), round_rows=True)


def compiled(chip, kind, block, round_rows, M):
    I, O = 4096, 14336  # the feed-forward of Llama-3.1 8B
    w = jax.eval_shape(lambda w: quantize(w, kind, block), jax.ShapeDtypeStruct((I, O), jnp.float32))

    def run(x, w):
        with backend.use("tpu", chip=chip):
            return quantized_matmul(x, w, round_rows)

    program = compile_for(chip, run, jax.ShapeDtypeStruct((M, I), jnp.bfloat16), w)
    assert "tpu_custom_call" in program.as_text()
    # neither the widened matrix nor widened rows lie in main memory; rounded rows do
    assert program.memory_analysis().temp_size_in_bytes < (M * I if round_rows else 0) + (1 << 23)


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_the_kernel_compiles_for_every_chip(chip):
    compiled(chip, "mxfp4", None, False, 16)
    compiled(chip, "nf4", None, False, 16)
    compiled(chip, "fp8", None, True, 16)
    compiled(chip, "fp8", 32, True, 16)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("M", [16, 8192])
def test_all_formats_compile_for_every_chip(chip, M):
    for kind, block in (
        ("int8", None),
        ("int8", 4096),
        ("int4", None),
        ("mxfp4", None),
        ("nf4", None),
        ("fp8", None),
    ):
        compiled(chip, kind, block, False, M)
    compiled(chip, "fp8", None, True, M)

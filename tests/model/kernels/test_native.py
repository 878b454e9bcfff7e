"""The C++ kernels for CPUs against float64 and plain jnp, also as other processors compile them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import backend, native
from model.kernels.attention import Mask, Scores
from model.kernels.backend import Kernels
from model.kernels.paged_attention import paged_attention
from model.kernels.paged_attention.kv_layout import KVLayout
from model.kernels.quantized_matmul import formats, panels

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
KINDS = ["int8", "int4", "uint4", "mxfp4", "nf4"]
SHAPES = [(64, 96, 16), (96, 40, 32), (1056, 33, 1056)]  # inputs, outputs, block


def matrix(kind: str, inputs: int, outputs: int, block: int) -> formats.QuantizedMatrix:
    return formats.quantize(jax.random.normal(jax.random.key(1), (inputs, outputs)), kind, block)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_panels_stand_for_the_same_numbers(kind, shape):
    w = matrix(kind, *shape)
    packed, wide = panels.pack(w), np.asarray(formats.dequantize(w))
    assert (packed.inputs, packed.outputs) == shape[:2]
    np.testing.assert_allclose(panels.widened(packed), wide, rtol=1e-6, atol=1e-7)
    some = jnp.asarray([[0, 3], [shape[1] - 1, 31]])
    np.testing.assert_allclose(panels.columns(packed, some), wide.T[np.asarray(some)], rtol=1e-6, atol=1e-7)
    bits = panels.BITS[kind]
    assert packed.values_PZ.size == shape[0] * -(-shape[1] // 32) * 32 * bits // 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 11, 12, 37])
def test_products_equal_those_in_float64(kind, rows):
    for shape in SHAPES:
        w = matrix(kind, *shape)
        x = jax.random.normal(jax.random.key(2), (rows, shape[0]))
        wanted = np.asarray(x, np.float64) @ np.asarray(formats.dequantize(w), np.float64)
        np.testing.assert_allclose(
            panels.product(x, panels.pack(w)), wanted, atol=3e-6 * np.abs(wanted).max()
        )


def test_float16_scales_stay_so_and_bfloat16_has_none():
    w = matrix("uint4", 64, 96, 32)
    halves = w.replace(scales_NO=w.scales_NO.astype(jnp.float16), offsets_NO=w.offsets_NO.astype(jnp.float16))
    x = jax.random.normal(jax.random.key(2), (5, 64))
    packed = panels.pack(halves)
    assert packed.scales_PNW.dtype == packed.offsets_PNW.dtype == jnp.float16
    np.testing.assert_allclose(
        panels.product(x, packed), x @ formats.dequantize(halves), rtol=1e-4, atol=1e-5
    )
    dense = jax.random.normal(jax.random.key(3), (64, 40))
    packed = panels.pack_bfloat16(dense)
    rounded = dense.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(panels.widened(packed), rounded)
    np.testing.assert_array_equal(
        panels.columns(packed, jnp.asarray([5, 39])), rounded.T[jnp.asarray([5, 39])]
    )
    np.testing.assert_allclose(panels.product(x, packed), x @ rounded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "uint4"])
def test_a_rows_bits_do_not_depend_on_the_others(kind):
    packed = panels.pack(matrix(kind, 1056, 640, 32))
    x = jax.random.normal(jax.random.key(2), (70, 1056))
    whole = np.asarray(jax.jit(panels.product)(x, packed))
    for rows in (slice(0, 1), slice(5, 9), slice(3, 24)):
        np.testing.assert_array_equal(np.asarray(panels.product(x[rows], packed)), whole[rows])


def test_what_has_no_panels_is_refused():
    assert panels.refusal(63, 1, "int8") is not None and panels.refusal(64, 64, "int8") is not None
    assert panels.refusal(64, 2, "fp8") is not None and panels.refusal(64, 2, "int8") is None
    with pytest.raises(ValueError, match="pairs of inputs"):
        panels.pack(matrix("int8", 63, 32, 63))


CASES = {
    "grouped heads": (6, 2, 64, 64, 16, Mask(), Scores()),
    "window and softcap": (4, 2, 32, 16, 4, Mask(window=7), Scores(softcap=5.0)),
    "chunks and sinks": (
        *(32, 1, 16, 16, 8),
        Mask(chunk=9),
        Scores(scale=0.3, sinks_H=jnp.arange(32.0) / 9),
    ),
    "wide": (2, 2, 256, 128, 64, Mask(), Scores()),
}


def attended(name: str, case: str, rows: tuple[int, ...], seed: int = 0):
    """(outputs, cache, written cache) of rows with (count, start) by the implementation `name`."""
    H, K, C, E, Z, mask, scores = CASES[case]
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    counts, starts = np.asarray([1, 5, 0, 37]), np.asarray([11, 0, 3, 2])
    N, P = 60, 12
    cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    T = int(cu[-1]) + 3  # three tokens are of no row
    q, k, v = draw(T, H, C), draw(T, K, C), draw(T, K, E)
    cache = {"k": draw(N, Z, K * C), "v": draw(N, Z, K * E)}
    table = rng.permutation(N)[: 4 * P].reshape(4, P).astype(np.int32)
    pick = list(rows)
    tokens = np.concatenate([np.arange(cu[r], cu[r + 1]) for r in pick] + [np.arange(cu[-1], T)])
    cu = np.concatenate([[0], np.cumsum(counts[pick])]).astype(np.int32)
    new = {"k": k[tokens], "v": v[tokens]}
    with backend.prefer(Kernels(paged=name)):
        call = jax.jit(lambda *arrays: paged_attention(*arrays, KVLayout(K), mask, scores))
        return call(q[tokens], new, cache, table[pick], cu, (starts + counts)[pick])


@pytest.mark.parametrize("case", CASES)
def test_paged_attention_equals_plain_jnp(case):
    (out, cache), (wanted, written) = (attended(name, case, (0, 1, 2, 3)) for name in ("native", "plain"))
    np.testing.assert_allclose(out, wanted, atol=3e-6)
    assert not np.any(np.asarray(out)[-3:])
    for name in "kv":
        np.testing.assert_array_equal(cache[name], written[name])


@pytest.mark.parametrize("case", CASES)
def test_attention_of_a_row_does_not_depend_on_the_others(case):
    whole, alone = (np.asarray(attended("native", case, rows)[0]) for rows in ((0, 1, 2, 3), (3,)))
    np.testing.assert_array_equal(whole[6:43], alone[:37])


def test_what_the_native_kernel_refuses_is_named():
    q, cache = jnp.zeros((3, 4, 8)), {"k": jnp.zeros((4, 8, 16)), "v": jnp.zeros((4, 8, 16))}
    new = {"k": jnp.zeros((3, 2, 8)), "v": jnp.zeros((3, 2, 8))}
    rows = jnp.zeros((1, 2), jnp.int32), jnp.asarray([0, 3]), jnp.asarray([3])
    with backend.prefer(Kernels(paged="native")), pytest.raises(ValueError, match="multiple of 16 channels"):
        paged_attention(q, new, cache, *rows, KVLayout(2))


@pytest.mark.parametrize("target", ["x86-64-v3", pytest.param("x86-64", marks=pytest.mark.slow)])
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the targets are those of x86")
def test_other_processors_compile_the_same_products(tmp_path, target):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec c++ $(echo " $@" | sed "s/-march=native/-march={target}/")\n')
    compiler.chmod(0o755)
    chosen = "products_equal or equals_plain or float16"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    env = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:]
    assert len(list(tmp_path.rglob("*.so"))) == 1


def test_without_a_compiler_plain_jnp_runs_and_says_so(tmp_path):
    program = """
import jax, model
from model.kernels import native
from model.quantization import packed_for_decoding
heads = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
cfg = model.decoder(vocab_size=32, width=32, layers=1, ffn_width=64, **heads)
params = model.quantize(cfg, model.init(cfg, jax.random.key(0)), "int8", 16)
print(native.missing())
print(type(packed_for_decoding(cfg, params)[1]["block_0"]["mixer"]["q"]).__name__)
"""
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "install g++ or clang" in done.stdout and "Quantized" in done.stdout
    assert "widens all weights" in done.stderr

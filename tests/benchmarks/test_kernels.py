"""The table of compiled kernels: its costs against sums done by hand, its reading of programs, one small program."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernels
from benchmarks.kernel_cases import KERNELS, Case, Form, attention_flops, pairs, quantized_case, shaped

LIBTPU = Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"
needs_libtpu = pytest.mark.skipif(
    not LIBTPU.is_file() and importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: make install (Linux on x86-64)",
)


@pytest.mark.parametrize(
    "tokens, window, before", [(7, None, 0), (7, 3, 0), (5, None, 4), (5, 3, 4), (5, 100, 4)]
)
def test_pairs_are_those_that_a_loop_counts(tokens, window, before):
    sees = lambda q, k: k <= q and (window is None or q - k < window)
    wanted = sum(sees(q, k) for q in range(before, before + tokens) for k in range(before + tokens))
    assert pairs(tokens, window, before) == wanted


def test_a_roofline_by_hand():
    """64 rows in bfloat16 times an int4 matrix of 4096 x 14336 with a float32 scale for 128 inputs, on a v5p."""
    case = quantized_case("int4")
    flops, moved = kernels.ideal(case, kernels.FORWARD)
    assert flops == 2 * 64 * 4096 * 14336 == 7_516_192_768
    # rows 524288, half a byte a number 29360128, scales 32 * 14336 * 4 = 1835008, results 64 * 14336 * 2 = 1835008
    assert moved == 33_554_432
    seconds, bound = kernels.CHIPS["v5p"].roofline(flops, moved)
    assert bound == "flops" and seconds == pytest.approx(16.375e-6, rel=1e-4)  # 7516192768 / 459e12
    assert kernels.CHIPS["v6e"].roofline(flops, moved) == (pytest.approx(20.46e-6, rel=1e-3), "bytes")


def test_a_backward_pass_is_two_forwards_and_moves_gradients():
    flash = KERNELS["flash_attention"]()[0]
    assert flash.flops == attention_flops(8192 * 8193 // 2, 32, 128, 128) == 4 * 33558528 * 32 * 128
    forward, both = (kernels.ideal(flash, what) for what in (kernels.FORWARD, kernels.BOTH))
    q, kv, ids = 8192 * 32 * 128 * 2, 2 * 8192 * 8 * 128 * 2, 2 * 8192 * 4
    assert forward == (flash.flops, 2 * q + kv + ids)
    assert both == (3 * flash.flops, 4 * q + 2 * kv + ids)


def test_reads_and_writes_of_trees_are_counted_by_their_roles():
    """A program that reads the gradients twice, once through the fast memory, and writes two trees."""
    text = """
ENTRY %main (g: f32[8,4]) -> (f32[8,4], f32[8,4]) {
  %g.1 = f32[8,4]{1,0:T(8,128)} parameter(0), metadata={op_name="floats[0]['w']"}
  %p.1 = f32[8,4]{1,0:T(8,128)} parameter(1), metadata={op_name="rest[0]['w']"}
  %m.1 = f32[8,4]{1,0:T(8,128)} parameter(2), metadata={op_name="rest[1][0].mu['w']"}
  %norm = f32[]{:T(128)} fusion(%g.1), kind=kLoop, calls=%norm_of
  %start = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%g.1)
  %done = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%start)
  %new = (f32[8,4]{1,0:T(8,128)}, f32[8,4]{1,0:T(8,128)}) fusion(%done, %p.1, %m.1, %norm), kind=kLoop
  ROOT %pair = (f32[8,4]{1,0:T(8,128)}, f32[8,4]{1,0:T(8,128)}) tuple(%new, %new)
}"""
    tree = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    case = Case("", 0.0, {"": Form(lambda floats, rest: None, (tree,))})
    assert kernels.passes(text, case) == (
        "read: gradients 2.00, parameters 1.00, first moments 1.00, second moments 0.00; written: 2.00 trees"
    )


def job_of(run) -> kernels.Job:
    form = Form(run, (shaped(256, 128), shaped(128, 128)))
    return kernels.Job(
        "matmul", Case("256 x 128 x 128", 2.0 * 256 * 128 * 128, {"ours": form}), kernels.BOTH, "ours"
    )


@needs_libtpu
def test_a_small_program_has_a_row_and_one_that_does_not_compile_says_why(monkeypatch):
    for name, value in kernels.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    row = kernels.measure(job_of(lambda floats, rest: floats[0] @ floats[1]), "v5p:2x2x1")
    assert not row.failure and row.flops == 3 * 2 * 256 * 128 * 128
    assert row.bytes == 2 * (3 * 256 * 128 + 128 * 128) + 2 * (256 * 128 + 128 * 128)  # x, y, dy, w; dx, dw
    assert row.xla_flops >= 2 * 2 * 256 * 128 * 128 and row.vmem > 0 and row.code > 0

    def broken(floats, rest):
        raise ValueError("no such tile")

    monkeypatch.setattr(kernels, "ideal", lambda case, what: (1.0, 1.0))
    assert kernels.measure(job_of(broken), "v5p:2x2x1").failure == "no such tile"

"""Bytes that a program's text says it moves, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.traffic import traffic
from tests.model.tpu import needs_libtpu, one_chip

PARTS = (
    "s32[]{:T(128)}",
    "bf16[4,64,128]{2,1,0:T(8,128)(2,1)}",
    "f32[4,8,128]{2,1,0:T(8,128)}",
    "f32[8,128]{1,0:T(8,128)S(1)}",
)
STATE = f"({', '.join(PARTS)})"
PROGRAM = """
%turned (p: bf16[64,128]) -> bf16[128,64] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %t = bf16[128,64]{1,0:T(8,128)(2,1)} transpose(%p), dimensions={1,0}
}
%layer (q: bf16[4,64,128], n: s32[], r: f32[4,8,128], x: f32[8,128]) -> f32[4,8,128] {
  %q = bf16[4,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %n = s32[]{:T(128)} parameter(1)
  %r = f32[4,8,128]{2,1,0:T(8,128)} parameter(2)
  %x = f32[8,128]{1,0:T(8,128)} parameter(3)
  %w = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%q, %n, %n, %n), dynamic_slice_sizes={1,64,128}
  %b = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%w)
  %y = f32[8,64]{1,0:T(8,128)} convolution(%x, %b), dim_labels=bf_oi->bf
  %z = f32[1,8,128]{2,1,0:T(8,128)} pad(%y, %n), padding=0_0x0_64
  ROOT %u = f32[4,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%r, %z, %n, %n, %n)
}
%body (s: STATE) -> STATE {
  %s = STATE parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %ws = bf16[4,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %rs = f32[4,8,128]{2,1,0:T(8,128)} get-tuple-element(%s), index=2
  %xs = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%s), index=3
  %l = f32[4,8,128]{2,1,0:T(8,128)} fusion(%ws, %i, %rs, %xs), kind=kOutput, calls=%layer
  ROOT %o = STATE tuple(%i, %ws, %l, %xs)
}
%cond (s: STATE) -> pred[] {
  %c.s = STATE parameter(0)
  %c.i = s32[]{:T(128)} get-tuple-element(%c.s), index=0
  %c.n = s32[]{:T(128)} constant(4)
  ROOT %c.lt = pred[]{:T(512)} compare(%c.i, %c.n), direction=LT
}
ENTRY %main (a: bf16[4,64,128], d: f32[8,128], g: bf16[64,128]) -> bf16[128,64] {
  %a = bf16[4,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %d = f32[8,128]{1,0:T(8,128)} parameter(1)
  %g = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(2)
  %d.start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%d)
  %d.done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%d.start)
  %zero = s32[]{:T(128)} constant(0)
  %room = f32[4,8,128]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %state = STATE tuple(%zero, %a, %room, %d.done)
  %loop = STATE while(%state), condition=%cond, body=%body
  %sum = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%g), channel_id=1, to_apply=%add
  ROOT %out = bf16[128,64]{1,0:T(8,128)(2,1)} fusion(%sum), kind=kLoop, calls=%turned
}
""".replace("STATE", STATE)


def test_bytes_of_loops_slices_and_fast_memory():
    found = traffic(PROGRAM)
    matrix, row = 64 * 128 * 2, 8 * 128 * 4
    # four turns, each with its own matrix of the four and its own row of the result; the row comes from fast memory
    assert found.by_kind["products"] == 4 * (matrix + row)
    assert found.wanted == 4 * (matrix + row + row) + 2 * matrix
    assert found.by_kind["collectives"] == 2 * matrix
    # to fast memory; and a matrix that is 64 wide after it is turned, filled up to 128
    assert found.by_kind["copies"] == row + matrix + 2 * matrix
    assert found.moved == sum(found.by_kind.values())


@needs_libtpu
def test_bytes_of_a_compiled_scan():
    def scan(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    turns, rows, width = 12, 8192, 2048
    program = jax.jit(scan, in_shardings=one_chip("v5p")).lower(
        shape(rows, width), shape(turns, width, width)
    )
    found = traffic(program.compile().as_text())
    ideal = turns * 2 * (2 * rows * width + width * width)
    assert found.wanted == found.by_kind["products"] == ideal
    assert found.by_kind["kernels"] == found.by_kind["collectives"] == 0
    assert found.by_kind["copies"] <= 2 * (turns + 1) * 2 * rows * width  # at most of what the loop carries


def test_a_gather_that_ends_with_an_idle_transpose_is_no_copy():
    rows = "bf16[64,128]{1,0:T(8,128)(2,1)}"
    program = f"""
%taken (p: bf16[4096,128], n: s32[64]) -> bf16[64,128] {{
  %p = bf16[4096,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %n = s32[64]{{0:T(128)}} parameter(1)
  %g = {rows} gather(%p, %n), offset_dims={{1}}, collapsed_slice_dims={{0}}, slice_sizes={{1,128}}
  ROOT %t = {rows} transpose(%g), dimensions={{0,1}}
}}
ENTRY %main (a: bf16[4096,128], b: s32[64]) -> bf16[64,128] {{
  %a = bf16[4096,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %b = s32[64]{{0:T(128)}} parameter(1)
  ROOT %out = {rows} fusion(%a, %b), kind=kCustom, calls=%taken
}}
"""
    found, row = traffic(program), 128 * 2
    assert found.moved == found.by_kind["others"] == 64 * row + 64 * row + 128 * 4


def test_a_loop_whose_turns_are_not_told_is_an_error():
    with pytest.raises(ValueError, match="Loop loop ends by 0 constants"):
        traffic(PROGRAM.replace("%c.n = s32[]{:T(128)} constant(4)", "%c.n = s32[]{:T(128)} add(%c.i, %c.i)"))

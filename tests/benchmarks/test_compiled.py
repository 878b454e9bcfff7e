"""What is read out of a compiled program, and that compilers know the options that programs are compiled with."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.compiled import Case, Program, compile_step
from model import decoder
from model.compilation import training_options
from tests.model.tpu import CHIPS, needs_libtpu, one_chip
from train.config import MeshSpec

PROGRAM = """
%fused_computation.1 (p: bf16[64,128]) -> bf16[64,128] {
  %all-reduce.1 = bf16[64,128]{1,0} all-reduce(%p), channel_id=7, to_apply=%add
}
%async_collective_fusion.2 (p: bf16[64,128]) -> bf16[64,128] {
  %all-reduce.2 = bf16[64,128]{1,0} all-reduce(%p), channel_id=7, to_apply=%add
}
%all-reduce-scatter.3 (p: bf16[64,128]) -> bf16[8,128] {
  %all-reduce.3 = bf16[64,128]{1,0} all-reduce(%p), channel_id=8, to_apply=%add
}
ENTRY %main (p: bf16[64,128]) -> bf16[64,128] {
  %all-gather-start.4 = (bf16[8,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%p), channel_id=9
  %all-gather-done.4 = bf16[64,128]{1,0} all-gather-done(%all-gather-start.4)
  %all-reduce.5 = f32[] all-reduce(%loss), channel_id=10, to_apply=%add
  %all-to-all.6 = bf16[64,128]{1,0} all-to-all(%p), channel_id=11
  %rows.7 = bf16[65536,128]{1,0} gather(%p, %places), offset_dims={1}, collapsed_slice_dims={0}
  %transpose.8 = bf16[65536,128]{1,0} transpose(%rows.7), dimensions={0,1}
  %transpose.9 = bf16[128,65536]{1,0} transpose(%transpose.8), dimensions={1,0}
}
"""


def test_collectives_are_told_by_what_runs_beside_them():
    found = Program(PROGRAM).findings()
    assert found["collectives beside other work"] == {"all-reduce": 1, "all-gather": 1}
    assert found["collectives waited for"] == {"reduce-scatter": 1, "all-to-all": 1}


def test_a_transpose_that_leaves_the_axes_as_they_are_is_no_copy():
    assert Program(PROGRAM).findings()["copies and transposes of large arrays"] == {
        "transpose bf16[128,65536]": 1
    }


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_compilers_know_the_options(chip):
    options = training_options("tpu", chip)
    function = jax.jit(jnp.tanh, compiler_options=options, in_shardings=one_chip(chip))
    assert options and function.lower(jax.ShapeDtypeStruct((8, 128), jnp.float32)).compile()


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_each_chip_has_a_train_step_with_options_that_its_compiler_calls_safe(chip):
    """Newer compilers refuse fused collectives on any chip but v5e, since they may give wrong results or hang."""
    options = training_options("tpu", chip)
    assert any("async_collective_fusion" in name for name in options) == (chip == "v5e")
    cfg = decoder(512, 256, 2, 2, 2, 128, 512)
    cfg = cfg.replace(dtype="bfloat16", param_dtype="float32", scan=True, remat="full")
    program = compile_step(cfg, Case({}, CHIPS[chip], MeshSpec(data=1, fsdp=-1), rows=8, length=256))
    assert "flash_forward" in program.as_text()

"""Train steps as libtpu compiles them for slices: kernels are in them, and weights are read as they come."""

import re

import pytest

from benchmarks.compiled import Case, compile_step
from model import Attention, Block, ModelConfig, SwiGLU, decoder
from model.blocks.deltanet import GatedDeltaNet
from model.blocks.mamba2 import Mamba2
from train.config import MeshSpec

from ..model.tpu import CHIPS, needs_libtpu

HYBRID = ModelConfig(
    512,
    256,
    (
        Block(Mamba2(4, 64, 32), None),
        Block(GatedDeltaNet(4, 2, 64, 64), SwiGLU(256)),
        Block(Attention(4, 2, 64), SwiGLU(256)),
    ),
    dtype="bfloat16",
    param_dtype="float32",
    scan=True,
    remat="full",
)


@needs_libtpu
@pytest.mark.slow
def test_four_chips_that_split_rows_and_heads_have_a_program_of_a_hybrid():
    case = Case({}, CHIPS["v5p"], MeshSpec(data=2, tensor=2), rows=4, length=256)
    program = compile_step(HYBRID, case).as_text()
    kernels = "ssd_forward", "ssd_backward", "delta_forward", "delta_backward", "flash_forward"
    assert [name for name in kernels if name not in program] == []


@needs_libtpu
def test_no_weight_of_stacked_layers_is_copied_after_it_was_gathered():
    """That of attention's output is gathered along its last axis, of which each of eight chips has 112: no vector."""
    cfg = decoder(1024, 896, 4, 16, 16, 128, 512).replace(
        dtype="bfloat16", param_dtype="float32", scan=True, remat="full"
    )
    case = Case({}, "v5p:2x2x2", MeshSpec(data=1, fsdp=8), rows=8, length=256)
    program = compile_step(cfg, case).as_text()
    weights = ("16,128,896", "896,16,128", "896,512", "512,896")
    copied = [
        m[0]
        for m in re.finditer(r"= bf16\[([\d,]+)\]\S* (?:copy|transpose)\(", program)
        if m[1].endswith(weights)
    ]
    assert "bf16[16,128,896]" in program and not copied


@needs_libtpu
def test_values_of_narrow_heads_are_not_copied_around_the_kernels_of_state_spaces():
    """Heads of 64 channels fill no vector, so XLA put tokens last in all of a mixer's arrays but the kernels'."""
    cfg = HYBRID.replace(blocks=(Block(Mamba2(16, 64, 128), None),) * 3)
    case = Case({}, "v5p:2x2x2", MeshSpec(data=1, fsdp=8), rows=8, length=512)
    program = compile_step(cfg, case).as_text()
    copies = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", program)
    assert "f32[1,512,1024]" in program and [shape for shape in copies if shape.endswith("512,1024")] == []

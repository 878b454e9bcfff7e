"""The train step of a model of several kinds of mixers has a program for TPUs, with every mixer's kernels in it."""

import pytest

from benchmarks.compiled import Case, compile_step
from model import Attention, Block, ModelConfig, SwiGLU
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

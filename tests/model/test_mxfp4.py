"""Weights in MXFP4, as gpt-oss is published, equal to what transformers unpacks."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from model import Attention, Block, ModelConfig, RMSNorm, Rope, load, save
from model.blocks.experts import ClampedSwiGLU
from model.blocks.moe import MoE
from model.blocks.router import Router
from model.formats.mxfp4 import unpack

from .conftest import GOLDENS, random_params

GOLDEN = np.load(GOLDENS / "mxfp4.npz")
MIXER = Attention(4, 2, 16, Rope(150_000.0), qkv_bias=True, out_bias=True, sinks=True)
CFG = ModelConfig(
    61,
    64,
    (Block(MIXER, MoE(2, 1, ClampedSwiGLU(32), Router(bias=True)), RMSNorm()),) * 4,
    tied_head=False,
    dtype="bfloat16",
    param_dtype="bfloat16",
    family="gpt_oss",
)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_unpacked_blocks_equal_those_of_transformers(name):
    values = unpack(GOLDEN[f"{name}_blocks"], GOLDEN[f"{name}_scales"])
    assert values.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(values.astype(np.float32), GOLDEN[f"{name}_values"])


@pytest.fixture
def packed(tmp_path):
    """A folder whose experts are packed."""
    save(tmp_path / "model", CFG, random_params(CFG), format="huggingface")
    file = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for i in range(4):
        for name in ("gate_up_proj", "down_proj"):
            prefix = f"model.layers.{i}.mlp.experts.{name}"
            del tensors[prefix]
            tensors |= {f"{prefix}_{part}": GOLDEN[f"{name}_{part}"] for part in ("blocks", "scales")}
    safetensors.numpy.save_file(tensors, file)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model"


def test_a_packed_model_is_loaded_and_saved_unpacked(packed, tmp_path):
    cfg, params = load(packed)
    assert cfg == CFG
    experts = params["block_2"]["ffn"]["experts"]
    both = GOLDEN["gate_up_proj_values"]
    np.testing.assert_array_equal(np.asarray(experts["gate"], np.float32), both[..., 0::2])
    np.testing.assert_array_equal(np.asarray(experts["up"], np.float32), both[..., 1::2])
    np.testing.assert_array_equal(np.asarray(experts["down"], np.float32), GOLDEN["down_proj_values"])
    save(tmp_path / "again", cfg, params, format="huggingface")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    np.testing.assert_array_equal(
        load(tmp_path / "again")[1]["block_2"]["ffn"]["experts"]["up"], experts["up"]
    )


def test_blocks_without_their_scales_are_refused(packed):
    file = packed / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    scales = tensors.pop("model.layers.1.mlp.experts.down_proj_scales")
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match="lacks 1 tensors.*model.layers.1.mlp.experts.down_proj"):
        load(packed)
    tensors["model.layers.1.mlp.experts.down_proj_scales"] = scales[:, :5]
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"uint8 \(2, 64, 1, 16\).*uint8 \(2, 5, 1\); wanted uint8"):
        load(packed)


def test_bytes_are_no_weights(tmp_path):
    save(tmp_path / "model", CFG, random_params(CFG), format="huggingface")
    file = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["model.norm.weight"] = np.zeros(64, np.uint8)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match="'model.norm.weight' is uint8; wanted one of F32, F16, BF16"):
        load(tmp_path / "model")

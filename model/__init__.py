"""The model as a pure function, with its blocks, kernels, sharding names, checkpoints and conversions."""

from typing import Literal

from model.blocks.attention import Attention
from model.blocks.ffn import MLP, GatedMLP, GeGLU, ReGLU, SwiGLU
from model.blocks.norms import LayerNorm, RMSNorm
from model.blocks.positions import (
    Alibi,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    Rope,
    SinusoidalPositions,
    YarnScaling,
)
from model.cache import Cache, cache_axes, init_cache, init_pages
from model.config import Block, ModelConfig, ScalarHead, decoder
from model.function import Output, apply, init, logical_axes, param_shapes
from model.inputs import Inputs, Media
from model.parameters import ParamInfo, param_info
from model.quantization import dequantize, quantize
from model.sharding import MESH_AXES, ShardingRules
from model.weighted import WeightedSum

__all__ = [
    "MESH_AXES",
    "MLP",
    "Alibi",
    "Attention",
    "Block",
    "Cache",
    "GatedMLP",
    "GeGLU",
    "Inputs",
    "LayerNorm",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Media",
    "ModelConfig",
    "NTKScaling",
    "Output",
    "ParamInfo",
    "RMSNorm",
    "ReGLU",
    "Rope",
    "ScalarHead",
    "ShardingRules",
    "SinusoidalPositions",
    "SwiGLU",
    "WeightedSum",
    "YarnScaling",
    "apply",
    "cache_axes",
    "decoder",
    "dequantize",
    "init",
    "init_cache",
    "init_pages",
    "load",
    "load_config",
    "logical_axes",
    "param_info",
    "param_shapes",
    "quantize",
    "save",
]


def load(path, **options):
    """Reads (cfg, params) from a run folder, checkpoint, Hugging Face folder or GGUF file. See `formats.storage`."""
    from model.formats.storage import load as load_model

    return load_model(path, **options)


def load_config(path):
    """The `ModelConfig` at a path that `load` takes; reads no weights."""
    from model.formats.storage import load_config as load_model_config

    return load_model_config(path)


def save(path, cfg, params, format: Literal["native", "huggingface", "gguf"] = "native", **options):
    """Write a model as "native", "huggingface" or "gguf". See `model.formats.storage`."""
    from model.formats.storage import save as save_model

    return save_model(path, cfg, params, format=format, **options)

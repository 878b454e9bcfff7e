"""The pure model function and what it is made of: blocks, kernels, sharding names, checkpoints and conversion."""

from typing import Literal

from model.blocks.attention import Attention
from model.blocks.ffn import SwiGLU
from model.blocks.norms import RMSNorm
from model.blocks.positions import Llama3Scaling, Rope
from model.cache import Cache, cache_axes, init_cache, init_pages
from model.config import Block, ModelConfig, ScalarHead, decoder
from model.function import Output, apply, init, logical_axes, param_shapes
from model.sharding import MESH_AXES, ShardingRules
from model.weighted import WeightedSum

__all__ = [
    "MESH_AXES",
    "Attention",
    "Block",
    "Cache",
    "Llama3Scaling",
    "ModelConfig",
    "Output",
    "RMSNorm",
    "Rope",
    "ScalarHead",
    "ShardingRules",
    "SwiGLU",
    "WeightedSum",
    "apply",
    "cache_axes",
    "decoder",
    "init",
    "init_cache",
    "init_pages",
    "load",
    "load_config",
    "logical_axes",
    "param_shapes",
    "save",
]


def load(path, **options):
    """Read (cfg, params) from a run folder, checkpoint, Hugging Face folder or GGUF file. See `model.storage`."""
    from model.storage import load as load_model

    return load_model(path, **options)


def load_config(path):
    """The `ModelConfig` of what `load` takes; reads no weights."""
    from model.storage import load_config as load_model_config

    return load_model_config(path)


def save(path, cfg, params, format: Literal["native", "huggingface", "gguf"] = "native", **options):
    """Write a model as "native", "huggingface" or "gguf". See `model.storage`."""
    from model.storage import save as save_model

    return save_model(path, cfg, params, format=format, **options)

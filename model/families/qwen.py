"""Qwen2 (biases on queries, keys and values) and Qwen3 (norms on queries and keys). arXiv:2407.10671, 2505.09388."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import GatedMLP
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation
from model.families.decoders import (
    NAMES,
    ROTARY,
    read_attention,
    read_head_dim,
    read_model,
    read_rms_norm,
    read_windows,
    window_of,
    write_layer_types,
    write_model,
)
from model.families.rope import read_rope

KINDS = ("full_attention", "sliding_attention")


def read_qwen2(config: Reader) -> ModelConfig:
    config.must_be("attention_bias", False)
    head_dim = read_head_dim(config)
    rope = read_rope(config, head_dim)
    return _read(config, read_attention(config, head_dim, rope, num_kv_heads=32, bias=False, qkv_bias=True))


def read_qwen3(config: Reader) -> ModelConfig:
    head_dim, norm = read_head_dim(config, 128), read_rms_norm(config)
    rope = read_rope(config, head_dim)
    return _read(config, read_attention(config, head_dim, rope, num_kv_heads=32, qk_norm=norm))


def _read(config: Reader, mixer: Attention) -> ModelConfig:
    norm = read_rms_norm(config)
    config.must_be("mlp_bias", False)
    ffn = GatedMLP(config.integer("intermediate_size"), read_activation(config))
    blocks = [Block(dataclasses.replace(mixer, window=w), ffn, norm) for w in read_qwen_windows(config)]
    return read_model(config, blocks, norm, max_length=32768)


def read_qwen_windows(config: Reader) -> list[int | None]:
    """The window of each layer: `use_sliding_window` enables it, `layer_types` or `max_window_layers` select layers."""
    layers = config.layers()
    window, first = config.get("sliding_window", 4096), config.integer("max_window_layers", 28, least=0)
    if config.flag("use_sliding_window", False):
        window = config.integer("sliding_window", 4096)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    else:
        window, kinds = None, ["full_attention"] * layers
    return read_windows(config, config.layer_kinds(layers, KINDS, kinds), window)


def write_windows(cfg: Any) -> dict[str, Any]:
    window = window_of(cfg)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": write_layer_types(cfg),
    }


def write_qwen2(cfg: Any) -> dict[str, Any]:
    return write_model(cfg) | write_windows(cfg)


def write_qwen3(cfg: Any) -> dict[str, Any]:
    return write_model(cfg) | write_windows(cfg) | {"attention_bias": cfg.blocks[0].mixer.qkv_bias}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", read_qwen2, write_qwen2, NAMES, ignored_tensors=ROTARY)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", read_qwen3, write_qwen3, NAMES, ignored_tensors=ROTARY)

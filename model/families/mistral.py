"""Mistral: a Llama with a sliding window. Jiang et al. 2023, arXiv:2310.06825."""

from __future__ import annotations

import dataclasses
from typing import Any

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
    write_model,
)
from model.families.rope import read_rope


def read(config: Reader) -> ModelConfig:
    norm, layers = read_rms_norm(config), config.layers()
    ffn = GatedMLP(config.integer("intermediate_size"), read_activation(config))
    head_dim = read_head_dim(config)
    mixer = read_attention(config, head_dim, read_rope(config, head_dim), num_kv_heads=8, bias=False)
    config.must_be("attention_bias", False)
    config.must_be("mlp_bias", False)
    window = config.integer_or_none("sliding_window", 4096)
    kinds = ["sliding_attention" if window else "full_attention"] * layers
    windows = read_windows(
        config, config.layer_kinds(layers, ("full_attention", "sliding_attention"), kinds), window
    )
    blocks = [Block(dataclasses.replace(mixer, window=w), ffn, norm) for w in windows]
    return read_model(config, blocks, norm, max_length=4096 * 32)


def write(cfg: Any) -> dict[str, Any]:
    return write_model(cfg) | {"sliding_window": window_of(cfg)}


FAMILY = Family("mistral", "MistralForCausalLM", read, write, NAMES, ignored_tensors=ROTARY)

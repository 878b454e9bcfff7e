"""Llama 2, 3, 3.1, 3.2, and models in the same format."""

from __future__ import annotations

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
    write_model,
)
from model.families.rope import read_rope


def read(config: Reader) -> ModelConfig:
    config.must_be("pretraining_tp", 1)
    norm = read_rms_norm(config)
    bias = config.flag("mlp_bias", False)
    ffn = GatedMLP(config.integer("intermediate_size"), read_activation(config), bias)
    head_dim = read_head_dim(config)
    block = Block(read_attention(config, head_dim, read_rope(config, head_dim)), ffn, norm)
    return read_model(config, [block] * config.layers(), norm, max_length=2048)


def write(cfg: Any) -> dict[str, Any]:
    block = cfg.blocks[0]
    if cfg.width % block.mixer.num_heads:
        raise ValueError(
            f"transformers wants the width {cfg.width} to be a multiple of num_heads {block.mixer.num_heads}"
        )
    return write_model(cfg) | {"attention_bias": block.mixer.qkv_bias, "mlp_bias": block.ffn.bias}


FAMILY = Family("llama", "LlamaForCausalLM", read, write, NAMES, ignored_tensors=ROTARY)

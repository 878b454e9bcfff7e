"""Granite 3: a Llama with multipliers on embedding, attention, residual and logits (muP, arXiv:2203.03466)."""

from __future__ import annotations

from typing import Any

from model.blocks.ffn import GatedMLP
from model.blocks.residual import Residual
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
    norm, head_dim = read_rms_norm(config), read_head_dim(config)
    scale = config.number("attention_multiplier", 1.0)
    mixer = read_attention(config, head_dim, read_rope(config, head_dim), scale=scale)
    bias = config.flag("mlp_bias", False)
    ffn = GatedMLP(config.integer("intermediate_size"), read_activation(config), bias)
    block = Block(mixer, ffn, norm, residual=Residual(config.number("residual_multiplier", 1.0)))
    return read_model(
        config,
        [block] * config.layers(),
        norm,
        max_length=2048,
        embed_scale=config.number("embedding_multiplier", 1.0),
        logit_scale=1 / config.number("logits_scaling", 1.0),
    )


def write(cfg: Any) -> dict[str, Any]:
    block = cfg.blocks[0]
    return write_model(cfg) | {
        "attention_bias": block.mixer.qkv_bias,
        "mlp_bias": block.ffn.bias,
        "attention_multiplier": block.mixer.head_dim**-0.5
        if block.mixer.scale is None
        else block.mixer.scale,
        "residual_multiplier": block.residual.scale,
        "embedding_multiplier": cfg.embed_scale,
        "logits_scaling": 1 / cfg.logit_scale,
    }


FAMILY = Family("granite", "GraniteForCausalLM", read, write, NAMES, ignored_tensors=ROTARY)

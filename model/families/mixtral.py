"""Mixtral: Mistral with a mixture of experts. Jiang et al. 2024, arXiv:2401.04088."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.blocks.ffn import GatedMLP
from model.blocks.moe import MoE
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation, written_activation
from model.families.decoders import (
    ATTENTION,
    NORMS,
    OUTSIDE,
    ROTARY,
    read_attention,
    read_head_dim,
    read_model,
    read_rms_norm,
    read_windows,
    window_of,
    write_attention,
)
from model.families.rope import read_rope
from model.families.tensors import Names

EXPERTS: Names = {
    "model.layers.{i}.block_sparse_moe.gate.weight": "ffn/router",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight": "ffn/experts/gate",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight": "ffn/experts/down",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight": "ffn/experts/up",
}


def read(config: Reader) -> ModelConfig:
    norm, head_dim, layers = read_rms_norm(config, 1e-5), read_head_dim(config), config.layers()
    rope = read_rope(config, head_dim, theta=1_000_000.0)
    mixer = read_attention(config, head_dim, rope, num_kv_heads=8, bias=False)
    config.must_be("attention_bias", False)
    expert = GatedMLP(config.integer("intermediate_size"), read_activation(config))
    num_experts = config.integer(config.alias("num_local_experts", "num_experts"), 8)
    ffn = MoE(num_experts, config.integer("num_experts_per_tok", 2), expert)
    window = config.integer_or_none("sliding_window", None)
    kinds = ["sliding_attention" if window else "full_attention"] * layers
    blocks = [
        Block(dataclasses.replace(mixer, window=w), ffn, norm) for w in read_windows(config, kinds, window)
    ]
    return read_model(config, blocks, norm, max_length=4096 * 32)


def write(cfg: Any) -> dict[str, Any]:
    ffn = cfg.blocks[0].ffn
    return {
        "hidden_size": cfg.width,
        "intermediate_size": ffn.expert.width,
        "num_hidden_layers": len(cfg.blocks),
        "hidden_act": written_activation(ffn.expert.activation),
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.final_norm.eps,
        "num_local_experts": ffn.num_experts,
        "num_experts_per_tok": ffn.experts_per_token,
        "sliding_window": window_of(cfg),
    } | write_attention(cfg.blocks[0].mixer)


FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    read,
    write,
    OUTSIDE | NORMS | ATTENTION | EXPERTS,
    ignored_tensors=ROTARY,
)

"""Phi-3 and Phi-4: a Llama with fused projections and long contexts (LongRoPE). arXiv:2404.14219."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.blocks.ffn import GatedMLP
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation
from model.families.decoders import (
    NORMS,
    OUTSIDE,
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
from model.families.tensors import Fused, Names

FUSED: Names = {
    "model.layers.{i}.self_attn.qkv_proj.weight": Fused(("mixer/q", "mixer/k", "mixer/v")),
    "model.layers.{i}.self_attn.o_proj.weight": "mixer/o",
    "model.layers.{i}.mlp.gate_up_proj.weight": Fused(("ffn/gate", "ffn/up")),
    "model.layers.{i}.mlp.down_proj.weight": "ffn/down",
}


def read_phi3(config: Reader) -> ModelConfig:
    norm, head_dim, layers = read_rms_norm(config, 1e-5), read_head_dim(config), config.layers()
    config.must_be("attention_bias", False)
    config.integer("original_max_position_embeddings", 4096)
    rope = read_rope(config, head_dim, fraction=1.0, kinds=("default", "longrope"))
    mixer = read_attention(config, head_dim, rope, bias=False)
    ffn = GatedMLP(config.integer("intermediate_size"), read_activation(config))
    window = config.integer_or_none("sliding_window", None)
    kinds = ["sliding_attention" if window else "full_attention"] * layers
    blocks = [
        Block(dataclasses.replace(mixer, window=w), ffn, norm) for w in read_windows(config, kinds, window)
    ]
    return read_model(config, blocks, norm, max_length=4096)


def write_phi3(cfg: Any) -> dict[str, Any]:
    scaling = cfg.blocks[0].mixer.rope.scaling
    return write_model(cfg) | {
        "sliding_window": window_of(cfg),
        "original_max_position_embeddings": getattr(scaling, "original_max_length", cfg.max_length),
    }


PHI3 = Family(
    "phi3", "Phi3ForCausalLM", read_phi3, write_phi3, OUTSIDE | NORMS | FUSED, ignored_tensors=ROTARY
)

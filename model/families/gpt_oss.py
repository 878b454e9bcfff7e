"""gpt-oss: attention sinks, windows in every other layer, experts with a clamped SwiGLU. arXiv:2508.10925."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.blocks.experts import ClampedSwiGLU
from model.blocks.moe import MoE
from model.blocks.router import Router
from model.config import Block, ModelConfig
from model.families.common import Family, Reader
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
    write_layer_types,
)
from model.families.rope import read_rope
from model.families.tensors import Fused, Names, untransposed

EXPERTS: Names = {
    "model.layers.{i}.self_attn.sinks": "mixer/sinks",
    "model.layers.{i}.mlp.router.weight": "ffn/router",
    "model.layers.{i}.mlp.router.bias": "ffn/router_bias",
    "model.layers.{i}.mlp.experts.gate_up_proj": Fused(
        ("ffn/experts/gate", "ffn/experts/up"), grouped=True, transposed=False
    ),
    "model.layers.{i}.mlp.experts.gate_up_proj_bias": Fused(
        ("ffn/experts/gate_bias", "ffn/experts/up_bias"), grouped=True
    ),
    "model.layers.{i}.mlp.experts.down_proj": untransposed("ffn/experts/down"),
    "model.layers.{i}.mlp.experts.down_proj_bias": "ffn/experts/down_bias",
}
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(config: Reader) -> ModelConfig:
    norm, layers = read_rms_norm(config, 1e-5), config.layers(default=36)
    config.must_be("hidden_act", "silu")  # without effect: the experts have their own
    if "rope_scaling" not in config.saved and not config.saved.get("rope_parameters"):
        config.saved = {**config.saved, "rope_scaling": YARN}
    head_dim = read_head_dim(config, 64)
    rope = read_rope(config, head_dim, theta=150_000.0)
    bias = config.flag("attention_bias", True)
    mixer = read_attention(config, head_dim, rope, num_kv_heads=8, bias=bias, sinks=True)
    width = config.integer("intermediate_size", 2880)
    limit, alpha = config.number("swiglu_limit", 7.0), config.number("swiglu_alpha", 1.702)
    for key in ("experts_per_token", "initial_context_length"):
        config.get(key)  # repeat other keys in OpenAI's own folders
    ffn = MoE(
        config.integer("num_local_experts", 128),
        config.integer("num_experts_per_tok", 4),
        ClampedSwiGLU(width, limit, alpha),
        Router(bias=True),
    )
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    kinds = config.layer_kinds(layers, ("full_attention", "sliding_attention"), kinds)
    windows = read_windows(config, kinds, config.integer("sliding_window", 128))
    blocks = [Block(dataclasses.replace(mixer, window=w), ffn, norm) for w in windows]
    return read_model(config, blocks, norm, max_length=131_072)


def write(cfg: Any) -> dict[str, Any]:
    mixer, ffn = cfg.blocks[0].mixer, cfg.blocks[0].ffn
    return {
        "hidden_size": cfg.width,
        "intermediate_size": ffn.expert.width,
        "num_hidden_layers": len(cfg.blocks),
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.final_norm.eps,
        "attention_bias": mixer.qkv_bias,
        "num_local_experts": ffn.num_experts,
        "num_experts_per_tok": ffn.experts_per_token,
        "swiglu_limit": ffn.expert.limit,
        "swiglu_alpha": ffn.expert.alpha,
        "sliding_window": window_of(cfg) or cfg.max_length,
        "layer_types": write_layer_types(cfg),
    } | write_attention(mixer)


FAMILY = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    read,
    write,
    OUTSIDE | NORMS | ATTENTION | EXPERTS,
    packed=("mxfp4",),
    key_aliases={"num_experts": "num_local_experts"},
    ignored_tensors=ROTARY,
)

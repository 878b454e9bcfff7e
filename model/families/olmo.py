"""OLMo 2, OLMo 3 and OLMoE: a norm on all heads' queries and keys at once. arXiv:2501.00656, 2512.13961, 2409.02060.

OLMo 2 and 3 normalize the outputs of attention and network. Three of four layers of OLMo 3 have a window; the others
have scaled rotary positions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from model.blocks.ffn import GatedMLP
from model.blocks.moe import MoE
from model.blocks.router import Router
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation, written_activation
from model.families.decoders import (
    ATTENTION,
    GATED_MLP,
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
    write_model,
)
from model.families.experts import EXPERTS
from model.families.rope import read_rope, read_ropes, write_ropes
from model.families.tensors import Names

THETAS = {"full_attention": 500_000.0, "sliding_attention": 500_000.0}  # of OLMo 3, by kind of layer
POST_NORMS: Names = {
    "model.layers.{i}.post_attention_layernorm.weight": "mixer_post_norm/scale",
    "model.layers.{i}.post_feedforward_layernorm.weight": "ffn_post_norm/scale",
}


def read_olmo2(config: Reader) -> ModelConfig:
    norm, head_dim = read_rms_norm(config, 1e-5), read_head_dim(config)
    mixer = read_attention(
        config, head_dim, read_rope(config, head_dim), qk_norm=norm, qk_norm_over="all heads"
    )
    ffn = GatedMLP(config.integer("intermediate_size"), read_activation(config))
    block = Block(mixer, ffn, norm=None, post_norm=norm)
    return read_model(config, [block] * config.layers(), norm, max_length=2048)


def write_olmo2(cfg: Any) -> dict[str, Any]:
    return write_model(cfg) | {"attention_bias": cfg.blocks[0].mixer.qkv_bias}


def read_olmo3(config: Reader) -> ModelConfig:
    norm, head_dim, layers = read_rms_norm(config, 1e-5), read_head_dim(config), config.layers()
    kinds = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
    kinds = config.layer_kinds(layers, tuple(THETAS), kinds)
    mixer = read_attention(config, head_dim, None, qk_norm=norm, qk_norm_over="all heads")
    ropes = read_ropes(config, head_dim, THETAS, None)
    ffn = GatedMLP(config.integer("intermediate_size"), read_activation(config))
    windows = read_windows(config, kinds, config.integer_or_none("sliding_window", 4096))
    blocks = [
        Block(dataclasses.replace(mixer, rope=ropes[kind], window=window), ffn, norm=None, post_norm=norm)
        for kind, window in zip(kinds, windows)
    ]
    return read_model(config, blocks, norm, max_length=2048)


def write_olmo3(cfg: Any) -> dict[str, Any]:
    saved = {key: value for key, value in write_olmo2(cfg).items() if not key.startswith("rope_")}
    return (
        saved
        | write_ropes([block.mixer for block in cfg.blocks], THETAS)
        | {"sliding_window": window_of(cfg) or cfg.max_length, "layer_types": write_layer_types(cfg)}
    )


def read_olmoe(config: Reader) -> ModelConfig:
    norm, head_dim = read_rms_norm(config, 1e-5), read_head_dim(config)
    clip = config.number_or_none("clip_qkv", None)
    qk_norm: dict[str, Any] = {
        "qk_norm": norm,
        "qk_norm_over": "all heads",
        "clip_qkv": clip,
        "clip_first": False,
    }
    mixer = read_attention(config, head_dim, read_rope(config, head_dim), **qk_norm)
    expert = GatedMLP(config.integer("intermediate_size"), read_activation(config))
    router = Router(normalize=config.flag("norm_topk_prob", False))
    ffn = MoE(
        config.integer(config.alias("num_experts", "num_local_experts"), 64),
        config.integer("num_experts_per_tok", 8),
        expert,
        router,
    )
    return read_model(config, [Block(mixer, ffn, norm)] * config.layers(), norm, max_length=4096)


def write_olmoe(cfg: Any) -> dict[str, Any]:
    mixer, ffn = cfg.blocks[0].mixer, cfg.blocks[0].ffn
    return {
        "hidden_size": cfg.width,
        "intermediate_size": ffn.expert.width,
        "num_hidden_layers": len(cfg.blocks),
        "hidden_act": written_activation(ffn.expert.activation),
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.final_norm.eps,
        "attention_bias": mixer.qkv_bias,
        "clip_qkv": mixer.clip_qkv,
        "num_experts": ffn.num_experts,
        "num_experts_per_tok": ffn.experts_per_token,
        "norm_topk_prob": ffn.router.normalize,
    } | write_attention(mixer)


OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    read_olmoe,
    write_olmoe,
    OUTSIDE | NORMS | ATTENTION | EXPERTS,
    ignored_tensors=ROTARY,
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    read_olmo2,
    write_olmo2,
    OUTSIDE | ATTENTION | GATED_MLP | POST_NORMS,
    ignored_tensors=ROTARY,
)
OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    read_olmo3,
    write_olmo3,
    OUTSIDE | ATTENTION | GATED_MLP | POST_NORMS,
    ignored_tensors=ROTARY,
)

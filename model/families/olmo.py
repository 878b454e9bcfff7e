"""OLMo 2 and OLMoE: a norm on all heads' queries and keys at once. arXiv:2501.00656, 2409.02060.

OLMo 2 has its other norms on what attention and network give.
"""

from __future__ import annotations

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
    write_attention,
    write_model,
)
from model.families.experts import EXPERTS
from model.families.rope import read_rope
from model.families.tensors import Names

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
    harmless=ROTARY,
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    read_olmo2,
    write_olmo2,
    OUTSIDE | ATTENTION | GATED_MLP | POST_NORMS,
    harmless=ROTARY,
)

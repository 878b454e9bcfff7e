"""Qwen2-MoE (with a gated shared expert) and Qwen3-MoE. arXiv:2407.10671, 2505.09388."""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import GatedMLP
from model.blocks.moe import MoE
from model.blocks.router import Router
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation, written_activation
from model.families.decoders import (
    NAMES,
    ROTARY,
    read_attention,
    read_head_dim,
    read_model,
    read_rms_norm,
    write_attention,
)
from model.families.experts import (
    EXPERTS,
    SHARED_EXPERT,
    dense_of,
    moe_of,
    read_sparse_layers,
    write_sparse_layers,
)
from model.families.rope import read_rope


def read_qwen2_moe(config: Reader) -> ModelConfig:
    head_dim, bias = read_head_dim(config), config.flag("qkv_bias", True)
    rope = read_rope(config, head_dim)
    mixer = read_attention(config, head_dim, rope, num_kv_heads=16, bias=False, qkv_bias=bias)
    shared = GatedMLP(config.integer("shared_expert_intermediate_size", 5632), read_activation(config))
    moe = {"shared": shared, "shared_gate": True}
    return _read(config, mixer, num_experts=60, experts_per_token=4, moe_width=1408, moe=moe)


def read_qwen3_moe(config: Reader) -> ModelConfig:
    head_dim, norm = read_head_dim(config), read_rms_norm(config)
    mixer = read_attention(config, head_dim, read_rope(config, head_dim), num_kv_heads=4, qk_norm=norm)
    return _read(config, mixer, num_experts=128, experts_per_token=8, moe_width=768, moe={})


def _read(
    config: Reader,
    mixer: Attention,
    *,
    num_experts: int,
    experts_per_token: int,
    moe_width: int,
    moe: dict[str, Any],
) -> ModelConfig:
    config.must_be("use_sliding_window", False)
    config.layer_kinds(config.layers(), ("full_attention",), [])
    for key in ("sliding_window", "max_window_layers"):
        config.get(key)  # without effect otherwise
    norm, activation = read_rms_norm(config), read_activation(config)
    num_experts = config.integer(config.alias("num_experts", "num_local_experts"), num_experts, least=0)
    dense = GatedMLP(config.integer("intermediate_size"), activation)
    sparse = read_moe(config, num_experts, experts_per_token, moe_width, normalize=False, **moe)
    layers = read_sparse_layers(config, config.layers(), num_experts)
    blocks = [Block(mixer, sparse if has_experts else dense, norm) for has_experts in layers]
    return read_model(config, blocks, norm, max_length=32768)


def read_moe(
    config: Reader,
    num_experts: int,
    experts_per_token: int,
    moe_width: int,
    *,
    normalize: bool,
    **options: Any,
) -> MoE | None:
    """The experts from Qwen's keys; the other arguments are the family's defaults."""
    experts_per_token = config.integer("num_experts_per_tok", experts_per_token)
    width = config.integer("moe_intermediate_size", moe_width)
    router = Router(normalize=config.flag("norm_topk_prob", normalize))
    if num_experts == 0:
        return None
    expert = GatedMLP(width, read_activation(config))
    return MoE(num_experts, experts_per_token, expert, router, **options)


def write(cfg: Any) -> dict[str, Any]:
    moe, dense, mixer = moe_of(cfg), dense_of(cfg), cfg.blocks[0].mixer
    return (
        {
            "hidden_size": cfg.width,
            "intermediate_size": dense.width if dense else moe.expert.width,
            "num_hidden_layers": len(cfg.blocks),
            "hidden_act": written_activation(moe.expert.activation),
            "max_position_embeddings": cfg.max_length,
            "rms_norm_eps": cfg.final_norm.eps,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.experts_per_token,
            "moe_intermediate_size": moe.expert.width,
            "norm_topk_prob": moe.router.normalize,
            "use_sliding_window": False,
        }
        | write_attention(mixer)
        | write_sparse_layers(cfg)
    )


def write_qwen2_moe(cfg: Any) -> dict[str, Any]:
    moe = moe_of(cfg)
    return write(cfg) | {
        "shared_expert_intermediate_size": moe.shared.width,
        "qkv_bias": cfg.blocks[0].mixer.qkv_bias,
    }


def write_qwen3_moe(cfg: Any) -> dict[str, Any]:
    return write(cfg) | {"attention_bias": cfg.blocks[0].mixer.qkv_bias}


QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    read_qwen2_moe,
    write_qwen2_moe,
    NAMES | EXPERTS | SHARED_EXPERT,
    ignored_tensors=ROTARY,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    read_qwen3_moe,
    write_qwen3_moe,
    NAMES | EXPERTS,
    ignored_tensors=ROTARY,
)

"""GLM-4.5 and 4.6: grouped-query attention with DeepSeek-V3's experts. arXiv:2508.06471."""

from __future__ import annotations

import dataclasses
from typing import Any

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
from model.families.experts import EXPERTS, SHARED_EXPERTS, dense_of, first_sparse_layer, moe_of
from model.families.mtp import nextn, read_mtp, write_mtp
from model.families.rope import read_rope


def read(config: Reader) -> ModelConfig:
    norm, head_dim, activation = read_rms_norm(config, 1e-5), read_head_dim(config), read_activation(config)
    qk_norm = norm if config.flag("use_qk_norm", False) else None
    bias = config.flag("attention_bias", False)
    mixer = read_attention(
        config,
        head_dim,
        read_rope(config, head_dim, fraction=0.5),
        num_kv_heads=8,
        bias=False,
        qkv_bias=bias,
        qk_norm=qk_norm,
    )
    width = config.integer("moe_intermediate_size", 1408)
    router = Router(
        "sigmoid",
        config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 1.0),
        choice_bias=True,
        num_groups=config.integer("n_group", 1),
        groups_per_token=config.integer("topk_group", 1),
    )
    sparse = MoE(
        config.integer(config.alias("n_routed_experts", "num_local_experts", "num_experts"), 128),
        config.integer("num_experts_per_tok", 8),
        GatedMLP(width, activation),
        router,
        shared=GatedMLP(width * config.integer("n_shared_experts", 1), activation),
    )
    block = Block(mixer, sparse, norm)
    plain = dataclasses.replace(block, ffn=GatedMLP(config.integer("intermediate_size"), activation))
    first = config.integer("first_k_dense_replace", 1, least=0)
    blocks = [plain if i < first else block for i in range(config.layers())]
    mtp = read_mtp(config, block, norm)
    return read_model(config, blocks, norm, max_length=131_072, mtp=mtp)


def write(cfg: Any) -> dict[str, Any]:
    mixer, moe, dense = cfg.blocks[0].mixer, moe_of(cfg), dense_of(cfg)
    return {
        "hidden_size": cfg.width,
        "intermediate_size": dense.width if dense else moe.expert.width,
        "num_hidden_layers": len(cfg.blocks),
        "hidden_act": written_activation(moe.expert.activation),
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.final_norm.eps,
        "attention_bias": mixer.qkv_bias,
        "use_qk_norm": mixer.qk_norm is not None,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert.width,
        "n_shared_experts": moe.shared.width // moe.expert.width,
        "routed_scaling_factor": moe.router.scale,
        "norm_topk_prob": moe.router.normalize,
        "n_group": moe.router.num_groups,
        "topk_group": moe.router.groups_per_token,
        "first_k_dense_replace": first_sparse_layer(cfg),
        "partial_rotary_factor": mixer.rope.fraction,
    } | (write_attention(mixer) | write_mtp(cfg))


ALL_NAMES = NAMES | EXPERTS | SHARED_EXPERTS
FAMILY = Family(
    "glm4_moe", "Glm4MoeForCausalLM", read, write, ALL_NAMES | nextn(ALL_NAMES), ignored_tensors=ROTARY
)

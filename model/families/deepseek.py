"""DeepSeek-V2, DeepSeek-V3 and Kimi K2: latent attention and many small experts. arXiv:2405.04434, 2412.19437."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from model.blocks.ffn import GatedMLP
from model.blocks.latent_attention import LatentAttention
from model.blocks.moe import MoE
from model.blocks.norms import RMSNorm
from model.blocks.positions import YarnScaling
from model.blocks.router import Router
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation, written_activation
from model.families.decoders import GATED_MLP, NORMS, OUTSIDE, ROTARY, read_model, read_rms_norm
from model.families.experts import EXPERTS, SHARED_EXPERTS, dense_of, first_sparse_layer, moe_of
from model.families.mtp import nextn, read_mtp, write_mtp
from model.families.rope import read_rope, write_rope, yarn_magnitude
from model.families.tensors import Names

ATTENTION: Names = {
    "model.layers.{i}.self_attn.q_proj.weight": "mixer/q",
    "model.layers.{i}.self_attn.q_a_proj.weight": "mixer/q_a",
    "model.layers.{i}.self_attn.q_a_proj.bias": "mixer/q_a_bias",
    "model.layers.{i}.self_attn.q_a_layernorm.weight": "mixer/q_a_norm/scale",
    "model.layers.{i}.self_attn.q_b_proj.weight": "mixer/q_b",
    "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight": "mixer/kv_a",
    "model.layers.{i}.self_attn.kv_a_proj_with_mqa.bias": "mixer/kv_a_bias",
    "model.layers.{i}.self_attn.kv_a_layernorm.weight": "mixer/kv_a_norm/scale",
    "model.layers.{i}.self_attn.kv_b_proj.weight": "mixer/kv_b",
    "model.layers.{i}.self_attn.o_proj.weight": "mixer/o",
    "model.layers.{i}.self_attn.o_proj.bias": "mixer/o_bias",
}
NAMES: Names = OUTSIDE | NORMS | ATTENTION | GATED_MLP | EXPERTS | SHARED_EXPERTS
V3_NAMES: Names = NAMES | nextn(NAMES)
LATENT_NORM = RMSNorm(1e-6)  # independent of rms_norm_eps


def read_v2(config: Reader) -> ModelConfig:
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method={method!r} is not supported; 'greedy' and 'group_limited_greedy' are.")
    for key in ("aux_loss_alpha", "seq_aux", "ep_size"):
        config.get(key)  # for training, and for expert placement
    config.must_be("norm_topk_prob", False)
    config.must_be("scoring_func", "softmax")
    config.must_be("mlp_bias", False)
    groups, per_token = config.integer_or_none("n_group", None), config.integer_or_none("topk_group", None)
    if method == "greedy":
        groups = per_token = 1
    scale = config.number("routed_scaling_factor", 1.0)
    router = Router("softmax", False, 1.0, scale=scale, **_groups(groups, per_token, "max"))
    return _read(config, router, shared=2, experts=64, dense=0, width=1407, heads=32, interleaved=True)[0]


def read_v3(config: Reader) -> ModelConfig:
    config.must_be("topk_method", "noaux_tc")
    config.must_be("scoring_func", "sigmoid")
    for key in ("ep_size", "moe_layer_freq", "seq_aux", "aux_loss_alpha"):
        config.get(key)
    router = Router(
        "sigmoid",
        config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 2.5),
        choice_bias=True,
        **_groups(config.integer("n_group", 8), config.integer("topk_group", 4), "top2"),
    )
    interleaved = config.flag("rope_interleave", True)
    cfg, block = _read(
        config, router, shared=1, experts=256, dense=3, width=2048, heads=128, interleaved=interleaved
    )
    return cfg.replace(mtp=read_mtp(config, block, read_rms_norm(config)))


def _groups(groups: int | None, per_token: int | None, score: str) -> dict[str, Any]:
    if groups is None or per_token is None:
        raise ValueError(
            f"n_group={groups} and topk_group={per_token}: routing by groups needs numbers for both."
        )
    return {"num_groups": groups, "groups_per_token": per_token, "group_score": score}


def _read(
    config: Reader,
    router: Router,
    *,
    shared: int,
    experts: int,
    dense: int,
    width: int,
    heads: int,
    interleaved: bool,
) -> tuple[ModelConfig, Block]:
    """(the model, a layer with experts)."""
    norm, activation = read_rms_norm(config), read_activation(config)
    config.must_be("pretraining_tp", 1)
    config.must_be("moe_layer_freq", 1)
    width, shared = config.integer("moe_intermediate_size", width), config.integer("n_shared_experts", shared)
    sparse = MoE(
        config.integer(config.alias("n_routed_experts", "num_local_experts", "num_experts"), experts),
        config.integer("num_experts_per_tok", None if router.scores == "softmax" else 8),
        GatedMLP(width, activation),
        router,
        shared=GatedMLP(width * shared, activation),
    )
    first = config.integer("first_k_dense_replace", dense, least=0)
    block = Block(_read_attention(config, heads, interleaved), sparse, norm)
    plain = dataclasses.replace(block, ffn=GatedMLP(config.integer("intermediate_size"), activation))
    blocks = [plain if i < first else block for i in range(config.layers())]
    return read_model(config, blocks, norm, max_length=4096 if router.choice_bias else 2048), block


def _read_attention(config: Reader, heads: int, interleaved: bool) -> LatentAttention:
    num_heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", num_heads)
    if kv_heads != num_heads:
        raise ValueError(
            f"num_key_value_heads={kv_heads} differs from num_attention_heads={num_heads}: latent attention has keys "
            "and values for every head."
        )
    config.get("head_dim")
    nope, rotated = config.integer("qk_nope_head_dim", 128), config.integer("qk_rope_head_dim", 64)
    config.must_be("qk_head_dim", nope + rotated)
    rope = read_rope(config, rotated, interleaved=interleaved)
    scale, saved = None, config.saved.get("rope_parameters") or config.saved.get("rope_scaling") or {}
    if isinstance(rope.scaling, YarnScaling) and saved.get("mscale_all_dim"):
        amount = Reader(saved, "rope_parameters.").number("mscale_all_dim")
        scale = (nope + rotated) ** -0.5 * yarn_magnitude(rope.scaling.factor, amount) ** 2
    return LatentAttention(
        num_heads,
        nope,
        rotated,
        config.integer("v_head_dim", 128),
        config.integer("kv_lora_rank", 512),
        config.integer_or_none("q_lora_rank", 1536),
        rope,
        LATENT_NORM,
        config.flag("attention_bias", False),
        scale,
    )


def _write(cfg: Any) -> dict[str, Any]:
    mixer, moe, dense = cfg.blocks[0].mixer, moe_of(cfg), dense_of(cfg)
    saved = {
        "hidden_size": cfg.width,
        "intermediate_size": dense.width if dense else moe.expert.width,
        "num_hidden_layers": len(cfg.blocks),
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "hidden_act": written_activation(moe.expert.activation),
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.final_norm.eps,
        "attention_bias": mixer.bias,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.v_dim,
        "kv_lora_rank": mixer.kv_rank,
        "q_lora_rank": mixer.q_rank,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert.width,
        "n_shared_experts": moe.shared.width // moe.expert.width,
        "routed_scaling_factor": moe.router.scale,
        "norm_topk_prob": moe.router.normalize,
        "n_group": moe.router.num_groups,
        "topk_group": moe.router.groups_per_token,
        "first_k_dense_replace": first_sparse_layer(cfg),
    } | write_rope(mixer.rope)
    if mixer.scale is not None:
        growth = math.sqrt(mixer.scale * (mixer.nope_dim + mixer.rope_dim) ** 0.5)
        amount = lambda magnitude: round((magnitude - 1) / (0.1 * math.log(mixer.rope.scaling.factor)), 9)
        saved["rope_scaling"]["mscale_all_dim"] = amount(growth)
        # DeepSeek's own code and vLLM have no attention_factor: they divide the magnitudes of mscale (default 1) and
        # mscale_all_dim.
        if (mscale := amount(growth * mixer.rope.scaling.magnitude)) > 0 and mscale != 1:
            saved["rope_scaling"]["mscale"] = mscale
    return saved


def write_v2(cfg: Any) -> dict[str, Any]:
    method = "greedy" if moe_of(cfg).router.num_groups == 1 else "group_limited_greedy"
    return _write(cfg) | {"topk_method": method}


def write_v3(cfg: Any) -> dict[str, Any]:
    return _write(cfg) | write_mtp(cfg) | {"rope_interleave": cfg.blocks[0].mixer.rope.interleaved}


V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", read_v2, write_v2, NAMES, ignored_tensors=ROTARY)
V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", read_v3, write_v3, V3_NAMES, ignored_tensors=ROTARY)
KIMI_K2 = Family("kimi_k2", "DeepseekV3ForCausalLM", read_v3, write_v3, V3_NAMES, ignored_tensors=ROTARY)

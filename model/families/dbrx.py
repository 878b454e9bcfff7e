"""DBRX: LayerNorm without bias, clipped queries, keys and values, many experts. Databricks 2024."""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import GatedMLP
from model.blocks.moe import MoE
from model.blocks.norms import LayerNorm
from model.blocks.router import Router
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation, written_activation
from model.families.decoders import head_width, read_model
from model.families.rope import read_rope, write_scaling
from model.families.tensors import Fused, Merged, Names

NAMES: Names = {
    "transformer.wte.weight": "embedding",
    "transformer.norm_f.weight": "final_norm/scale",
    "lm_head.weight": "head",
    "transformer.blocks.{i}.norm_attn_norm.norm_1.weight": "mixer_norm/scale",
    "transformer.blocks.{i}.norm_attn_norm.attn.Wqkv.weight": Fused(("mixer/q", "mixer/k", "mixer/v")),
    "transformer.blocks.{i}.norm_attn_norm.attn.out_proj.weight": "mixer/o",
    "transformer.blocks.{i}.norm_attn_norm.norm_2.weight": "ffn_norm/scale",
    "transformer.blocks.{i}.ffn.router.layer.weight": "ffn/router",
    "transformer.blocks.{i}.ffn.experts.mlp.w1": Merged("ffn/experts/gate"),
    "transformer.blocks.{i}.ffn.experts.mlp.v1": Merged("ffn/experts/up"),
    "transformer.blocks.{i}.ffn.experts.mlp.w2": Merged("ffn/experts/down", transposed=False),
}
KEY_ALIASES = {"num_attention_heads": "n_heads", "hidden_size": "d_model", "num_hidden_layers": "n_layers"}
KEY_ALIASES |= {"max_position_embeddings": "max_seq_len"}


def read(config: Reader) -> ModelConfig:
    config.must_be("tie_word_embeddings", False)
    config.get("num_key_value_heads")  # repeats attn_config.kv_n_heads
    attention, experts = config.part("attn_config"), config.part("ffn_config")
    for part in (attention, experts):
        part.must_be("is_encoder_decoder", False)
    experts.must_be("uniform_expert_assignment", False)
    for key in ("hidden_size", "moe_jitter_eps", "moe_loss_weight"):
        experts.get(key)  # repeats d_model; for training
    width, heads = config.integer("d_model", 2048), config.integer("n_heads", 16)
    norm = LayerNorm(1e-5, bias=False)
    mixer = Attention(
        heads,
        attention.integer("kv_n_heads", 1),
        head_width(width, heads),
        read_rope(
            config,
            head_width(width, heads),
            theta=attention.number("rope_theta", 10_000.0),
            length_key="max_seq_len",
        ),
        clip_qkv=attention.number_or_none("clip_qkv", None),
    )
    order = experts.number_or_none("moe_normalize_expert_weights", 1.0)
    activation = read_activation(experts.part("ffn_act_fn"), "name", "silu")
    ffn = MoE(
        experts.integer("moe_num_experts", 4),
        experts.integer("moe_top_k", 1),
        GatedMLP(experts.integer("ffn_hidden_size", 3584), activation),
        Router(normalize=order is not None, norm_order=order or 1.0, norm_eps=0.0),
    )
    blocks = [Block(mixer, ffn, norm)] * config.layers("n_layers", 24)
    return read_model(
        config, blocks, norm, width_key="d_model", max_length_key="max_seq_len", max_length=2048
    )


def write(cfg: Any) -> dict[str, Any]:
    mixer, ffn = cfg.blocks[0].mixer, cfg.blocks[0].ffn
    return {
        "d_model": cfg.width,
        "n_heads": mixer.num_heads,
        "n_layers": len(cfg.blocks),
        "max_seq_len": cfg.max_length,
        "rope_parameters": {
            "rope_theta": mixer.rope.theta,
            **(write_scaling(mixer.rope.scaling) or {"rope_type": "default"}),
        },
        "attn_config": {
            "kv_n_heads": mixer.num_kv_heads,
            "clip_qkv": mixer.clip_qkv,
            "rope_theta": mixer.rope.theta,
        },
        "ffn_config": {
            "moe_num_experts": ffn.num_experts,
            "moe_top_k": ffn.experts_per_token,
            "ffn_hidden_size": ffn.expert.width,
            "ffn_act_fn": {"name": written_activation(ffn.expert.activation)},
            "moe_normalize_expert_weights": ffn.router.norm_order if ffn.router.normalize else None,
        },
    }


FAMILY = Family("dbrx", "DbrxForCausalLM", read, write, NAMES, key_aliases=KEY_ALIASES)

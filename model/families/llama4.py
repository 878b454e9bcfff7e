"""Llama 4 (text): chunked attention with rope, full attention without; one routed and one shared expert a token."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.blocks.attention import Temperature
from model.blocks.ffn import GatedMLP
from model.blocks.moe import MoE
from model.blocks.norms import RMSNorm
from model.blocks.router import Router
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
    write_attention,
)
from model.families.experts import dense_of, moe_of
from model.families.rope import read_rope, write_rope
from model.families.smollm3 import read_rotated_layers
from model.families.tensors import Fused, Names, untransposed

NAMES: Names = (
    OUTSIDE
    | NORMS
    | ATTENTION
    | {
        "model.layers.{i}.feed_forward.gate_proj.weight": "ffn/gate",
        "model.layers.{i}.feed_forward.up_proj.weight": "ffn/up",
        "model.layers.{i}.feed_forward.down_proj.weight": "ffn/down",
        "model.layers.{i}.feed_forward.router.weight": "ffn/router",
        "model.layers.{i}.feed_forward.experts.gate_up_proj": Fused(
            ("ffn/experts/gate", "ffn/experts/up"), transposed=False
        ),
        "model.layers.{i}.feed_forward.experts.down_proj": untransposed("ffn/experts/down"),
        "model.layers.{i}.feed_forward.shared_expert.gate_proj.weight": "ffn/shared/gate",
        "model.layers.{i}.feed_forward.shared_expert.up_proj.weight": "ffn/shared/up",
        "model.layers.{i}.feed_forward.shared_expert.down_proj.weight": "ffn/shared/down",
    }
)
KINDS = ("full_attention", "chunked_attention")


def read(config: Reader) -> ModelConfig:
    norm, head_dim, layers = read_rms_norm(config, 1e-5), read_head_dim(config, 128), config.layers()
    config.get("for_llm_compressor")
    rope = read_rope(config, head_dim, theta=500_000.0, interleaved=True)
    mixer = read_attention(config, head_dim, rope, num_kv_heads=8)
    rotated = read_rotated_layers(config, layers)
    kinds = [KINDS[uses_rope] for uses_rope in rotated]
    kinds = config.layer_kinds(layers, KINDS, kinds)
    chunk = config.integer_or_none("attention_chunk_size", 8192)
    qk_norm = RMSNorm(norm.eps, scale=False) if config.flag("use_qk_norm", True) else None
    temperature = Temperature(config.number("floor_scale", 8192), config.number("attn_scale", 0.1))
    if not config.flag("attn_temperature_tuning", True):
        temperature = None
    with_rope = {"qk_norm": qk_norm, "qk_norm_first": False}
    without = {"rope": None, "temperature": temperature}
    mixers = [
        dataclasses.replace(
            mixer,
            chunk=chunk if kind == "chunked_attention" else None,
            **(with_rope if uses_rope else without),
        )
        for uses_rope, kind in zip(rotated, kinds)
    ]
    ffns = _read_ffns(config, layers)
    blocks = [Block(mixer, ffn, norm) for mixer, ffn in zip(mixers, ffns)]
    return read_model(config, blocks, norm, max_length=4096 * 32)


def _read_ffns(config: Reader, layers: int) -> list[GatedMLP | MoE]:
    activation = read_activation(config)
    expert = GatedMLP(config.integer("intermediate_size"), activation)
    dense = GatedMLP(config.integer("intermediate_size_mlp", 16384), activation)
    moe = MoE(
        config.integer("num_local_experts", 16),
        config.integer("num_experts_per_tok", 1),
        expert,
        Router("sigmoid", normalize=False),
        shared=expert,
        weigh_input=True,
    )
    every = config.integer("interleave_moe_layer_step", 1)
    sparse = config.get("moe_layers")
    if sparse is None:
        sparse = list(range(every - 1, layers, every))
    if not isinstance(sparse, list) or any(type(i) is not int for i in sparse):
        raise ValueError(f"moe_layers={str(sparse)[:200]} is not a list of layer numbers.")
    sparse = set(sparse)
    return [moe if i in sparse else dense for i in range(layers)]


def write(cfg: Any) -> dict[str, Any]:
    mixers, moe, dense = [block.mixer for block in cfg.blocks], moe_of(cfg), dense_of(cfg)
    rotated = next((mixer for mixer in mixers if mixer.rope), mixers[0])
    unrotated = next((mixer for mixer in mixers if not mixer.rope), None)
    temperature = unrotated.temperature if unrotated else Temperature(8192.0, 0.1)
    saved = {
        "hidden_size": cfg.width,
        "intermediate_size": moe.expert.width,
        "intermediate_size_mlp": dense.width if dense else moe.expert.width,
        "num_hidden_layers": len(cfg.blocks),
        "hidden_act": written_activation(moe.expert.activation),
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.final_norm.eps,
        "attention_bias": mixers[0].qkv_bias,
        "use_qk_norm": rotated.qk_norm is not None,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_layers": [i for i, block in enumerate(cfg.blocks) if isinstance(block.ffn, MoE)],
        "no_rope_layers": [int(mixer.rope is not None) for mixer in mixers],
        "layer_types": [KINDS[mixer.chunk is not None] for mixer in mixers],
        "attention_chunk_size": next((mixer.chunk for mixer in mixers if mixer.chunk), None),
        "attn_temperature_tuning": temperature is not None,
    }
    if temperature is not None:
        saved |= {"floor_scale": int(temperature.every), "attn_scale": temperature.amount}
    return saved | write_attention(mixers[0]) | (write_rope(rotated.rope) if rotated.rope else {})


FAMILY = Family("llama4_text", "Llama4ForCausalLM", read, write, NAMES, ignored_tensors=ROTARY)

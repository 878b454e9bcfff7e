"""Gemma 1, 2 and 3 (text). arXiv:2403.08295, 2408.00118, 2503.19786."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.blocks.ffn import GatedMLP
from model.blocks.norms import RMSNorm
from model.blocks.positions import Rope
from model.config import Block, ModelConfig
from model.families.common import ACTIVATIONS, Family, Reader, read_activation
from model.families.decoders import (
    ATTENTION,
    GATED_MLP,
    NAMES,
    OUTSIDE,
    ROTARY,
    read_attention,
    read_head_dim,
    read_model,
    read_rms_norm,
    read_windows,
    window_of,
    write_layer_types,
    write_model,
)
from model.families.rope import read_rope, read_ropes, write_ropes
from model.families.tensors import Names

KINDS = ("full_attention", "sliding_attention")
THETAS = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}  # of Gemma 3
SANDWICH: Names = (
    OUTSIDE
    | ATTENTION
    | GATED_MLP
    | {
        "model.layers.{i}.input_layernorm.weight": "mixer_norm/scale",
        "model.layers.{i}.post_attention_layernorm.weight": "mixer_post_norm/scale",
        "model.layers.{i}.pre_feedforward_layernorm.weight": "ffn_norm/scale",
        "model.layers.{i}.post_feedforward_layernorm.weight": "ffn_post_norm/scale",
    }
)


def read_gemma(config: Reader) -> ModelConfig:
    config.must_be("use_bidirectional_attention", False)
    config.get("hidden_activation")  # ignored by transformers
    norm = read_rms_norm(config, zero_centered=True)
    activation = config.choice("hidden_act", ACTIVATIONS | {"gelu": "gelu_tanh"}, "gelu_pytorch_tanh")
    head_dim = read_head_dim(config, 256)
    mixer = read_attention(config, head_dim, read_rope(config, head_dim), num_kv_heads=16)
    block = Block(mixer, GatedMLP(config.integer("intermediate_size"), activation), norm)
    width = config.integer("hidden_size")
    return read_model(
        config, [block] * config.layers(), norm, tied=True, max_length=8192, embed_scale=width**0.5
    )


def write_gemma(cfg: Any) -> dict[str, Any]:
    saved = write_model(cfg) | {"attention_bias": cfg.blocks[0].mixer.qkv_bias}
    if cfg.blocks[0].ffn.activation == "gelu_tanh":
        saved |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    return saved


def read_gemma2(config: Reader) -> ModelConfig:
    layers = config.layers()
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    rope = read_rope(config, read_head_dim(config, 256))
    return _read_sandwich(
        config,
        config.layer_kinds(layers, KINDS, kinds),
        dict.fromkeys(KINDS, rope),
        max_length=8192,
        softcap=config.number_or_none("attn_logit_softcapping", 50.0),
        logit_softcap=config.number_or_none("final_logit_softcapping", 30.0),
    )


def read_gemma3(config: Reader) -> ModelConfig:
    layers, pattern = config.layers(), config.integer("sliding_window_pattern", 6)
    config.get("_sliding_window_pattern")
    config.must_be("attn_logit_softcapping", None)  # ignored by transformers
    kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    return _read_sandwich(
        config,
        config.layer_kinds(layers, KINDS, kinds),
        read_ropes(
            config, read_head_dim(config, 256), THETAS, "rope_local_base_freq", kinds=("default", "linear")
        ),
        max_length=131_072,
        softcap=None,
        logit_softcap=config.number_or_none("final_logit_softcapping", None),
        qk_norm=read_rms_norm(config, zero_centered=True),
    )


def _read_sandwich(
    config: Reader,
    kinds: list[str],
    ropes: dict[str, Rope],
    *,
    max_length: int,
    softcap: float | None,
    logit_softcap: float | None,
    qk_norm: RMSNorm | None = None,
) -> ModelConfig:
    config.must_be("use_bidirectional_attention", False)
    config.get("hidden_act")  # ignored by transformers
    norm, head_dim = read_rms_norm(config, zero_centered=True), read_head_dim(config, 256)
    scale = config.number("query_pre_attn_scalar", 256) ** -0.5
    mixer = read_attention(
        config, head_dim, None, num_kv_heads=4, scale=scale, softcap=softcap, qk_norm=qk_norm
    )
    activation = read_activation(config, "hidden_activation", "gelu_pytorch_tanh")
    ffn = GatedMLP(config.integer("intermediate_size"), activation)
    windows = read_windows(config, kinds, config.integer("sliding_window", 4096))
    mixers = [
        dataclasses.replace(mixer, rope=ropes[kind], window=window) for kind, window in zip(kinds, windows)
    ]
    return read_model(
        config,
        [Block(mixer, ffn, norm, post_norm=norm) for mixer in mixers],
        norm,
        tied=True,
        max_length=max_length,
        embed_scale=config.integer("hidden_size") ** 0.5,
        logit_softcap=logit_softcap,
    )


def write_gemma2(cfg: Any) -> dict[str, Any]:
    mixer, ffn = cfg.blocks[0].mixer, cfg.blocks[0].ffn
    activation = "gelu_pytorch_tanh" if ffn.activation == "gelu_tanh" else ffn.activation
    return write_model(cfg, "hidden_activation") | {
        "hidden_activation": activation,
        "query_pre_attn_scalar": round(mixer.scale**-2),
        "attn_logit_softcapping": mixer.softcap,
        "final_logit_softcapping": cfg.logit_softcap,
        "attention_bias": mixer.qkv_bias,
        "sliding_window": window_of(cfg) or cfg.max_length,
        "layer_types": write_layer_types(cfg),
    }


def write_gemma3(cfg: Any) -> dict[str, Any]:
    saved = write_gemma2(cfg)
    saved = {key: value for key, value in saved.items() if not key.startswith("rope_")}
    return saved | write_ropes([block.mixer for block in cfg.blocks], THETAS)


GEMMA = Family("gemma", "GemmaForCausalLM", read_gemma, write_gemma, NAMES, ignored_tensors=ROTARY)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", read_gemma2, write_gemma2, SANDWICH, ignored_tensors=ROTARY)
GEMMA3 = Family(
    "gemma3_text", "Gemma3ForCausalLM", read_gemma3, write_gemma3, SANDWICH, ignored_tensors=ROTARY
)

"""StarCoder2: LayerNorm, a plain network, biases everywhere, a sliding window. arXiv:2402.19173."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.blocks.ffn import MLP
from model.blocks.norms import LayerNorm
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
    read_windows,
    window_of,
    write_attention,
)
from model.families.rope import read_rope
from model.families.tensors import Names

NAMES: Names = (
    OUTSIDE
    | NORMS
    | ATTENTION
    | {
        "model.norm.bias": "final_norm/bias",
        "model.layers.{i}.input_layernorm.bias": "mixer_norm/bias",
        "model.layers.{i}.post_attention_layernorm.bias": "ffn_norm/bias",
        "model.layers.{i}.mlp.c_fc.weight": "ffn/up",
        "model.layers.{i}.mlp.c_fc.bias": "ffn/up_bias",
        "model.layers.{i}.mlp.c_proj.weight": "ffn/down",
        "model.layers.{i}.mlp.c_proj.bias": "ffn/down_bias",
    }
)


def read(config: Reader) -> ModelConfig:
    norm, layers = LayerNorm(config.number("norm_epsilon", 1e-5)), config.layers()
    config.must_be("norm_type", "layer_norm")
    config.must_be("mlp_type", "default")
    bias, head_dim = config.flag("use_bias", True), read_head_dim(config)
    mixer = read_attention(config, head_dim, read_rope(config, head_dim), num_kv_heads=2, bias=bias)
    ffn = MLP(config.integer("intermediate_size"), read_activation(config, default="gelu_pytorch_tanh"), bias)
    window = config.integer_or_none("sliding_window", None)
    kinds = ["sliding_attention" if window else "full_attention"] * layers
    blocks = [
        Block(dataclasses.replace(mixer, window=w), ffn, norm) for w in read_windows(config, kinds, window)
    ]
    return read_model(config, blocks, norm, tied=True, max_length=4096)


def write(cfg: Any) -> dict[str, Any]:
    block = cfg.blocks[0]
    return {
        "hidden_size": cfg.width,
        "intermediate_size": block.ffn.width,
        "num_hidden_layers": len(cfg.blocks),
        "hidden_act": written_activation(block.ffn.activation, "gelu_pytorch_tanh"),
        "max_position_embeddings": cfg.max_length,
        "norm_epsilon": block.norm.eps,
        "use_bias": block.ffn.bias,
        "sliding_window": window_of(cfg),
    } | write_attention(block.mixer)


FAMILY = Family("starcoder2", "Starcoder2ForCausalLM", read, write, NAMES, ignored_tensors=ROTARY)

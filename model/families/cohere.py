"""Cohere's Command-R: parallel attention and network after one LayerNorm, interleaved rotary positions."""

from __future__ import annotations

from typing import Any

from model.blocks.ffn import GatedMLP
from model.blocks.norms import LayerNorm
from model.blocks.residual import ParallelResidual
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation
from model.families.decoders import (
    NAMES,
    ROTARY,
    read_attention,
    read_head_dim,
    read_model,
    write_model,
)
from model.families.rope import read_rope
from model.families.tensors import Names, Whole


def read(config: Reader) -> ModelConfig:
    norm = LayerNorm(config.number("layer_norm_eps", 1e-5), bias=False)
    head_dim = read_head_dim(config)
    rope = read_rope(config, head_dim, theta=500_000.0, interleaved=True)
    qk_norm = norm if config.flag("use_qk_norm", False) else None
    mixer = read_attention(config, head_dim, rope, qk_norm=qk_norm, qk_norm_over="own head")
    ffn = GatedMLP(config.integer("intermediate_size"), read_activation(config))
    block = Block(mixer, ffn, norm, residual=ParallelResidual("one norm"))
    return read_model(
        config,
        [block] * config.layers(),
        norm,
        tied=True,
        max_length=8192,
        logit_scale=config.number("logit_scale", 0.0625),
    )


def write(cfg: Any) -> dict[str, Any]:
    mixer = cfg.blocks[0].mixer
    saved = write_model(cfg) | {
        "attention_bias": mixer.qkv_bias,
        "layer_norm_eps": cfg.final_norm.eps,
        "logit_scale": cfg.logit_scale,
        "use_qk_norm": mixer.qk_norm is not None,
    }
    del saved["rms_norm_eps"]
    return saved


QK_NORMS: Names = {
    "model.layers.{i}.self_attn.q_norm.weight": Whole("mixer/q_norm/scale"),
    "model.layers.{i}.self_attn.k_norm.weight": Whole("mixer/k_norm/scale"),
}
FAMILY = Family("cohere", "CohereForCausalLM", read, write, NAMES | QK_NORMS, ignored_tensors=ROTARY)

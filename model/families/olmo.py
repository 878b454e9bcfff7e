"""OLMo 2: norms on what attention and network give, and on all heads' queries and keys at once. arXiv:2501.00656."""

from __future__ import annotations

from typing import Any

from model.blocks.ffn import GatedMLP
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation
from model.families.decoders import (
    ATTENTION,
    GATED_MLP,
    OUTSIDE,
    ROTARY,
    read_attention,
    read_head_dim,
    read_model,
    read_rms_norm,
    write_model,
)
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


OLMO2 = Family(
    "olmo2", "Olmo2ForCausalLM", read_olmo2, write_olmo2, OUTSIDE | ATTENTION | GATED_MLP | POST_NORMS, ROTARY
)

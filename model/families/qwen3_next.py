"""Qwen3-Next: three layers of gated DeltaNet to one of gated attention, many experts. Qwen team 2025."""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.deltanet import GatedDeltaNet
from model.blocks.ffn import GatedMLP
from model.config import Block, ModelConfig
from model.families.common import SILU, Family, Reader, read_activation
from model.families.decoders import (
    NAMES,
    ROTARY,
    read_attention,
    read_head_dim,
    read_model,
    read_rms_norm,
    write_attention,
)
from model.families.experts import EXPERTS, SHARED_EXPERT, moe_of, read_sparse_layers
from model.families.mtp import mtp, read_mtp, write_mtp
from model.families.qwen_moe import read_moe, write
from model.families.rope import read_rope
from model.families.tensors import Conv, Fused, Names

LINEAR = "model.layers.{i}.linear_attn"
ATTENTION: Names = {
    "model.layers.{i}.self_attn.q_proj.weight": Fused(("mixer/q", "mixer/gate"), grouped=True),
    "model.layers.{i}.self_attn.q_proj.bias": Fused(("mixer/q_bias", "mixer/gate_bias"), grouped=True),
}
DELTANET: Names = {
    f"{LINEAR}.in_proj_qkvz.weight": Fused(("mixer/q", "mixer/k", "mixer/v", "mixer/z"), grouped=True),
    f"{LINEAR}.in_proj_ba.weight": Fused(("mixer/b", "mixer/a"), grouped="mixer/k"),
    f"{LINEAR}.conv1d.weight": Conv(("mixer/conv_q", "mixer/conv_k", "mixer/conv_v")),
    f"{LINEAR}.dt_bias": "mixer/dt_bias",
    f"{LINEAR}.A_log": "mixer/A_log",
    f"{LINEAR}.norm.weight": "mixer/norm",
    f"{LINEAR}.out_proj.weight": "mixer/o",
}
KINDS = ("linear_attention", "full_attention")


def read(config: Reader) -> ModelConfig:
    config.must_be("hidden_act", *SILU)  # transformers has it in the linear layers too
    norm, layers = read_rms_norm(config, zero_centered=True), config.layers()
    head_dim = read_head_dim(config, 256)
    rope = read_rope(config, head_dim, fraction=0.25)
    attention = read_attention(config, head_dim, rope, num_kv_heads=2, qk_norm=norm, gate=True)
    linear = GatedDeltaNet(
        config.integer("linear_num_value_heads", 32),
        config.integer("linear_num_key_heads", 16),
        config.integer("linear_key_head_dim", 128),
        config.integer("linear_value_head_dim", 128),
        config.integer("linear_conv_kernel_dim", 4),
        norm.eps,
    )
    config.must_be("use_sliding_window", False)
    every = config.integer("full_attention_interval", 4)
    kinds = [KINDS[(i + 1) % every == 0] for i in range(layers)]
    kinds = config.layer_kinds(layers, KINDS, kinds)
    num_experts = config.integer(config.alias("num_experts", "num_local_experts"), 512, least=0)
    shared = GatedMLP(config.integer("shared_expert_intermediate_size", 512), read_activation(config))
    sparse = read_moe(config, num_experts, 10, 512, normalize=True, shared=shared, shared_gate=True)
    dense = GatedMLP(config.integer("intermediate_size"), read_activation(config))
    blocks = [
        Block(attention if kind == "full_attention" else linear, sparse if has_experts else dense, norm)
        for kind, has_experts in zip(kinds, read_sparse_layers(config, layers, num_experts))
    ]
    modules = read_mtp(config, Block(attention, sparse or dense, norm), norm, most=1)
    return read_model(config, blocks, norm, max_length=32768, mtp=modules)


def write_next(cfg: Any) -> dict[str, Any]:
    attention = next(block.mixer for block in cfg.blocks if isinstance(block.mixer, Attention))
    linear = next(block.mixer for block in cfg.blocks if isinstance(block.mixer, GatedDeltaNet))
    with_attention = cfg.replace(blocks=tuple(block.__class__(attention, block.ffn) for block in cfg.blocks))
    return (
        write(with_attention)
        | write_attention(attention)
        | write_mtp(cfg)
        | {
            "attention_bias": attention.qkv_bias,
            "shared_expert_intermediate_size": moe_of(cfg).shared.width,
            "linear_num_value_heads": linear.num_heads,
            "linear_num_key_heads": linear.num_key_heads,
            "linear_key_head_dim": linear.key_dim,
            "linear_value_head_dim": linear.value_dim,
            "linear_conv_kernel_dim": linear.conv_width,
            "layer_types": [KINDS[isinstance(block.mixer, Attention)] for block in cfg.blocks],
        }
    )


ALL_NAMES = NAMES | EXPERTS | SHARED_EXPERT
FAMILY = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    read,
    write_next,
    ALL_NAMES | mtp(ALL_NAMES | ATTENTION),
    {Attention: ATTENTION, GatedDeltaNet: DELTANET},
    ignored_tensors=ROTARY,
)

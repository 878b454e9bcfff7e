"""Jamba: Mamba with some attention layers, and experts in every other layer. arXiv:2403.19887."""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import GatedMLP
from model.blocks.mamba import Mamba
from model.blocks.moe import MoE
from model.blocks.router import Router
from model.config import Block, ModelConfig
from model.families.common import SILU, Family, Reader, read_activation, written_activation
from model.families.decoders import ATTENTION, OUTSIDE, head_width, read_model, read_rms_norm
from model.families.experts import dense_of
from model.families.mamba import mamba_names, read_rank
from model.families.tensors import Names

NAMES: Names = {
    **{name: ours for name, ours in OUTSIDE.items() if ours != "final_norm/scale"},
    "model.final_layernorm.weight": "final_norm/scale",
    "model.layers.{i}.input_layernorm.weight": "mixer_norm/scale",
    "model.layers.{i}.pre_ff_layernorm.weight": "ffn_norm/scale",
    "model.layers.{i}.feed_forward.gate_proj.weight": "ffn/gate",
    "model.layers.{i}.feed_forward.up_proj.weight": "ffn/up",
    "model.layers.{i}.feed_forward.down_proj.weight": "ffn/down",
    "model.layers.{i}.feed_forward.router.weight": "ffn/router",
    "model.layers.{i}.feed_forward.experts.{e}.gate_proj.weight": "ffn/experts/gate",
    "model.layers.{i}.feed_forward.experts.{e}.up_proj.weight": "ffn/experts/up",
    "model.layers.{i}.feed_forward.experts.{e}.down_proj.weight": "ffn/experts/down",
}

# implementation options, which do not change the numbers
HOW = ("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep")
MAMBA: Names = {
    **mamba_names("model.layers.{i}.mamba"),
    "model.layers.{i}.mamba.dt_layernorm.weight": "mixer/dt_low_norm/scale",
    "model.layers.{i}.mamba.b_layernorm.weight": "mixer/B_norm/scale",
    "model.layers.{i}.mamba.c_layernorm.weight": "mixer/C_norm/scale",
}
KEY_ALIASES = {"num_local_experts": "num_experts"}


def read(config: Reader) -> ModelConfig:
    for key in HOW:
        config.get(key)
    norm, width, heads = (
        read_rms_norm(config),
        config.integer("hidden_size"),
        config.integer("num_attention_heads"),
    )
    config.must_be("sliding_window", None)
    config.must_be("head_dim", head_width(width, heads))
    attention = Attention(
        heads, config.integer("num_key_value_heads", 8), head_width(width, heads), rope=None
    )
    mamba = Mamba(
        int(config.number("mamba_expand", 2) * width),
        config.integer("mamba_d_state", 16),
        read_rank(config, "mamba_dt_rank", width),
        config.integer("mamba_d_conv", 4),
        config.flag("mamba_conv_bias", True),
        config.flag("mamba_proj_bias", False),
        norm,
    )
    config.must_be("hidden_act", *SILU)  # transformers has it in Mamba too
    dense = GatedMLP(config.integer("intermediate_size"), read_activation(config))
    num_experts, per_token = config.integer("num_experts", 16), config.integer("num_experts_per_tok", 2)
    sparse = MoE(num_experts, per_token, dense, Router(normalize=False)) if num_experts > 1 else dense
    layers = range(config.layers())
    with_attention, with_experts = _every(config, "attn_layer", 8, 4), _every(config, "expert_layer", 2, 1)
    blocks = [
        Block(attention if with_attention(i) else mamba, sparse if with_experts(i) else dense, norm)
        for i in layers
    ]
    return read_model(config, blocks, norm, max_length=262_144)


def _every(config: Reader, prefix: str, period: int, offset: int):
    period = config.integer(f"{prefix}_period", period)
    offset = config.integer(f"{prefix}_offset", offset, least=0)
    if offset >= period:
        raise ValueError(f"{prefix}_offset={offset} is not below {prefix}_period={period}.")
    return lambda i: i % period == offset


def write(cfg: Any) -> dict[str, Any]:
    layers = len(cfg.blocks)
    attention = [i for i, block in enumerate(cfg.blocks) if isinstance(block.mixer, Attention)]
    experts = [i for i, block in enumerate(cfg.blocks) if isinstance(block.ffn, MoE)]
    mamba = next(block.mixer for block in cfg.blocks if isinstance(block.mixer, Mamba))
    heads = cfg.blocks[attention[0]].mixer
    moe: Any = cfg.blocks[experts[0]].ffn if experts else None
    dense = dense_of(cfg) or moe.expert
    expand = mamba.width / cfg.width
    return {
        "hidden_size": cfg.width,
        "intermediate_size": dense.width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_kv_heads,
        "hidden_act": written_activation(dense.activation),
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.final_norm.eps,
        "attention_dropout": 0.0,
        "mamba_expand": int(expand) if expand == int(expand) else expand,
        "mamba_d_state": mamba.state_dim,
        "mamba_dt_rank": mamba.dt_rank,
        "mamba_d_conv": mamba.conv_width,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
        "num_experts": moe.num_experts if moe else 1,
        "num_experts_per_tok": moe.experts_per_token if moe else 1,
        "use_mamba_kernels": False,
        **_period("attn_layer", attention, layers),
        **_period("expert_layer", experts, layers),
    }


def _period(prefix: str, layers: list[int], count: int) -> dict[str, int]:
    period = layers[1] - layers[0] if len(layers) > 1 else count
    return {f"{prefix}_period": period, f"{prefix}_offset": layers[0] if layers else period - 1}


FAMILY = Family(
    "jamba",
    "JambaForCausalLM",
    read,
    write,
    NAMES,
    {Attention: ATTENTION, Mamba: MAMBA},
    key_aliases=KEY_ALIASES,
)

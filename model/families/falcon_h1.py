"""Falcon-H1: parallel attention and Mamba-2 in every layer, with multipliers. arXiv:2507.22448."""

from __future__ import annotations

from typing import Any

from model.blocks.ffn import GatedMLP
from model.blocks.mamba2 import Mamba2
from model.blocks.parallel import Parallel
from model.config import Block, ModelConfig
from model.families.common import SILU, Family, Reader, read_activation, written_activation
from model.families.decoders import (
    ATTENTION,
    head_width,
    read_attention,
    read_head_dim,
    read_model,
    read_rms_norm,
    write_attention,
)
from model.families.mamba import mamba2_names, read_time_step_limit, write_time_step_limit
from model.families.rope import read_rope
from model.families.tensors import Names

NAMES: Names = {
    "model.embed_tokens.weight": "embedding",
    "model.final_layernorm.weight": "final_norm/scale",
    "lm_head.weight": "head",
    "model.layers.{i}.input_layernorm.weight": "mixer_norm/scale",
    "model.layers.{i}.pre_ff_layernorm.weight": "ffn_norm/scale",
    **mamba2_names("model.layers.{i}.mamba", "mixer/mixer_0"),
    **{name: str(ours).replace("mixer/", "mixer/mixer_1/") for name, ours in ATTENTION.items()},
    **{
        f"model.layers.{{i}}.feed_forward.{name}_proj.{kind}": f"ffn/{name}{suffix}"
        for name in ("gate", "up", "down")
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
    },
}


def read(config: Reader) -> ModelConfig:
    for key in ("num_logits_to_keep", "mamba_chunk_size", "layers_block_type", "mamba_use_mlp"):
        config.get(key)  # implementation options, which do not change the numbers
    config.must_be("hidden_act", *SILU)  # transformers has it in Mamba too
    norm, head_dim = read_rms_norm(config, 1e-5), read_head_dim(config)
    attention = read_attention(
        config,
        head_dim,
        read_rope(config, head_dim),
        num_kv_heads=8,
        key_scale=config.number("key_multiplier", 1.0),
    )
    config.must_be("projectors_bias", attention.out_bias)
    gate_scale, down_scale = _multipliers(config, "mlp_multipliers", 2)
    ffn = GatedMLP(
        config.integer("intermediate_size"),
        read_activation(config),
        config.flag("mlp_bias", False),
        gate_scale,
        down_scale,
    )
    scales = [config.number(f"attention_{side}_multiplier", 1.0) for side in ("in", "out")]
    mixer = Parallel((_read_mamba(config, norm.eps), attention), (1.0, scales[0]), (1.0, scales[1]))
    return read_model(
        config,
        [Block(mixer, ffn, norm)] * config.layers(),
        norm,
        max_length=8192,
        embed_scale=config.number("embedding_multiplier", 1.0),
        logit_scale=config.number("lm_head_multiplier", 1.0),
    )


def _read_mamba(config: Reader, eps: float) -> Mamba2:
    expanded = int(config.number("mamba_expand", 2) * config.integer("hidden_size"))
    config.get("mamba_expand")
    inner = expanded if config.get("mamba_d_ssm", 1024) is None else config.integer("mamba_d_ssm", 1024)
    heads = config.integer("mamba_n_heads", 128)
    automatic = config.get("mamba_d_head", "auto") == "auto"
    head_dim = (
        head_width(inner, heads) if automatic else config.integer("mamba_d_head", head_width(inner, heads))
    )
    if head_dim * heads != inner:
        raise ValueError(f"mamba_n_heads={heads} times mamba_d_head={head_dim} is not mamba_d_ssm={inner}.")
    least, most = read_time_step_limit(config)
    bias = config.flag("mamba_proj_bias", False)
    return Mamba2(
        heads,
        head_dim,
        config.integer("mamba_d_state", 256),
        config.integer("mamba_n_groups", 1),
        config.integer("mamba_d_conv", 4),
        config.flag("mamba_conv_bias", True),
        bias,
        bias,
        eps if config.flag("mamba_rms_norm", False) else None,
        config.flag("mamba_norm_before_gate", True),
        least,
        most,
        config.number("ssm_in_multiplier", 1.0),
        _multipliers(config, "ssm_multipliers", 5),
        config.number("ssm_out_multiplier", 1.0),
    )


def _multipliers(config: Reader, key: str, count: int) -> Any:
    numbers = config.get(key) or [1.0] * count
    if (
        not isinstance(numbers, list)
        or len(numbers) != count
        or any(type(n) not in (int, float) for n in numbers)
    ):
        raise ValueError(f"{key}={str(numbers)[:200]} is not a list of {count} numbers.")
    return tuple(float(n) for n in numbers)


def write(cfg: Any) -> dict[str, Any]:
    mixer, ffn = cfg.blocks[0].mixer, cfg.blocks[0].ffn
    mamba, attention = mixer.mixers
    return {
        "hidden_size": cfg.width,
        "intermediate_size": ffn.width,
        "num_hidden_layers": len(cfg.blocks),
        "hidden_act": written_activation(ffn.activation),
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.final_norm.eps,
        "attention_bias": attention.qkv_bias,
        "projectors_bias": attention.out_bias,
        "mlp_bias": ffn.bias,
        "key_multiplier": attention.key_scale,
        "mlp_multipliers": [ffn.gate_scale, ffn.down_scale],
        "attention_in_multiplier": mixer.in_scales[1],
        "attention_out_multiplier": mixer.out_scales[1],
        "embedding_multiplier": cfg.embed_scale,
        "lm_head_multiplier": cfg.logit_scale,
        "mamba_d_ssm": mamba.num_heads * mamba.head_dim,
        "mamba_n_heads": mamba.num_heads,
        "mamba_d_head": mamba.head_dim,
        "mamba_d_state": mamba.state_dim,
        "mamba_n_groups": mamba.num_groups,
        "mamba_d_conv": mamba.conv_width,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.in_bias,
        "mamba_rms_norm": mamba.norm_eps is not None,
        "mamba_norm_before_gate": mamba.norm_before_gate,
        "time_step_limit": write_time_step_limit(mamba),
        "ssm_in_multiplier": mamba.in_multiplier,
        "ssm_multipliers": list(mamba.multipliers),
        "ssm_out_multiplier": mamba.out_multiplier,
    } | write_attention(attention)


FAMILY = Family("falcon_h1", "FalconH1ForCausalLM", read, write, NAMES)

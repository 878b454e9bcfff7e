"""Mamba and Mamba-2: recurrent blocks without a feed-forward network. arXiv:2312.00752, 2405.21060."""

from __future__ import annotations

import math
from typing import Any

from model.blocks.mamba import Mamba
from model.blocks.mamba2 import Mamba2
from model.blocks.norms import RMSNorm
from model.config import Block, ModelConfig
from model.families.common import Family, Reader
from model.families.decoders import read_model
from model.families.tensors import Conv, Folded, Fused, Names

_INFINITY = {"__float__": "Infinity"}  # transformers writes infinity so, which JSON lacks
MAX_LENGTH = 1 << 20  # the value for no limit
OUTSIDE: Names = {
    "backbone.embeddings.weight": "embedding",
    "backbone.norm_f.weight": "final_norm/scale",
    "lm_head.weight": "head",
    "backbone.layers.{i}.norm.weight": "mixer_norm/scale",
}
IGNORED_KEYS = (
    *("rescale_prenorm_residual", "residual_in_fp32", "use_mambapy", "use_associative_scan"),
    *("time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme"),
)


def mamba_names(prefix: str, ours: str = "mixer") -> Names:
    """The tensors of a Mamba mixer with the checkpoint's `prefix`."""
    return {
        f"{prefix}.in_proj.weight": Fused((f"{ours}/in_x", f"{ours}/in_z")),
        f"{prefix}.in_proj.bias": Fused((f"{ours}/in_x_bias", f"{ours}/in_z_bias")),
        f"{prefix}.conv1d.weight": Conv((f"{ours}/conv",)),
        f"{prefix}.conv1d.bias": f"{ours}/conv_bias",
        f"{prefix}.x_proj.weight": Fused((f"{ours}/dt_low", f"{ours}/B", f"{ours}/C")),
        f"{prefix}.dt_proj.weight": f"{ours}/dt",
        f"{prefix}.dt_proj.bias": f"{ours}/dt_bias",
        f"{prefix}.A_log": Folded(f"{ours}/A_log", rows_of=f"{ours}/D"),
        f"{prefix}.D": f"{ours}/D",
        f"{prefix}.out_proj.weight": f"{ours}/o",
        f"{prefix}.out_proj.bias": f"{ours}/o_bias",
    }


def mamba2_names(prefix: str, ours: str = "mixer") -> Names:
    """The tensors of a Mamba-2 mixer with the checkpoint's `prefix`."""
    inputs, convolved = ("z", "x", "B", "C", "dt"), ("x", "B", "C")
    return {
        f"{prefix}.in_proj.weight": Fused(tuple(f"{ours}/in_{name}" for name in inputs)),
        f"{prefix}.in_proj.bias": Fused(tuple(f"{ours}/in_{name}_bias" for name in inputs)),
        f"{prefix}.conv1d.weight": Conv(tuple(f"{ours}/conv_{name}" for name in convolved)),
        f"{prefix}.conv1d.bias": Fused(tuple(f"{ours}/conv_{name}_bias" for name in convolved)),
        f"{prefix}.dt_bias": f"{ours}/dt_bias",
        f"{prefix}.A_log": f"{ours}/A_log",
        f"{prefix}.D": f"{ours}/D",
        f"{prefix}.norm.weight": f"{ours}/norm",
        f"{prefix}.out_proj.weight": f"{ours}/o",
        f"{prefix}.out_proj.bias": f"{ours}/o_bias",
    }


def read_mamba(config: Reader) -> ModelConfig:
    config.must_be("hidden_act", "silu")
    width, norm = config.integer("hidden_size", 768), RMSNorm(config.number("layer_norm_epsilon", 1e-5))
    inner = int(config.number("expand", 2) * width)
    config.must_be("intermediate_size", inner)
    mixer = Mamba(
        inner,
        config.integer("state_size", 16),
        read_rank(config, "time_step_rank", width),
        config.integer("conv_kernel", 4),
        config.flag("use_conv_bias", True),
        config.flag("use_bias", False),
    )
    return _read(config, mixer, norm, layers=32, tied=True)


def read_rank(config: Reader, key: str, width: int) -> int:
    return math.ceil(width / 16) if config.get(key, "auto") == "auto" else config.integer(key)


def read_mamba2(config: Reader) -> ModelConfig:
    config.must_be("hidden_act", "silu")
    width, norm = config.integer("hidden_size", 4096), RMSNorm(config.number("layer_norm_epsilon", 1e-5))
    heads, head_dim = config.integer("num_heads", 128), config.integer("head_dim", 64)
    config.must_be("intermediate_size", heads * head_dim)
    if config.number("expand", 2) * width != heads * head_dim:
        raise ValueError(f"num_heads={heads} times head_dim={head_dim} is not expand * hidden_size.")
    config.get("chunk_size")  # implementation options, which do not change the numbers
    config.get("time_step_rank")
    least, most = read_time_step_limit(config)
    bias = config.flag("use_bias", False)
    mixer = Mamba2(
        heads,
        head_dim,
        config.integer("state_size", 128),
        config.integer("n_groups", 8),
        config.integer("conv_kernel", 4),
        config.flag("use_conv_bias", True),
        bias,
        bias,
        norm.eps,
        dt_min=least,
        dt_max=most,
    )
    return _read(config, mixer, norm, layers=64, tied=False)


def read_time_step_limit(config: Reader) -> tuple[float, float | None]:
    """(the smallest time step, the largest or None)."""
    limit = config.get("time_step_limit")
    numbers = [_number(end) for end in limit] if isinstance(limit, list | tuple) else [0.0, math.inf]
    if len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1]:
        raise ValueError(f"time_step_limit={str(limit)[:200]} is not a smallest and a largest time step.")
    return numbers[0], None if numbers[1] == math.inf else numbers[1]


def write_time_step_limit(mixer: Any) -> list[Any]:
    return [mixer.dt_min, _INFINITY if mixer.dt_max is None else mixer.dt_max]


def _number(end: Any) -> float:
    return math.inf if end == _INFINITY else float(end) if type(end) in (int, float) else math.nan


def _read(config: Reader, mixer: Any, norm: RMSNorm, *, layers: int, tied: bool) -> ModelConfig:
    for key in IGNORED_KEYS:
        config.get(key)
    blocks = [Block(mixer, None, norm)] * config.layers(default=layers)
    return read_model(config, blocks, norm, tied=tied, max_length=MAX_LENGTH)


def _write(cfg: Any) -> dict[str, Any]:
    mixer = cfg.blocks[0].mixer
    return {
        "hidden_size": cfg.width,
        "num_hidden_layers": len(cfg.blocks),
        "state_size": mixer.state_dim,
        "conv_kernel": mixer.conv_width,
        "use_conv_bias": mixer.conv_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": cfg.final_norm.eps,
        "residual_in_fp32": False,
        "max_position_embeddings": cfg.max_length,
    }


def write_mamba(cfg: Any) -> dict[str, Any]:
    mixer = cfg.blocks[0].mixer
    expand = mixer.width / cfg.width
    return _write(cfg) | {
        "expand": int(expand) if expand == int(expand) else expand,
        "time_step_rank": mixer.dt_rank,
        "use_bias": mixer.bias,
    }


def write_mamba2(cfg: Any) -> dict[str, Any]:
    mixer = cfg.blocks[0].mixer
    expand = mixer.num_heads * mixer.head_dim / cfg.width
    return _write(cfg) | {
        "expand": int(expand) if expand == int(expand) else expand,
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "n_groups": mixer.num_groups,
        "use_bias": mixer.in_bias,
        "time_step_limit": write_time_step_limit(mixer),
    }


MAMBA = Family(
    "mamba", "MambaForCausalLM", read_mamba, write_mamba, OUTSIDE | mamba_names("backbone.layers.{i}.mixer")
)
MAMBA2 = Family(
    "mamba2",
    "Mamba2ForCausalLM",
    read_mamba2,
    write_mamba2,
    OUTSIDE | mamba2_names("backbone.layers.{i}.mixer"),
)

"""SmolLM3: a Llama in which every fourth layer has no positions (NoPE, arXiv:2305.19466)."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.blocks.ffn import GatedMLP
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation
from model.families.decoders import (
    NAMES,
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
from model.families.rope import read_rope, write_rope


def read(config: Reader) -> ModelConfig:
    norm, head_dim, layers = read_rms_norm(config), read_head_dim(config), config.layers()
    rope = read_rope(config, head_dim, theta=2_000_000.0)
    mixer = read_attention(config, head_dim, rope, num_kv_heads=4)
    ffn = GatedMLP(
        config.integer("intermediate_size"), read_activation(config), config.flag("mlp_bias", False)
    )
    rotated = read_rotated_layers(config, layers)
    window = (
        config.integer_or_none("sliding_window", None) if config.flag("use_sliding_window", False) else None
    )
    config.get("sliding_window")
    kinds = ["full_attention" if uses_rope or not window else "sliding_attention" for uses_rope in rotated]
    kinds = config.layer_kinds(layers, ("full_attention", "sliding_attention"), kinds)
    mixers = [
        dataclasses.replace(mixer, rope=rope if uses_rope else None, window=w)
        for uses_rope, w in zip(rotated, read_windows(config, kinds, window))
    ]
    blocks = [Block(mixer, ffn, norm) for mixer in mixers]
    return read_model(config, blocks, norm, tied=True, max_length=32768)


def read_rotated_layers(config: Reader, layers: int) -> list[bool]:
    """Whether each layer has rotary positions: `no_rope_layers`, 1 for yes, or all but every nth."""
    every = config.integer("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(rotated, list) or len(rotated) != layers or set(rotated) - {0, 1}:
        raise ValueError(f"no_rope_layers={str(rotated)[:200]} is not a 0 or 1 for each of {layers} layers.")
    return [bool(uses_rope) for uses_rope in rotated]


def write(cfg: Any) -> dict[str, Any]:
    mixers = [block.mixer for block in cfg.blocks]
    rope = next(mixer.rope for mixer in mixers if mixer.rope) if any(mixer.rope for mixer in mixers) else None
    return (
        write_model(cfg)
        | (write_rope(rope) if rope else {})
        | {
            "attention_bias": mixers[0].qkv_bias,
            "mlp_bias": cfg.blocks[0].ffn.bias,
            "no_rope_layers": [int(mixer.rope is not None) for mixer in mixers],
            "use_sliding_window": window_of(cfg) is not None,
            "sliding_window": window_of(cfg),
            "layer_types": write_layer_types(cfg),
        }
    )


FAMILY = Family("smollm3", "SmolLM3ForCausalLM", read, write, NAMES, ignored_tensors=ROTARY)

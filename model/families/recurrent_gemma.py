"""RecurrentGemma: Griffin's recurrence with some layers of local attention. arXiv:2404.07839."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from model.blocks.attention import Attention
from model.blocks.ffn import GatedMLP
from model.blocks.norms import RMSNorm
from model.blocks.rglru import RGLRU
from model.config import Block, ModelConfig
from model.families.common import GELU_TANH, Family, Reader, read_activation, written_activation
from model.families.decoders import head_width, read_model
from model.families.mamba import MAX_LENGTH
from model.families.rope import read_rope, write_rope
from model.families.tensors import Conv, Names, Whole

MIXER = "model.layers.{i}.temporal_block"
NAMES: Names = {
    "model.embed_tokens.weight": "embedding",
    "model.final_norm.weight": "final_norm/scale",
    "lm_head.weight": "head",
    "model.layers.{i}.temporal_pre_norm.weight": "mixer_norm/scale",
    "model.layers.{i}.channel_pre_norm.weight": "ffn_norm/scale",
    **{
        f"model.layers.{{i}}.mlp_block.{name}_proj.{kind}": f"ffn/{name}{suffix}"
        for name in ("gate", "up", "down")
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
    },
}
ATTENTION: Names = {
    **{f"{MIXER}.{name}_proj.weight": f"mixer/{name}" for name in "qkvo"},
    **{f"{MIXER}.{name}_proj.bias": f"mixer/{name}_bias" for name in "qkvo"},
}
RECURRENT: Names = {
    f"{MIXER}.linear_y.weight": "mixer/y",
    f"{MIXER}.linear_y.bias": "mixer/y_bias",
    f"{MIXER}.linear_x.weight": "mixer/x",
    f"{MIXER}.linear_x.bias": "mixer/x_bias",
    f"{MIXER}.conv_1d.weight": Conv(("mixer/conv",)),
    f"{MIXER}.conv_1d.bias": "mixer/conv_bias",
    f"{MIXER}.rg_lru.recurrent_param": "mixer/a",
    f"{MIXER}.rg_lru.input_gate_weight": Whole("mixer/x_gate"),
    f"{MIXER}.rg_lru.input_gate_bias": Whole("mixer/x_gate_bias"),
    f"{MIXER}.rg_lru.recurrent_gate_weight": Whole("mixer/a_gate"),
    f"{MIXER}.rg_lru.recurrent_gate_bias": Whole("mixer/a_gate_bias"),
    f"{MIXER}.linear_out.weight": "mixer/o",
    f"{MIXER}.linear_out.bias": "mixer/o_bias",
}


def read(config: Reader) -> ModelConfig:
    config.get("w_init_variance_scale")
    config.get("final_w_init_variance_scale")
    width, heads = config.integer("hidden_size", 2560), config.integer("num_attention_heads", 10)
    head_dim = config.integer("head_dim", head_width(width, heads))
    norm = RMSNorm(config.number("rms_norm_eps", 1e-6), zero_centered=True)
    attention = Attention(
        heads,
        config.integer("num_key_value_heads", heads),
        head_dim,
        read_rope(config, head_dim, fraction=0.5),
        qkv_bias=config.flag("attention_bias", False),
        out_bias=True,
        window=config.integer(config.alias("attention_window_size", "sliding_window"), 2048),
    )
    recurrent = RGLRU(
        heads, head_width(config.integer("lru_width", width), heads), config.integer("conv1d_width", 4)
    )
    config.must_be("hidden_activation", *GELU_TANH)  # transformers has it in the recurrent layers too
    activation = read_activation(config, "hidden_activation", "gelu_pytorch_tanh")
    ffn = GatedMLP(config.integer("intermediate_size", 3 * 2560) // 2, activation, bias=True)
    mixers = {"recurrent": recurrent, "attention": attention}
    kinds = config.get("block_types") or ["recurrent", "recurrent", "attention"]
    config.get("layers_block_type")
    if not isinstance(kinds, list | tuple) or any(kind not in ("recurrent", "attention") for kind in kinds):
        raise ValueError(f"block_types={str(kinds)[:200]} is not a list of 'recurrent' and 'attention'.")
    blocks = [Block(mixers[kinds[i % len(kinds)]], ffn, norm) for i in range(config.layers(default=26))]
    return read_model(
        config,
        blocks,
        norm,
        tied=True,
        max_length=MAX_LENGTH,
        embed_scale=float(np.float32(width**0.5).astype(ml_dtypes.bfloat16)),  # rounded in transformers
        logit_softcap=config.number("logits_soft_cap", 30.0),
    )


def write(cfg: Any) -> dict[str, Any]:
    ffn = cfg.blocks[0].ffn
    attention: Any = next(block.mixer for block in cfg.blocks if isinstance(block.mixer, Attention))
    recurrent = next(block.mixer for block in cfg.blocks if isinstance(block.mixer, RGLRU))
    return {
        "hidden_size": cfg.width,
        "intermediate_size": 2 * ffn.width,
        "num_hidden_layers": len(cfg.blocks),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "attention_window_size": attention.window,
        "lru_width": recurrent.num_heads * recurrent.head_dim,
        "conv1d_width": recurrent.conv_width,
        "hidden_activation": written_activation(ffn.activation, "gelu_pytorch_tanh"),
        "rms_norm_eps": cfg.final_norm.eps,
        "logits_soft_cap": cfg.logit_softcap,
        "block_types": [
            "attention" if isinstance(block.mixer, Attention) else "recurrent" for block in cfg.blocks
        ],
        "max_position_embeddings": cfg.max_length,
    } | write_rope(attention.rope)


FAMILY = Family(
    "recurrent_gemma",
    "RecurrentGemmaForCausalLM",
    read,
    write,
    NAMES,
    {Attention: ATTENTION, RGLRU: RECURRENT},
)

"""RWKV-7 as flash-linear-attention writes it. Peng et al. 2025, arXiv:2503.14456.

One layer there is two blocks here, time mixing and channel mixing, because both need the previous token.
"""

from __future__ import annotations

from typing import Any

from model.blocks.norms import LayerNorm
from model.blocks.rwkv7 import RWKV7, RWKV7ChannelMix
from model.config import Block, ModelConfig
from model.families.common import Family, Reader
from model.families.decoders import read_model
from model.families.tensors import Folded, Names, Whole

NAMES: Names = {
    "model.embeddings.weight": "embedding",
    "model.layers.0.pre_norm.weight": "embed_norm/scale",
    "model.layers.0.pre_norm.bias": "embed_norm/bias",
    "model.norm.weight": "final_norm/scale",
    "model.norm.bias": "final_norm/bias",
    "lm_head.weight": "head",
}
ATTENTION = "model.layers.{i}.attn"
TIME_MIX: Names = {
    "model.layers.{i}.attn_norm.weight": "mixer_norm/scale",
    "model.layers.{i}.attn_norm.bias": "mixer_norm/bias",
    **{f"{ATTENTION}.x_{name}": Whole(f"mixer/x_{name}", ones=2) for name in "rwkvag"},
    **{f"{ATTENTION}.{name}_proj.weight": f"mixer/{name}" for name in "rkvo"},
    **{f"{ATTENTION}.{name}_lora.lora.0.weight": f"mixer/{name}_a" for name in "wagv"},
    **{f"{ATTENTION}.{name}_lora.lora.2.weight": f"mixer/{name}_b" for name in "wagv"},
    **{f"{ATTENTION}.{name}_lora.lora.2.bias": f"mixer/{name}_bias" for name in "wav"},
    f"{ATTENTION}.k_k": "mixer/k_k",
    f"{ATTENTION}.k_a": "mixer/k_a",
    f"{ATTENTION}.r_k": Folded("mixer/r_k", rows_of="mixer/r"),
    f"{ATTENTION}.g_norm.weight": "mixer/norm",
    f"{ATTENTION}.g_norm.bias": "mixer/norm_bias",
}
CHANNEL_MIX: Names = {
    "model.layers.{i}.ffn_norm.weight": "mixer_norm/scale",
    "model.layers.{i}.ffn_norm.bias": "mixer_norm/bias",
    "model.layers.{i}.ffn.x_k": "mixer/x_k",
    "model.layers.{i}.ffn.key.weight": "mixer/k",
    "model.layers.{i}.ffn.value.weight": "mixer/o",
}
RANKS = {"decay": 64, "gate": 128, "a": 64, "v": 16}  # the defaults of the config class


def read(config: Reader) -> ModelConfig:
    config.must_be("hidden_act", "sqrelu")
    config.must_be("norm_first", True)
    config.must_be("norm_bias", True)
    config.must_be("attn", None)
    for key in ("attn_mode", "fuse_norm", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"):
        config.get(key)  # implementation options, which do not change the numbers
    width, eps = config.integer("hidden_size", 2048), config.number("norm_eps", 1e-5)
    layers, head_dim = config.layers(default=24), config.integer("head_dim", 64)
    heads = config.integer("num_heads", width // head_dim)
    if heads * head_dim != width:
        raise ValueError(f"num_heads={heads} times head_dim={head_dim} is not hidden_size={width}.")
    config.must_be("value_dim", width, [width] * layers)
    inner = int(width * config.number("hidden_ratio", 4.0))
    inner = config.integer("intermediate_size", 32 * -(-inner // 32))
    ranks = {name: config.integer(f"{name}_low_rank_dim", rank) for name, rank in RANKS.items()}
    norm, blocks = LayerNorm(eps), []
    for i in range(layers):
        time_mix = RWKV7(
            heads,
            head_dim,
            decay_rank=ranks["decay"],
            rate_rank=ranks["a"],
            gate_rank=ranks["gate"],
            value_rank=ranks["v"],
            first=i == 0,
            norm_eps=head_dim * eps,
        )
        blocks += [Block(time_mix, None, norm), Block(RWKV7ChannelMix(inner, width), None, norm)]
    return read_model(config, blocks, norm, max_length=2048, embed_norm=norm)


def write(cfg: Any) -> dict[str, Any]:
    time_mix, channel_mix = cfg.blocks[0].mixer, cfg.blocks[1].mixer
    return {
        "hidden_size": cfg.width,
        "num_hidden_layers": len(cfg.blocks) // 2,
        "head_dim": time_mix.head_dim,
        "hidden_ratio": channel_mix.width / cfg.width,
        "intermediate_size": channel_mix.width,
        "decay_low_rank_dim": time_mix.decay_rank,
        "a_low_rank_dim": time_mix.rate_rank,
        "gate_low_rank_dim": time_mix.gate_rank,
        "v_low_rank_dim": time_mix.value_rank,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": cfg.final_norm.eps,
        "max_position_embeddings": cfg.max_length,
    }


FAMILY = Family(
    "rwkv7",
    "RWKV7ForCausalLM",
    read,
    write,
    NAMES,
    {RWKV7: TIME_MIX, RWKV7ChannelMix: CHANNEL_MIX},
    blocks_per_layer=2,
)

"""The config keys and tensor names that Llama-like decoders share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from model.blocks.attention import Attention
from model.blocks.norms import Norm, RMSNorm
from model.blocks.positions import Rope
from model.config import Block, ModelConfig
from model.families.common import Reader, written_activation
from model.families.rope import write_rope
from model.families.tensors import Names

OUTSIDE: Names = {
    "model.embed_tokens.weight": "embedding",
    "lm_head.weight": "head",
    "model.norm.weight": "final_norm/scale",
}
NORMS: Names = {
    "model.layers.{i}.input_layernorm.weight": "mixer_norm/scale",
    "model.layers.{i}.post_attention_layernorm.weight": "ffn_norm/scale",
}
ATTENTION: Names = {
    "model.layers.{i}.self_attn.q_proj.weight": "mixer/q",
    "model.layers.{i}.self_attn.k_proj.weight": "mixer/k",
    "model.layers.{i}.self_attn.v_proj.weight": "mixer/v",
    "model.layers.{i}.self_attn.o_proj.weight": "mixer/o",
    "model.layers.{i}.self_attn.q_proj.bias": "mixer/q_bias",
    "model.layers.{i}.self_attn.k_proj.bias": "mixer/k_bias",
    "model.layers.{i}.self_attn.v_proj.bias": "mixer/v_bias",
    "model.layers.{i}.self_attn.o_proj.bias": "mixer/o_bias",
    "model.layers.{i}.self_attn.q_norm.weight": "mixer/q_norm/scale",
    "model.layers.{i}.self_attn.k_norm.weight": "mixer/k_norm/scale",
}
GATED_MLP: Names = {
    "model.layers.{i}.mlp.gate_proj.weight": "ffn/gate",
    "model.layers.{i}.mlp.up_proj.weight": "ffn/up",
    "model.layers.{i}.mlp.down_proj.weight": "ffn/down",
    "model.layers.{i}.mlp.gate_proj.bias": "ffn/gate_bias",
    "model.layers.{i}.mlp.up_proj.bias": "ffn/up_bias",
    "model.layers.{i}.mlp.down_proj.bias": "ffn/down_bias",
}
NAMES: Names = OUTSIDE | NORMS | ATTENTION | GATED_MLP
ROTARY = ("rotary_emb.inv_freq",)  # in old checkpoints; derived from the config


def read_rms_norm(config: Reader, eps: float = 1e-6, **options: Any) -> RMSNorm:
    return RMSNorm(config.number("rms_norm_eps", eps), **options)


def read_head_dim(config: Reader, default: int | None = None) -> int:
    """`head_dim`, or the family's default, or width / heads."""
    heads = config.integer("num_attention_heads")
    return config.integer("head_dim", default or head_width(config.integer("hidden_size"), heads))


def head_width(width: int, heads: int) -> int:
    """The default width of a head. Raises ValueError for more heads than channels."""
    if width < heads:
        raise ValueError(
            f"num_attention_heads={heads} is more than the width of {width}: a head has at least one channel."
        )
    return width // heads


def read_attention(
    config: Reader,
    head_dim: int,
    rope: Rope | None,
    *,
    num_kv_heads: int | None = None,
    bias: bool | None = None,
    **options: Any,
) -> Attention:
    """Attention from the usual keys.

    Args:
      num_kv_heads: the family's default; None: as many as heads.
      bias: whether all four projections have one; None: `attention_bias`.
    """
    heads = config.integer("num_attention_heads")
    if bias is None:
        bias = config.flag("attention_bias", False)
    kv_heads = config.integer("num_key_value_heads", num_kv_heads or heads)
    options = {"qkv_bias": bias, "out_bias": bias} | options
    return Attention(heads, kv_heads, head_dim, rope, **options)


def read_model(
    config: Reader,
    blocks: tuple[Block, ...] | list[Block],
    final_norm: Norm | None,
    *,
    tied: bool = False,
    max_length: int | None = None,
    max_length_key: str = "max_position_embeddings",
    width_key: str = "hidden_size",
    **fields: Any,
) -> ModelConfig:
    """The model with these blocks; `tied` and `max_length` are the family's defaults."""
    return ModelConfig(
        vocab_size=config.integer("vocab_size"),
        width=config.integer(width_key),
        blocks=tuple(blocks),
        final_norm=final_norm,
        tied_head=config.flag("tie_word_embeddings", tied),
        max_length=config.integer(max_length_key, max_length),
        **fields,
    )


def write_attention(mixer: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "attention_dropout": 0.0,
    } | (write_rope(mixer.rope) if mixer.rope else {})


def write_model(cfg: Any, activation_key: str = "hidden_act") -> dict[str, Any]:
    """The keys that most decoders have, from the first block."""
    block = cfg.blocks[0]
    return {
        "hidden_size": cfg.width,
        "intermediate_size": block.ffn.width,
        "num_hidden_layers": len(cfg.blocks),
        activation_key: written_activation(block.ffn.activation),
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.final_norm.eps,
    } | write_attention(block.mixer)


def read_windows(config: Reader, kinds: list[str], window: int | None) -> list[int | None]:
    """The window of each layer, by its kind; None if it is at least the longest context."""
    if window is None and "sliding_attention" in kinds:
        raise ValueError(
            "layer_types has sliding_attention, but no sliding_window is set and used (see use_sliding_window)."
        )
    if window is not None and window >= config.integer("max_position_embeddings"):
        window = None
    return [window if kind == "sliding_attention" else None for kind in kinds]


def window_of(cfg: Any) -> int | None:
    """The window of the layers with one."""
    return next((block.mixer.window for block in cfg.blocks if block.mixer.window), None)


def write_layer_types(cfg: Any, sliding: Callable[[Any], bool] = lambda mixer: mixer.window) -> list[str]:
    return ["sliding_attention" if sliding(block.mixer) else "full_attention" for block in cfg.blocks]

"""Falcon: few key/value heads, parallel attention and network, rotary positions or ALiBi. arXiv:2311.16867."""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import MLP
from model.blocks.norms import LayerNorm
from model.blocks.positions import Alibi
from model.blocks.residual import ParallelResidual, Residual
from model.config import Block, ModelConfig
from model.families.bloom import BLOCK, OUTSIDE
from model.families.common import Family, Reader, read_activation, written_activation
from model.families.decoders import ROTARY, head_width, read_model
from model.families.rope import read_rope, write_rope
from model.families.tensors import Names

ONE_NORM: Names = OUTSIDE | BLOCK
TWO_NORMS: Names = {
    name.replace("input_layernorm", "ln_attn").replace("post_attention_layernorm", "ln_mlp"): ours
    for name, ours in ONE_NORM.items()
}


def read(config: Reader) -> ModelConfig:
    width_key = config.alias("hidden_size", "n_embed")  # the second in old folders
    width, heads = config.integer(width_key), config.integer("num_attention_heads", 71)
    bias, new = config.flag("bias", False), config.flag("new_decoder_architecture", False)
    if new:
        kv_heads = config.integer("num_kv_heads", heads)
        config.get("multi_query")
    else:
        kv_heads = 1 if config.flag("multi_query", True) else heads
        config.get("num_kv_heads")
    head_dim = head_width(width, heads)
    if config.flag("alibi", False):
        position: dict[str, Any] = {"rope": None, "alibi": Alibi(scale=head_dim**-0.5)}
        config.get("rope_parameters")
    else:
        position = {"rope": read_rope(config, head_dim)}
    mixer = Attention(heads, kv_heads, head_dim, **position, qkv_bias=bias, out_bias=bias)
    activation = read_activation(config, "activation", "gelu")
    ffn = MLP(config.integer("ffn_hidden_size", 4 * width), activation, bias)
    norm = LayerNorm(config.number("layer_norm_epsilon", 1e-5))
    block = Block(mixer, ffn, norm, residual=_read_residual(config, new))
    return read_model(
        config, [block] * config.layers(default=32), norm, tied=True, width_key=width_key, max_length=2048
    )


def _read_residual(config: Reader, new: bool) -> Residual | ParallelResidual:
    norms = config.integer("num_ln_in_parallel_attn", 2 if new else 1, most=2)
    parallel = config.flag("parallel_attn", True)
    if (new and not parallel) or (not new and norms == 2):
        raise ValueError(
            f"parallel_attn={parallel}, num_ln_in_parallel_attn={norms} with new_decoder_architecture={new} is not "
            "supported."
        )
    return ParallelResidual("two norms" if norms == 2 else "one norm") if parallel else Residual()


def write(cfg: Any) -> dict[str, Any]:
    block = cfg.blocks[0]
    mixer, two = block.mixer, block.residual.parallel == "two norms"
    new = two or mixer.num_kv_heads not in (1, mixer.num_heads)
    return {
        "hidden_size": cfg.width,
        "num_attention_heads": mixer.num_heads,
        "num_kv_heads": mixer.num_kv_heads,
        "num_hidden_layers": len(cfg.blocks),
        "new_decoder_architecture": new,
        "multi_query": mixer.num_kv_heads == 1,
        "parallel_attn": block.residual.parallel != "no",
        "num_ln_in_parallel_attn": (2 if two else 1) if block.residual.parallel != "no" else None,
        "alibi": mixer.alibi is not None,
        "bias": block.ffn.bias,
        "ffn_hidden_size": block.ffn.width,
        "activation": written_activation(block.ffn.activation, "gelu"),
        "layer_norm_epsilon": cfg.final_norm.eps,
        "max_position_embeddings": cfg.max_length,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    } | (write_rope(mixer.rope) if mixer.rope else {})


def names(cfg: ModelConfig) -> Names:
    return TWO_NORMS if cfg.blocks[0].residual.parallel == "two norms" else ONE_NORM


FAMILY = Family("falcon", "FalconForCausalLM", read, write, names, ignored_tensors=ROTARY)

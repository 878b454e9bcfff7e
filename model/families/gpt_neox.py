"""GPT-NeoX and Pythia: parallel attention and network, a quarter of each head rotated. arXiv:2204.06745."""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import MLP
from model.blocks.norms import LayerNorm
from model.blocks.residual import ParallelResidual, Residual
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation, written_activation
from model.families.decoders import head_width, read_model
from model.families.rope import read_rope, write_scaling
from model.families.tensors import Fused, Names

NAMES: Names = {
    "gpt_neox.embed_in.weight": "embedding",
    "embed_out.weight": "head",
    "gpt_neox.final_layer_norm.weight": "final_norm/scale",
    "gpt_neox.final_layer_norm.bias": "final_norm/bias",
    "gpt_neox.layers.{i}.input_layernorm.weight": "mixer_norm/scale",
    "gpt_neox.layers.{i}.input_layernorm.bias": "mixer_norm/bias",
    "gpt_neox.layers.{i}.post_attention_layernorm.weight": "ffn_norm/scale",
    "gpt_neox.layers.{i}.post_attention_layernorm.bias": "ffn_norm/bias",
    "gpt_neox.layers.{i}.attention.query_key_value.weight": Fused(
        ("mixer/q", "mixer/k", "mixer/v"), grouped=True
    ),
    "gpt_neox.layers.{i}.attention.query_key_value.bias": Fused(
        ("mixer/q_bias", "mixer/k_bias", "mixer/v_bias"), grouped=True
    ),
    "gpt_neox.layers.{i}.attention.dense.weight": "mixer/o",
    "gpt_neox.layers.{i}.attention.dense.bias": "mixer/o_bias",
    "gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight": "ffn/up",
    "gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias": "ffn/up_bias",
    "gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight": "ffn/down",
    "gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias": "ffn/down_bias",
}
CONSTANTS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")  # of old checkpoints


def read(config: Reader) -> ModelConfig:
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    config.must_be("head_dim", head_width(width, heads))
    norm = LayerNorm(config.number("layer_norm_eps", 1e-5))
    theta = config.number("rotary_emb_base", 10_000.0)
    rope = read_rope(config, head_width(width, heads), theta=theta, fraction=0.25, fraction_key="rotary_pct")
    bias = config.flag("attention_bias", True)
    mixer = Attention(heads, heads, head_width(width, heads), rope, qkv_bias=bias, out_bias=bias)
    ffn = MLP(config.integer("intermediate_size"), read_activation(config, default="gelu"))
    parallel = config.flag("use_parallel_residual", True)
    residual = ParallelResidual("two norms") if parallel else Residual()
    block = Block(mixer, ffn, norm, residual=residual)
    return read_model(config, [block] * config.layers(), norm, max_length=2048)


def write(cfg: Any) -> dict[str, Any]:
    block = cfg.blocks[0]
    rope = block.mixer.rope
    return {
        "hidden_size": cfg.width,
        "num_attention_heads": block.mixer.num_heads,
        "num_hidden_layers": len(cfg.blocks),
        "intermediate_size": block.ffn.width,
        "hidden_act": written_activation(block.ffn.activation),
        "max_position_embeddings": cfg.max_length,
        "layer_norm_eps": cfg.final_norm.eps,
        "rotary_pct": rope.fraction,
        "rotary_emb_base": rope.theta,
        "rope_scaling": write_scaling(rope.scaling),
        "attention_bias": block.mixer.qkv_bias,
        "use_parallel_residual": block.residual.parallel == "two norms",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


FAMILY = Family("gpt_neox", "GPTNeoXForCausalLM", read, write, NAMES, ignored_tensors=CONSTANTS)

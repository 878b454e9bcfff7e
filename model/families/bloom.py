"""BLOOM: ALiBi, and a norm on the embedding. arXiv:2211.05100."""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import MLP
from model.blocks.norms import LayerNorm
from model.blocks.positions import Alibi
from model.config import Block, ModelConfig
from model.families.common import Family, Reader
from model.families.decoders import head_width, read_model
from model.families.tensors import Fused, Names

BLOCK: Names = {
    "transformer.h.{i}.input_layernorm.weight": "mixer_norm/scale",
    "transformer.h.{i}.input_layernorm.bias": "mixer_norm/bias",
    "transformer.h.{i}.post_attention_layernorm.weight": "ffn_norm/scale",
    "transformer.h.{i}.post_attention_layernorm.bias": "ffn_norm/bias",
    "transformer.h.{i}.self_attention.query_key_value.weight": Fused(
        ("mixer/q", "mixer/k", "mixer/v"), grouped=True
    ),
    "transformer.h.{i}.self_attention.query_key_value.bias": Fused(
        ("mixer/q_bias", "mixer/k_bias", "mixer/v_bias"), grouped=True
    ),
    "transformer.h.{i}.self_attention.dense.weight": "mixer/o",
    "transformer.h.{i}.self_attention.dense.bias": "mixer/o_bias",
    "transformer.h.{i}.mlp.dense_h_to_4h.weight": "ffn/up",
    "transformer.h.{i}.mlp.dense_h_to_4h.bias": "ffn/up_bias",
    "transformer.h.{i}.mlp.dense_4h_to_h.weight": "ffn/down",
    "transformer.h.{i}.mlp.dense_4h_to_h.bias": "ffn/down_bias",
}
OUTSIDE: Names = {
    "transformer.word_embeddings.weight": "embedding",
    "transformer.ln_f.weight": "final_norm/scale",
    "transformer.ln_f.bias": "final_norm/bias",
    "lm_head.weight": "head",
}
NAMES: Names = (
    OUTSIDE
    | BLOCK
    | {
        "transformer.word_embeddings_layernorm.weight": "embed_norm/scale",
        "transformer.word_embeddings_layernorm.bias": "embed_norm/bias",
    }
)
KEY_ALIASES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}


def read(config: Reader) -> ModelConfig:
    config.must_be("apply_residual_connection_post_layernorm", False)
    config.must_be(
        "pretraining_tp", *range(1, 1025)
    )  # implementation options, which do not change the numbers
    config.get("slow_but_exact")
    for key in ("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "skip_bias_add"):
        config.get(key)  # in old folders, without effect
    width_key = config.alias("hidden_size", "n_embed")  # the second in old folders
    width, heads = config.integer(width_key), config.integer("n_head", 8)
    norm = LayerNorm(config.number("layer_norm_epsilon", 1e-5))
    mixer = Attention(
        heads, heads, head_width(width, heads), None, qkv_bias=True, out_bias=True, alibi=Alibi()
    )
    block = Block(mixer, MLP(4 * width, "gelu_tanh"), norm)
    return read_model(
        config,
        [block] * config.layers("n_layer", 2),
        norm,
        tied=True,
        width_key=width_key,
        max_length_key="seq_length",
        max_length=2048,
        embed_norm=norm,
    )


def write(cfg: Any) -> dict[str, Any]:
    return {
        "hidden_size": cfg.width,
        "n_head": cfg.blocks[0].mixer.num_heads,
        "n_layer": len(cfg.blocks),
        "layer_norm_epsilon": cfg.final_norm.eps,
        "seq_length": cfg.max_length,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


FAMILY = Family("bloom", "BloomForCausalLM", read, write, NAMES, key_aliases=KEY_ALIASES)

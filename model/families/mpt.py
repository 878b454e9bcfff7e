"""MPT: ALiBi, and no biases, not even in norms. MosaicML 2023."""

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

NAMES: Names = {
    "transformer.wte.weight": "embedding",
    "transformer.norm_f.weight": "final_norm/scale",
    "lm_head.weight": "head",
    "transformer.blocks.{i}.norm_1.weight": "mixer_norm/scale",
    "transformer.blocks.{i}.attn.Wqkv.weight": Fused(("mixer/q", "mixer/k", "mixer/v")),
    "transformer.blocks.{i}.attn.out_proj.weight": "mixer/o",
    "transformer.blocks.{i}.norm_2.weight": "ffn_norm/scale",
    "transformer.blocks.{i}.ffn.up_proj.weight": "ffn/up",
    "transformer.blocks.{i}.ffn.down_proj.weight": "ffn/down",
}
KEY_ALIASES = {"num_attention_heads": "n_heads", "hidden_size": "d_model", "num_hidden_layers": "n_layers"}


def read(config: Reader) -> ModelConfig:
    for key, wanted in {
        "no_bias": True,
        "expansion_ratio": 4,
        "embedding_fraction": 1,
        "logit_scale": None,
    }.items():
        config.must_be(key, wanted)
    config.must_be("norm_type", "low_precision_layernorm", "layernorm")
    config.must_be("is_causal", True)  # transformers fails with other values
    for key in ("learned_pos_emb", "init_device", "verbose", "emb_pdrop", "resid_pdrop", "emb_init_std"):
        config.get(key)  # ignored by transformers
    attention = config.part("attn_config")
    attention.get("attn_impl")  # implementation options, which do not change the numbers
    attention.must_be("is_encoder_decoder", False)
    attention.must_be("alibi", True)
    attention.must_be("alibi_bias_max", 8)  # transformers ignores other values
    attention.must_be("attn_type", "multihead_attention")
    attention.must_be("prefix_lm", False)
    attention.must_be("qk_ln", False)
    attention.must_be("attn_uses_sequence_id", False)
    width, heads = config.integer("d_model", 2048), config.integer("n_heads", 16)
    norm = LayerNorm(config.number("layer_norm_epsilon", 1e-5), bias=False)
    mixer = Attention(
        heads,
        heads,
        head_width(width, heads),
        rope=None,
        alibi=Alibi(),
        scale=attention.number_or_none("softmax_scale", None),
        clip_qkv=attention.number_or_none("clip_qkv", None),
    )
    block = Block(mixer, MLP(4 * width, "gelu", bias=False), norm)
    return read_model(
        config,
        [block] * config.layers("n_layers", 24),
        norm,
        tied=True,
        width_key="d_model",
        max_length_key="max_seq_len",
        max_length=2048,
    )


def write(cfg: Any) -> dict[str, Any]:
    mixer = cfg.blocks[0].mixer
    return {
        "d_model": cfg.width,
        "n_heads": mixer.num_heads,
        "n_layers": len(cfg.blocks),
        "layer_norm_epsilon": cfg.final_norm.eps,
        "max_seq_len": cfg.max_length,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 8,
            "softmax_scale": mixer.scale,
            "clip_qkv": mixer.clip_qkv,
        },
    }


FAMILY = Family("mpt", "MptForCausalLM", read, write, NAMES, key_aliases=KEY_ALIASES)

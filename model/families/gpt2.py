"""GPT-2. Radford et al. 2019. Its linear maps are stored as [inputs, outputs] (transformers' Conv1D)."""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import MLP
from model.blocks.norms import LayerNorm
from model.blocks.positions import LearnedPositions
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation, written_activation
from model.families.decoders import head_width, read_model
from model.families.tensors import Fused, Names, untransposed

NAMES: Names = {
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "positions/table",
    "transformer.ln_f.weight": "final_norm/scale",
    "transformer.ln_f.bias": "final_norm/bias",
    "lm_head.weight": "head",
    "transformer.h.{i}.ln_1.weight": "mixer_norm/scale",
    "transformer.h.{i}.ln_1.bias": "mixer_norm/bias",
    "transformer.h.{i}.attn.c_attn.weight": Fused(("mixer/q", "mixer/k", "mixer/v"), transposed=False),
    "transformer.h.{i}.attn.c_attn.bias": Fused(("mixer/q_bias", "mixer/k_bias", "mixer/v_bias")),
    "transformer.h.{i}.attn.c_proj.weight": untransposed("mixer/o"),
    "transformer.h.{i}.attn.c_proj.bias": "mixer/o_bias",
    "transformer.h.{i}.ln_2.weight": "ffn_norm/scale",
    "transformer.h.{i}.ln_2.bias": "ffn_norm/bias",
    "transformer.h.{i}.mlp.c_fc.weight": untransposed("ffn/up"),
    "transformer.h.{i}.mlp.c_fc.bias": "ffn/up_bias",
    "transformer.h.{i}.mlp.c_proj.weight": untransposed("ffn/down"),
    "transformer.h.{i}.mlp.c_proj.bias": "ffn/down_bias",
}
MASKS = (".attn.bias", ".attn.masked_bias")  # constants of old checkpoints
KEY_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
}
KEY_ALIASES |= {"num_hidden_layers": "n_layer"}


def read(config: Reader) -> ModelConfig:
    config.must_be("scale_attn_by_inverse_layer_idx", False)
    config.get("reorder_and_upcast_attn")  # implementation options, which do not change the numbers
    for key in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"):
        config.get(f"summary_{key}")  # for a head that this model does not have
    config.get("n_ctx")
    width, heads = config.integer("n_embd", 768), config.integer("n_head", 12)
    length = config.integer("n_positions", 1024)
    norm = LayerNorm(config.number("layer_norm_epsilon", 1e-5))
    scale = None if config.flag("scale_attn_weights", True) else 1.0
    mixer = Attention(
        heads, heads, head_width(width, heads), rope=None, qkv_bias=True, out_bias=True, scale=scale
    )
    activation = read_activation(config, "activation_function", "gelu_new")
    block = Block(mixer, MLP(config.integer("n_inner", 4 * width), activation), norm)
    return read_model(
        config,
        [block] * config.layers("n_layer", 12),
        norm,
        tied=True,
        width_key="n_embd",
        max_length_key="n_positions",
        max_length=1024,
        positions=LearnedPositions(length),
    )


def write(cfg: Any) -> dict[str, Any]:
    block = cfg.blocks[0]
    return {
        "n_embd": cfg.width,
        "n_head": block.mixer.num_heads,
        "n_layer": len(cfg.blocks),
        "n_inner": block.ffn.width,
        "n_positions": cfg.max_length,
        "activation_function": written_activation(block.ffn.activation, "gelu_new"),
        "layer_norm_epsilon": cfg.final_norm.eps,
        "scale_attn_weights": block.mixer.scale is None,
    }


FAMILY = Family("gpt2", "GPT2LMHeadModel", read, write, NAMES, ignored_tensors=MASKS, key_aliases=KEY_ALIASES)

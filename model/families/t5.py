"""T5, T5 1.1 and Flan-T5: encoder and decoder with learned biases for ranges of distances.

Raffel et al. 2019, arXiv:1910.10683; Chung et al. 2022, arXiv:2210.11416.
"""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.cross_attention import CrossAttention
from model.blocks.ffn import MLP, GatedMLP
from model.blocks.norms import RMSNorm
from model.blocks.positions import RelativeBias
from model.config import Block, Encoder, ModelConfig
from model.families.common import ACTIVATIONS, Family, Reader, written_activation
from model.families.decoders import read_model
from model.families.tensors import ENCODER, Names, Whole

# What a feed-forward network is called, to ours; "gated" where it has a gate.
FEED_FORWARD = ACTIVATIONS | {f"gated-{theirs}": f"gated {ours}" for theirs, ours in ACTIVATIONS.items()}
FEED_FORWARD |= {"gated-gelu": "gated gelu_tanh"}
# Copies of the shared embedding, and an unused table.
IGNORED_TENSORS = ("coder.embed_tokens.weight", "EncDecAttention.relative_attention_bias.weight")
KEY_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
}
KEY_ALIASES |= {"head_dim": "d_kv"}


def names(cfg: ModelConfig) -> Names:
    gated = isinstance(cfg.blocks[0].ffn, GatedMLP)
    return {
        "shared.weight": "embedding",
        "lm_head.weight": "head",
        "encoder.final_layer_norm.weight": "encoder/final_norm/scale",
        "decoder.final_layer_norm.weight": "final_norm/scale",
        **_stack("encoder", ENCODER, 1, gated),
        **_stack("decoder", "", 2, gated),
        **_attention("decoder.block.{i}.layer.1", "EncDecAttention", "cross"),
    }


def _stack(theirs: str, ours: str, ffn: int, gated: bool) -> Names:
    """Names in the blocks of a stack; the feed-forward network is sublayer number `ffn`."""
    layer = f"{theirs}.block.{{i}}.layer"
    wi = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}
    table = "SelfAttention.relative_attention_bias.weight"
    return {
        **_attention(f"{layer}.0", "SelfAttention", f"{ours}mixer"),
        f"{layer}.0.{table}": Whole(f"{ours}mixer/relative"),
        f"{layer}.{ffn}.layer_norm.weight": f"{ours}ffn_norm/scale",
        f"{layer}.{ffn}.DenseReluDense.wo.weight": f"{ours}ffn/down",
        **{f"{layer}.{ffn}.DenseReluDense.{key}.weight": f"{ours}ffn/{value}" for key, value in wi.items()},
    }


def _attention(layer: str, kind: str, ours: str) -> Names:
    maps: Names = {f"{layer}.{kind}.{key}.weight": f"{ours}/{key}" for key in "qkvo"}
    return maps | {f"{layer}.layer_norm.weight": f"{ours}_norm/scale"}


def read(config: Reader) -> ModelConfig:
    config.get("output_past")
    norm, layers = RMSNorm(config.number("layer_norm_epsilon", 1e-6)), config.layers("num_layers")
    # transformers 5 also writes tie_word_embeddings=true for T5 1.1, which has its own head on unscaled states
    same = config.flag("tie_word_embeddings", True)
    tied = config.flag("scale_decoder_outputs", same)
    if tied and not same:
        raise ValueError("scale_decoder_outputs=True with tie_word_embeddings=False is not supported.")
    cfg = read_model(
        config,
        _read_blocks(config, norm, config.layers("num_decoder_layers", layers), decoder=True),
        norm,
        encoder=Encoder(tuple(_read_blocks(config, norm, layers, decoder=False)), norm),
        width_key="d_model",
        max_length_key="n_positions",
        max_length=512,
    )
    return cfg.replace(tied_head=tied, logit_scale=cfg.width**-0.5 if tied else 1.0)


def _read_blocks(config: Reader, norm: RMSNorm, layers: int, *, decoder: bool) -> list[Block]:
    """The blocks of a stack; the first has the table of biases."""
    heads, head_dim = config.integer("num_heads"), config.integer("d_kv")
    buckets = config.integer("relative_attention_num_buckets", 32)
    distance = config.integer("relative_attention_max_distance", 128)
    mixers = [
        Attention(
            heads,
            heads,
            head_dim,
            rope=None,
            relative=RelativeBias(buckets, distance, own=i == 0),
            scale=1.0,
            causal=decoder,
        )
        for i in range(layers)
    ]
    *gated, activation = config.choice("feed_forward_proj", FEED_FORWARD, "relu").split()
    # these two keys repeat it; transformers prefers them
    same, named = config.get("is_gated_act") in (None, bool(gated)), config.get("dense_act_fn")
    if not same or (named is not None and ACTIVATIONS.get(str(named)) != activation):
        raise ValueError(
            f"feed_forward_proj={config.get('feed_forward_proj')!r} disagrees with "
            f"dense_act_fn={str(named)[:100]!r}, is_gated_act={str(config.get('is_gated_act'))[:100]}."
        )
    width = config.integer("d_ff")
    ffn = GatedMLP(width, activation) if gated else MLP(width, activation, bias=False)
    cross = CrossAttention(heads, heads, head_dim, scale=1.0) if decoder else None
    return [Block(mixer, ffn, norm, cross=cross) for mixer in mixers]


def write(cfg: Any) -> dict[str, Any]:
    mixer, ffn = cfg.blocks[0].mixer, cfg.blocks[0].ffn
    gated = isinstance(ffn, GatedMLP)
    activation = "gelu" if gated and ffn.activation == "gelu_tanh" else written_activation(ffn.activation)
    return {
        "is_encoder_decoder": True,
        "d_model": cfg.width,
        "d_kv": mixer.head_dim,
        "d_ff": ffn.width,
        "num_layers": len(cfg.encoder.blocks),
        "num_decoder_layers": len(cfg.blocks),
        "num_heads": mixer.num_heads,
        "relative_attention_num_buckets": mixer.relative.buckets,
        "relative_attention_max_distance": mixer.relative.max_distance,
        "feed_forward_proj": f"gated-{activation}" if gated else activation,
        "layer_norm_epsilon": cfg.final_norm.eps,
        "n_positions": cfg.max_length,
        "decoder_start_token_id": 0,
    }


FAMILY = Family(
    "t5",
    "T5ForConditionalGeneration",
    read,
    write,
    names,
    ignored_tensors=IGNORED_TENSORS,
    encoder_decoder=True,
    key_aliases=KEY_ALIASES,
)

"""ModernBERT: alternating global and local attention, each with its own rotary base.

Warner et al. 2024, arXiv:2412.13663.
"""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import GatedMLP
from model.blocks.heads import Transform
from model.blocks.norms import LayerNorm
from model.blocks.positions import Rope
from model.config import Block, ModelConfig
from model.families.common import Family, Reader, read_activation, written_activation
from model.families.decoders import head_width, read_model, window_of, write_layer_types
from model.families.rope import read_rope, write_scaling
from model.families.tensors import Fused, Names

BARE, MASKED = "ModernBertModel", "ModernBertForMaskedLM"
KINDS = ("full_attention", "sliding_attention")
THETAS = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}
OLD_THETAS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
INSIDE: Names = {
    "embeddings.tok_embeddings.weight": "embedding",
    "embeddings.norm.weight": "embed_norm/scale",
    "embeddings.norm.bias": "embed_norm/bias",
    "layers.{i}.attn_norm.weight": "mixer_norm/scale",
    "layers.{i}.attn_norm.bias": "mixer_norm/bias",
    "layers.{i}.attn.Wqkv.weight": Fused(("mixer/q", "mixer/k", "mixer/v")),
    "layers.{i}.attn.Wqkv.bias": Fused(("mixer/q_bias", "mixer/k_bias", "mixer/v_bias")),
    "layers.{i}.attn.Wo.weight": "mixer/o",
    "layers.{i}.attn.Wo.bias": "mixer/o_bias",
    "layers.{i}.mlp_norm.weight": "ffn_norm/scale",
    "layers.{i}.mlp_norm.bias": "ffn_norm/bias",
    "layers.{i}.mlp.Wi.weight": Fused(("ffn/gate", "ffn/up")),
    "layers.{i}.mlp.Wi.bias": Fused(("ffn/gate_bias", "ffn/up_bias")),
    "layers.{i}.mlp.Wo.weight": "ffn/down",
    "layers.{i}.mlp.Wo.bias": "ffn/down_bias",
    "final_norm.weight": "final_norm/scale",
    "final_norm.bias": "final_norm/bias",
}
HEAD: Names = {
    "head.dense.weight": "head_transform/dense",
    "head.dense.bias": "head_transform/dense_bias",
    "head.norm.weight": "head_transform/norm/scale",
    "head.norm.bias": "head_transform/norm/bias",
    "decoder.weight": "head",
    "decoder.bias": "head_bias",
}
# Tensors of a masked-token head, ignored if the config has no such head.
IGNORED_TENSORS = (
    "head.dense.weight",
    "head.dense.bias",
    "head.norm.weight",
    "head.norm.bias",
    "decoder.bias",
)


def names(cfg: ModelConfig) -> Names:
    prefix = "model." if cfg.head_transform else ""
    return {prefix + name: ours for name, ours in INSIDE.items()} | HEAD


def tensor_aliases(name: str) -> tuple[str, ...]:
    """The name with and without the prefix of the bare model."""
    return f"model.{name}", name.removeprefix("model.")


def read(config: Reader) -> ModelConfig:
    for key in ("deterministic_flash_attn", "reference_compile", "repad_logits_with_grad"):
        config.get(key)  # implementation options, which do not change the numbers
    for key in ("classifier_pooling", "sparse_prediction", "sparse_pred_ignore_index"):
        config.get(key)  # for other heads and for training
    for key in ("initializer_cutoff_factor", "layer_norm_eps", "position_embedding_type"):
        config.get(key)  # ignored by transformers
    config.get("gradient_checkpointing")
    bare = config.get("architectures") == [BARE]
    if not bare:
        config.must_be("architectures", [MASKED])
    layers = config.layers()
    every = config.integer("global_attn_every_n_layers", 3)
    kinds = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    kinds = config.layer_kinds(layers, KINDS, kinds)
    norm = LayerNorm(config.number("norm_eps", 1e-5), bias=config.flag("norm_bias", False))
    mixers = _read_mixers(config)
    activation = read_activation(config, "hidden_activation", "gelu")
    ffn = GatedMLP(config.integer("intermediate_size"), activation, config.flag("mlp_bias", False))
    head_bias = config.flag("decoder_bias", True)
    transform = Transform(
        read_activation(config, "classifier_activation", "gelu"),
        bias=config.flag("classifier_bias", False),
        norm=norm,
    )
    return read_model(
        config,
        [Block(mixers[kind], ffn, norm, norm_mixer=i > 0) for i, kind in enumerate(kinds)],
        norm,
        tied=True,
        embed_norm=norm,
        head_bias=head_bias and not bare,
        head_transform=None if bare else transform,
    )


def _read_mixers(config: Reader) -> dict[str, Attention]:
    """One for each kind of layer."""
    heads, bias = config.integer("num_attention_heads"), config.flag("attention_bias", False)
    head_dim = head_width(config.integer("hidden_size"), heads)
    span = config.integer("local_attention", 128) // 2  # to either side
    config.must_be("rope_scaling", None)
    both = config.part("rope_parameters")
    if wrong := set(both.saved) - set(KINDS):
        raise ValueError(f"rope_parameters has {sorted(wrong)} beside a part for each kind of layer.")
    mixers = {}
    for kind in KINDS:
        theta = config.number(OLD_THETAS[kind], THETAS[kind])
        rope = read_rope(
            Reader({"rope_parameters": both.get(kind)}), head_dim, theta=theta, kinds=("default", "linear")
        )
        window = span + 1 if kind == "sliding_attention" else None
        mixers[kind] = Attention(
            heads, heads, head_dim, rope, qkv_bias=bias, out_bias=bias, window=window, causal=False
        )
    return mixers


def write(cfg: Any) -> dict[str, Any]:
    mixer, ffn, transform = cfg.blocks[0].mixer, cfg.blocks[0].ffn, cfg.head_transform
    ropes = {bool(block.mixer.window): block.mixer.rope for block in cfg.blocks}
    kinds = {kind: ropes.get(kind == "sliding_attention", Rope(THETAS[kind])) for kind in KINDS}
    saved = {
        "architectures": [MASKED if transform else BARE],
        "hidden_size": cfg.width,
        "intermediate_size": ffn.width,
        "num_hidden_layers": len(cfg.blocks),
        "num_attention_heads": mixer.num_heads,
        "hidden_activation": written_activation(ffn.activation),
        "max_position_embeddings": cfg.max_length,
        "norm_eps": cfg.final_norm.eps,
        "norm_bias": cfg.final_norm.bias,
        "attention_bias": mixer.qkv_bias,
        "mlp_bias": ffn.bias,
        "decoder_bias": cfg.head_bias,
        "local_attention": 2 * ((window_of(cfg) or 65) - 1),
        "layer_types": write_layer_types(cfg),
        "rope_parameters": {
            kind: {"rope_theta": rope.theta, **(write_scaling(rope.scaling) or {"rope_type": "default"})}
            for kind, rope in kinds.items()
        },
    }
    saved |= {OLD_THETAS[kind]: rope.theta for kind, rope in kinds.items()}  # as transformers 4 reads them
    if transform:
        saved |= {
            "classifier_activation": written_activation(transform.activation),
            "classifier_bias": transform.bias,
        }
    return saved


FAMILY = Family(
    "modernbert",
    MASKED,
    read,
    write,
    names,
    ignored_tensors=IGNORED_TENSORS,
    tensor_aliases=tensor_aliases,
    causal=False,
)

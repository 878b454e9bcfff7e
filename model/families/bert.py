"""BERT: an encoder with its masked-token head, bare with its pooler (sentence embedders), or as a classifier.

Devlin et al. 2018, arXiv:1810.04805; Reimers and Gurevych 2019, arXiv:1908.10084.
"""

from __future__ import annotations

from typing import Any

from model.blocks.attention import Attention
from model.blocks.ffn import MLP
from model.blocks.heads import Transform
from model.blocks.norms import LayerNorm
from model.blocks.positions import LearnedPositions
from model.config import Block, ClassHead, ModelConfig
from model.families.common import Family, Reader, read_activation, written_activation
from model.families.decoders import head_width, read_model
from model.families.tensors import Names

BARE, MASKED, PRETRAINED = "BertModel", "BertForMaskedLM", "BertForPreTraining"
CLASSIFIER = "BertForSequenceClassification"
INSIDE: Names = {
    "embeddings.word_embeddings.weight": "embedding",
    "embeddings.position_embeddings.weight": "positions/table",
    "embeddings.token_type_embeddings.weight": "token_types",
    "embeddings.LayerNorm.weight": "embed_norm/scale",
    "embeddings.LayerNorm.bias": "embed_norm/bias",
    "encoder.layer.{i}.attention.self.query.weight": "mixer/q",
    "encoder.layer.{i}.attention.self.query.bias": "mixer/q_bias",
    "encoder.layer.{i}.attention.self.key.weight": "mixer/k",
    "encoder.layer.{i}.attention.self.key.bias": "mixer/k_bias",
    "encoder.layer.{i}.attention.self.value.weight": "mixer/v",
    "encoder.layer.{i}.attention.self.value.bias": "mixer/v_bias",
    "encoder.layer.{i}.attention.output.dense.weight": "mixer/o",
    "encoder.layer.{i}.attention.output.dense.bias": "mixer/o_bias",
    "encoder.layer.{i}.attention.output.LayerNorm.weight": "mixer_sum_norm/scale",
    "encoder.layer.{i}.attention.output.LayerNorm.bias": "mixer_sum_norm/bias",
    "encoder.layer.{i}.intermediate.dense.weight": "ffn/up",
    "encoder.layer.{i}.intermediate.dense.bias": "ffn/up_bias",
    "encoder.layer.{i}.output.dense.weight": "ffn/down",
    "encoder.layer.{i}.output.dense.bias": "ffn/down_bias",
    "encoder.layer.{i}.output.LayerNorm.weight": "ffn_sum_norm/scale",
    "encoder.layer.{i}.output.LayerNorm.bias": "ffn_sum_norm/bias",
    "pooler.dense.weight": "pooler/dense",
    "pooler.dense.bias": "pooler/dense_bias",
}
HEAD: Names = {
    "cls.predictions.transform.dense.weight": "head_transform/dense",
    "cls.predictions.transform.dense.bias": "head_transform/dense_bias",
    "cls.predictions.transform.LayerNorm.weight": "head_transform/norm/scale",
    "cls.predictions.transform.LayerNorm.bias": "head_transform/norm/bias",
    "cls.predictions.bias": "head_bias",
    "cls.predictions.decoder.weight": "head",
    "classifier.weight": "class_head",
    "classifier.bias": "class_head_bias",
}
# A constant, a copy of the head's bias, and the parts of the other kinds of checkpoints.
IGNORED_TENSORS = ("embeddings.position_ids", "predictions.decoder.bias")
IGNORED_TENSORS += tuple(
    name for name in HEAD if name.startswith("cls.") and not name.endswith("decoder.weight")
)
IGNORED_TENSORS += (
    "pooler.dense.weight",
    "pooler.dense.bias",
    "seq_relationship.weight",
    "seq_relationship.bias",
)


def names(cfg: ModelConfig) -> Names:
    prefix = "bert." if cfg.head_transform or cfg.heads else ""
    return {prefix + name: ours for name, ours in INSIDE.items()} | HEAD


def tensor_aliases(name: str) -> tuple[str, ...]:
    """Google's names of the norms' parameters, and names with or without the model's prefix."""
    new = name.replace(".gamma", ".weight").replace(".beta", ".bias")
    return new, f"bert.{new}", new.removeprefix("bert.")


def read(config: Reader) -> ModelConfig:
    config.must_be("position_embedding_type", "absolute")
    config.must_be("tie_word_embeddings", True)
    config.must_be("is_decoder", False)
    config.get("gradient_checkpointing")
    architecture = _architecture(config)
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    norm = LayerNorm(config.number("layer_norm_eps", 1e-12))
    activation = read_activation(config, default="gelu")
    mixer = Attention(
        heads, heads, head_width(width, heads), None, qkv_bias=True, out_bias=True, causal=False
    )
    block = Block(mixer, MLP(config.integer("intermediate_size"), activation), None, sum_norm=norm)
    masked = architecture in (MASKED, PRETRAINED)
    classes = (ClassHead("class", _read_labels(config), pooled=True),) if architecture == CLASSIFIER else ()
    return read_model(
        config,
        [block] * config.layers(),
        None,
        tied=True,
        max_length=512,
        positions=LearnedPositions(config.integer("max_position_embeddings", 512)),
        token_types=config.integer("type_vocab_size", 2),
        embed_norm=norm,
        head_bias=masked,
        head_transform=Transform(activation, norm=norm) if masked else None,
        pooler=None if masked else Transform("tanh", norm=None),
        heads=classes,
    )


def _architecture(config: Reader) -> str:
    """The first known architecture of `architectures`."""
    named, known = config.get("architectures") or [MASKED], (BARE, MASKED, PRETRAINED, CLASSIFIER)
    found = [name for name in known if isinstance(named, list) and name in named]
    if not found:
        raise ValueError(
            f"architectures={str(named)[:200]} is not supported; {', '.join(known)} are (one of them)."
        )
    return found[0]


def _read_labels(config: Reader) -> tuple[str, ...]:
    labels = config.get("id2label")
    if labels is None:
        return tuple(f"LABEL_{i}" for i in range(config.integer("num_labels", 2)))
    if not isinstance(labels, dict) or {str(i) for i in labels} != {str(i) for i in range(len(labels))}:
        raise ValueError(f"id2label={str(labels)[:200]} does not name the classes from 0 on.")
    return tuple(str(name) for _, name in sorted(labels.items(), key=lambda item: int(item[0])))


def write(cfg: Any) -> dict[str, Any]:
    block, saved = cfg.blocks[0], {}
    if cfg.heads:
        labels = cfg.heads[0].labels
        saved = {
            "id2label": {str(i): name for i, name in enumerate(labels)},
            "label2id": {name: i for i, name in enumerate(labels)},
        }
    architecture = MASKED if cfg.head_transform else CLASSIFIER if cfg.heads else BARE
    return saved | {
        "architectures": [architecture],
        "hidden_size": cfg.width,
        "num_hidden_layers": len(cfg.blocks),
        "num_attention_heads": block.mixer.num_heads,
        "intermediate_size": block.ffn.width,
        "hidden_act": written_activation(block.ffn.activation),
        "layer_norm_eps": block.sum_norm.eps,
        "max_position_embeddings": cfg.max_length,
        "type_vocab_size": cfg.token_types,
    }


FAMILY = Family(
    "bert",
    MASKED,
    read,
    write,
    names,
    ignored_tensors=IGNORED_TENSORS,
    tensor_aliases=tensor_aliases,
    causal=False,
)

"""Writes GGUF files for llama.cpp: float32, float16 and bfloat16, with the tokenizer inside."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from model.adapters import check_without_adapters
from model.blocks.attention import Attention
from model.blocks.ffn import GatedMLP
from model.blocks.norms import RMSNorm
from model.blocks.positions import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, Scaling
from model.config import Block, ModelConfig
from model.families.common import difference
from model.families.tensors import Tensor, get, name_of, tensor_table
from model.formats.gguf.container_writer import DTYPES, TYPES, write
from model.formats.gguf.reading import (
    NAMES,
    ROPE_FACTORS,
    ROTATED_PAIRS,
    halves_to_pairs,
    heads_of,
    rope_factors,
)
from model.formats.gguf.tokenizer import tokenizer_metadata
from model.function import Params
from model.layout import relayout, without_mtp

FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # llama.cpp's llama_ftype

_log = logging.getLogger(__name__)


def save(path: str | Path, cfg: ModelConfig, params: Params, tokenizer: dict[str, bytes]) -> None:
    """Write one file; matrices keep their dtype, and vectors are float32, as llama.cpp needs.

    MTP modules are left out with a line in the log, because llama.cpp's llama, qwen2 and qwen3 do not have them.

    Args:
      tokenizer: files of a Hugging Face tokenizer folder; {}: the file has no vocabulary.

    Raises:
      ValueError: no GGUF architecture supports this model, or GGUF does not support this tokenizer.
    """
    check_without_adapters(cfg)
    if cfg.mtp is not None:
        cfg, params = without_mtp(cfg, params)
        _log.warning(
            "%s: written without multi-token prediction, which GGUF's llama, qwen2 and qwen3 do not have.",
            path,
        )
    architecture = _architecture(cfg)
    cfg, params = relayout(cfg, params, scan=False)
    table = {tensor.name: tensor for tensor in tensor_table(cfg, NAMES)}
    kinds = {name: _type_of(params, tensor) for name, tensor in table.items()}
    shapes = {name: tensor.shape for name, tensor in table.items()}
    rope = cfg.blocks[0].mixer.rope
    if rope.scaling is not None and not isinstance(rope.scaling, LinearScaling):
        kinds[ROPE_FACTORS], shapes[ROPE_FACTORS] = "F32", (cfg.blocks[0].mixer.head_dim // 2,)

    def values(name: str) -> np.ndarray:
        if name == ROPE_FACTORS:
            return rope_factors(rope, cfg.blocks[0].mixer.head_dim)
        return _values(cfg, params, table[name], architecture, kinds[name])

    metadata = _metadata(cfg, architecture, kinds[name_of(NAMES, "embedding")])
    if tokenizer:
        metadata |= tokenizer_metadata(tokenizer, cfg.vocab_size)
    write(Path(path), metadata, {name: (kinds[name], shapes[name]) for name in kinds}, values)


def _architecture(cfg: ModelConfig) -> str:
    if why := difference(cfg, _plain(cfg)):
        raise ValueError(f'GGUF {why}. Save with format="native".')
    mixer, ffn = cfg.blocks[0].mixer, cfg.blocks[0].ffn
    if mixer.qk_norm is not None:
        if mixer.qkv_bias or mixer.out_bias or ffn.bias:
            raise ValueError('GGUF\'s qwen3 has no biases beside qk_norm. Save with format="native".')
        return "qwen3"
    return "qwen2" if mixer.qkv_bias and not mixer.out_bias and not ffn.bias else "llama"


def _plain(cfg: ModelConfig) -> ModelConfig:
    """The nearest model that these architectures support: equal blocks of Llama's parts."""
    mixer, ffn = cfg.blocks[0].mixer, cfg.blocks[0].ffn
    if not (
        isinstance(mixer, Attention) and isinstance(ffn, GatedMLP) and isinstance(cfg.final_norm, RMSNorm)
    ):
        raise ValueError(
            f"GGUF has no place for {type(mixer).__name__}, {type(ffn).__name__} and {type(cfg.final_norm).__name__} "
            'together in these architectures. Save with format="native".'
        )
    norm = RMSNorm(cfg.final_norm.eps)
    rope = mixer.rope or Rope()
    plain = Attention(
        mixer.num_heads,
        mixer.num_kv_heads,
        mixer.head_dim,
        Rope(rope.theta, rope.scaling if _divides(rope.scaling) else None),
        qkv_bias=mixer.qkv_bias,
        out_bias=mixer.out_bias,
        qk_norm=norm if mixer.qk_norm else None,
    )
    block = Block(plain, GatedMLP(ffn.width, bias=ffn.bias), norm)
    return ModelConfig(
        cfg.vocab_size,
        cfg.width,
        (block,) * len(cfg.blocks),
        final_norm=norm,
        tied_head=cfg.tied_head,
        max_length=cfg.max_length,
    )


def _divides(scaling: Scaling | None) -> bool:
    """Whether a scaling only divides each frequency by a number."""
    if isinstance(scaling, LongRopeScaling):
        return scaling.short == scaling.long and scaling.magnitude == 1
    return isinstance(scaling, LinearScaling | Llama3Scaling)


def _metadata(cfg: ModelConfig, architecture: str, kind: str) -> dict[str, Any]:
    block: Any = cfg.blocks[0]
    mixer = block.mixer
    architecture_keys = {
        "vocab_size": cfg.vocab_size,
        "context_length": cfg.max_length,
        "embedding_length": cfg.width,
        "block_count": len(cfg.blocks),
        "feed_forward_length": block.ffn.width,
        "attention.head_count": mixer.num_heads,
        "attention.head_count_kv": mixer.num_kv_heads,
        "attention.key_length": mixer.head_dim,
        "attention.value_length": mixer.head_dim,
        "attention.layer_norm_rms_epsilon": float(block.norm.eps),
        "rope.dimension_count": mixer.head_dim,
        "rope.freq_base": float(mixer.rope.theta),
    }
    if isinstance(mixer.rope.scaling, LinearScaling):
        architecture_keys |= {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": float(mixer.rope.scaling.factor),
        }
    general = {"general.architecture": architecture, "general.file_type": FILE_TYPES[kind]}
    return general | {f"{architecture}.{key}": value for key, value in architecture_keys.items()}


def _type_of(params: Params, tensor: Tensor) -> str:
    dtype = np.dtype(get(params, tensor.pieces[0].path).dtype)
    if dtype not in TYPES:
        raise ValueError(
            f"{'/'.join(tensor.pieces[0].path)} is {dtype}; float32, float16 and bfloat16 can be saved."
        )
    return TYPES[dtype] if len(tensor.shape) > 1 else "F32"


def _values(cfg: ModelConfig, params: Params, tensor: Tensor, architecture: str, kind: str) -> np.ndarray:
    values = tensor.to_theirs([np.asarray(get(params, tensor.pieces[0].path))])
    if architecture in ROTATED_PAIRS and (heads := heads_of(cfg, tensor)):
        values = halves_to_pairs(values, heads)
    return values.astype(DTYPES[kind], copy=False)

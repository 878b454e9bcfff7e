"""Models to GGUF files that llama.cpp reads: float32, float16 and bfloat16, with the tokenizer inside."""

from __future__ import annotations

import logging
import math
import os
import struct
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from configs.gguf import BLOCKS, DEFAULT_ALIGNMENT, MAX_DIMS
from model.adapters import check_without_adapters
from model.blocks.attention import Attention
from model.blocks.ffn import GatedMLP
from model.blocks.norms import RMSNorm
from model.blocks.positions import Llama3Scaling, Rope
from model.config import Block, ModelConfig
from model.families.common import difference
from model.families.tensors import Tensor, get, name_of, tensor_table
from model.function import Params
from model.gguf import NAMES, ROPE_FACTORS, ROTATED_PAIRS, halves_to_pairs, heads_of, rope_factors
from model.gguf_tokenizer import tokenizer_metadata
from model.layout import relayout, without_future

TYPES = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # llama.cpp's llama_ftype

_log = logging.getLogger(__name__)
_TYPE_IDS = {name: number for number, (name, _, _) in BLOCKS.items()}


def save(path: str | Path, cfg: ModelConfig, params: Params, tokenizer: dict[str, bytes]) -> None:
    """Write one file; matrices keep their dtype, vectors are float32 as llama.cpp wants them.

    A future is left out, with a line in the log: llama.cpp's llama, qwen2 and qwen3 have no place for one.

    Args:
      tokenizer: files of a Hugging Face tokenizer folder; {}: the file has no vocabulary.

    Raises:
      ValueError: no GGUF architecture can hold this model, or GGUF can't name this tokenizer.
    """
    check_without_adapters(cfg)
    if cfg.future is not None:
        cfg, params = without_future(cfg, params)
        _log.warning(
            "%s: written without multi-token prediction, for which GGUF's llama, qwen2 and qwen3 have no place.",
            path,
        )
    architecture = _architecture(cfg)
    cfg, params = relayout(cfg, params, scan=False)
    table = {tensor.name: tensor for tensor in tensor_table(cfg, NAMES)}
    kinds = {name: _type_of(params, tensor) for name, tensor in table.items()}
    shapes = {name: tensor.shape for name, tensor in table.items()}
    rope = cfg.blocks[0].mixer.rope
    if rope.scaling is not None:
        kinds[ROPE_FACTORS], shapes[ROPE_FACTORS] = "F32", (cfg.blocks[0].mixer.head_dim // 2,)

    def values(name: str) -> np.ndarray:
        if name == ROPE_FACTORS:
            return rope_factors(rope, cfg.blocks[0].mixer.head_dim)
        return _values(cfg, params, table[name], architecture, kinds[name])

    metadata = _metadata(cfg, architecture, kinds[name_of(NAMES, "embedding")])
    if tokenizer:
        metadata |= tokenizer_metadata(tokenizer, cfg.vocab_size)
    write(Path(path), metadata, {name: (kinds[name], shapes[name]) for name in kinds}, values)


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    values: Callable[[str], np.ndarray],
) -> None:
    """Write a GGUF version 3 container, one tensor at a time, under a temporary name first.

    Args:
      metadata: bool, int (uint32), float (float32), str, or lists of one of these; numpy arrays keep their type.
      tensors: type ("F32", "F16" or "BF16") and shape (outermost first) by name.
      values: the numbers of a name, in that type's dtype.
    """
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    header += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    offset, offsets = 0, {}
    for name, (kind, shape) in tensors.items():
        if not 1 <= len(shape) <= MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {len(shape)} dimensions; GGUF holds 1 to {MAX_DIMS}.")
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += _string(name) + dims + struct.pack("<IQ", _TYPE_IDS[kind], offset)
        offsets[name] = offset
        offset = _aligned(offset + math.prod(shape) * _DTYPES[kind].itemsize)
    start = _aligned(len(header))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            for name, (kind, shape) in tensors.items():
                array = np.ascontiguousarray(values(name))
                if (array.dtype, array.shape) != (_DTYPES[kind], shape):
                    raise ValueError(f"{name} is {array.dtype} {array.shape}; announced as {kind} {shape}.")
                file.write(b"\0" * (start + offsets[name] - file.tell()))
                file.write(array.reshape(-1).view(np.uint8).data)
            file.write(b"\0" * (start + offset - file.tell()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    """The nearest model that these architectures can hold: equal blocks of Llama's parts."""
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
        Rope(rope.theta, rope.scaling if isinstance(rope.scaling, Llama3Scaling) else None),
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


def _metadata(cfg: ModelConfig, architecture: str, kind: str) -> dict[str, Any]:
    block: Any = cfg.blocks[0]
    mixer = block.mixer
    of_architecture = {
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
    general = {"general.architecture": architecture, "general.file_type": FILE_TYPES[kind]}
    return general | {f"{architecture}.{key}": value for key, value in of_architecture.items()}


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
    return values.astype(_DTYPES[kind], copy=False)


_DTYPES = {name: dtype for dtype, name in TYPES.items()}

_ARRAY, _STRING = 9, 8
_VALUE_TYPES = {  # numpy dtype -> GGUF's type id
    np.dtype("uint8"): 0, np.dtype("int8"): 1, np.dtype("uint16"): 2, np.dtype("int16"): 3, np.dtype("uint32"): 4,
    np.dtype("int32"): 5, np.dtype("float32"): 6, np.dtype("bool"): 7, np.dtype("uint64"): 10, np.dtype("int64"): 11,
    np.dtype("float64"): 12,
}  # fmt: skip


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        head = struct.pack("<IIQ", _ARRAY, _VALUE_TYPES[value.dtype], value.size)
        return head + np.ascontiguousarray(value).tobytes()
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_string(item) for item in value)
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    return struct.pack("<If", 6, value)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _aligned(position: int) -> int:
    return -(-position // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT

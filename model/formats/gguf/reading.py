"""Models in GGUF files: reads metadata as `ModelConfig` and tensors as parameters, and writes both.

Architectures llama, qwen2 and qwen3, as llama.cpp names them (gguf-py/gguf/constants.py). `container` reads the
bytes, `model.formats.dequantize` quantized blocks.
"""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from model.blocks.attention import Attention
from model.blocks.ffn import SwiGLU
from model.blocks.norms import RMSNorm
from model.blocks.positions import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, Scaling
from model.config import Block, ModelConfig
from model.families.tensors import Names, Tensor, name_of, tensor_table, unflatten
from model.formats.dequantize import UNPACKERS, Unpacked, block_sizes, dequantize, unpack
from model.formats.fits import check_fits
from model.formats.gguf import container
from model.formats.gguf.container import GGUFError, GGUFFile
from model.formats.lazy import Lazy
from model.function import Params
from model.kernels.quantized_matmul.formats import FORMATS, Kind
from model.quantization import scale_blocks
from model.weights import Quantized

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROTATED_PAIRS = ("llama",)  # stores queries and keys with interleaved rotary pairs: (0, 1), (2, 3), ...

NAMES: Names = {
    "token_embd.weight": "embedding",
    "output.weight": "head",
    "output_norm.weight": "final_norm/scale",
    "blk.{i}.attn_norm.weight": "mixer_norm/scale",
    "blk.{i}.attn_q.weight": "mixer/q",
    "blk.{i}.attn_k.weight": "mixer/k",
    "blk.{i}.attn_v.weight": "mixer/v",
    "blk.{i}.attn_output.weight": "mixer/o",
    "blk.{i}.attn_q.bias": "mixer/q_bias",
    "blk.{i}.attn_k.bias": "mixer/k_bias",
    "blk.{i}.attn_v.bias": "mixer/v_bias",
    "blk.{i}.attn_output.bias": "mixer/o_bias",
    "blk.{i}.attn_q_norm.weight": "mixer/q_norm/scale",
    "blk.{i}.attn_k_norm.weight": "mixer/k_norm/scale",
    "blk.{i}.ffn_norm.weight": "ffn_norm/scale",
    "blk.{i}.ffn_gate.weight": "ffn/gate",
    "blk.{i}.ffn_up.weight": "ffn/up",
    "blk.{i}.ffn_down.weight": "ffn/down",
    "blk.{i}.ffn_gate.bias": "ffn/gate_bias",
    "blk.{i}.ffn_up.bias": "ffn/up_bias",
    "blk.{i}.ffn_down.bias": "ffn/down_bias",
}
ROPE_FACTORS = "rope_freqs.weight"  # [C / 2] divisors of the rotary frequencies

# Keys of an architecture that do not change the numbers: layouts, the context before it was extended, the pooling of
# embeddings, and the experts a token of a model without experts.
IGNORED = {
    "tensor_data_layout",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "pooling_type",
}
IGNORED |= {"expert_used_count"}
# Neutral values of further keys.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "rope.scaling.attn_factor"), (0, 1)),
    **dict.fromkeys(("attention.scale", "attn_logit_softcapping", "final_logit_softcapping"), (0,)),
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "leading_dense_block_count"), (0,)),
    **dict.fromkeys(("use_parallel_residual", "attention.shared_kv_layers", "nextn_predict_layers"), (0,)),
    "attention.causal": (True,),
}

_log = logging.getLogger(__name__)


def load_config(path: str | Path) -> ModelConfig:
    """The model's config from the metadata, with float32 activations.

    Raises GGUFError for a damaged file, another architecture, or inconsistent metadata.
    """
    return _config(container.read(path))


def load(path: str | Path, dtype: str | None = None, packed: bool = False) -> tuple[ModelConfig, Params]:
    """(cfg, lazy parameters) of a GGUF file; quantized tensors become `dtype`, default float32, or, with `packed`,
    `Quantized` weights with the file's own values and scales.

    Raises GGUFError as `load_config` does, and for missing, unknown or misshapen tensors.
    """
    file = container.read(path)
    cfg = _config(file)
    try:
        check_fits(cfg, [tensor.shape for tensor in file.tensors.values()], 1, experts_apart=False)
    except ValueError as error:
        raise GGUFError(f"{file.path}: {error}") from None
    if dtype is not None:
        cfg = cfg.replace(dtype=dtype, param_dtype=dtype)
    table = tensor_table(cfg, NAMES)
    _check_tensors(file, table)
    params = {}
    for tensor in table:
        piece, stored = tensor.pieces[0], file.tensors[tensor.name]
        if packed and stored.type in UNPACKERS and (weight := _quantized(file, cfg, tensor)) is not None:
            params[piece.path] = weight
            continue
        make = functools.partial(_values, file, cfg, tensor)
        params[piece.path] = Lazy(piece.shape, jnp.dtype(cfg.param_dtype), make, unpacked=True)
    return cfg, unflatten(params)


def _values(file: GGUFFile, cfg: ModelConfig, tensor: Tensor) -> np.ndarray:
    stored = file.tensors[tensor.name]
    return _to_ours(file, cfg, tensor, dequantize(file.raw(tensor.name), stored.type, stored.shape))


def _quantized(file: GGUFFile, cfg: ModelConfig, tensor: Tensor) -> Quantized | None:
    """A tensor [outputs, inputs] with its own values, scales and offsets, read at their first use.

    None: a block of the file is no block of the parameter, because it reaches over two heads.
    """
    piece, stored = tensor.pieces[0], file.tensors[tensor.name]
    elements, nbytes = block_sizes(stored.type)
    of_one = unpack(np.zeros(nbytes, np.uint8), stored.type, (1, elements))
    assert of_one is not None
    block = elements // of_one.scales.size
    axes, ndim = tuple(range(len(piece.shape))), len(piece.shape)
    inputs = tuple(i for i in axes if math.prod(piece.shape[: i + 1]) <= stored.shape[1])
    inputs = tuple(i - ndim for i in inputs) if tensor.transposed else (-1,)
    sizes = tuple(piece.shape[i] for i in inputs)
    counts = scale_blocks(sizes, block)
    if counts is None or math.prod(sizes) != stored.shape[1]:
        return None
    steps = [1] * ndim
    for i, size, n in zip(inputs, sizes, counts, strict=True):
        steps[i] = size // n
    every = tuple(slice(None, None, step) for step in steps)
    # shared by the parts, so that a tensor is unpacked once
    unpacked = functools.cache(lambda: unpack(file.raw(tensor.name), stored.type, stored.shape))

    def values() -> np.ndarray:
        return _to_ours(file, cfg, tensor, cast(Unpacked, unpacked()).values)

    def of_blocks(name: str) -> np.ndarray:
        by_input = np.repeat(getattr(unpacked(), name), block, axis=1)
        return _to_ours(file, cfg, tensor, by_input)[every]

    def lazy(name: str) -> Lazy:
        shape = tuple(size // step for size, step in zip(piece.shape, steps, strict=True))
        make = functools.partial(of_blocks, name)
        return Lazy(shape, np.dtype(of_one.scales.dtype), make, unpacked=True)

    kind = cast(Kind, of_one.kind)
    whole: Any = Lazy(piece.shape, FORMATS[kind].dtype, values, unpacked=True)
    scales: Any = lazy("scales")
    offsets: Any = None if of_one.offsets is None else lazy("offsets")
    return Quantized(whole, scales, kind, inputs, offsets=offsets)


def _to_ours(file: GGUFFile, cfg: ModelConfig, tensor: Tensor, values: np.ndarray) -> np.ndarray:
    if file.metadata["general.architecture"] in ROTATED_PAIRS and (heads := heads_of(cfg, tensor)):
        values = pairs_to_halves(values, heads)
    return tensor.to_ours(values)[0]


def pairs_to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key map [heads * C, ...] from rotary pairs (2c, 2c + 1) to pairs (c, c + C/2)."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def halves_to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `pairs_to_halves`."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def heads_of(cfg: ModelConfig, tensor: Tensor) -> int:
    """The number of heads of a query or key tensor; 0 for other tensors."""
    mixer = cfg.blocks[0].mixer
    heads = {"q": mixer.num_heads, "k": mixer.num_kv_heads}
    return heads.get(tensor.pieces[0].path[-1].removesuffix("_bias"), 0)


def _config(file: GGUFFile) -> ModelConfig:
    metadata = _Metadata(file)
    architecture, blocks = metadata.architecture, metadata.integer("block_count")
    if blocks > len(file.tensors):
        raise metadata.wrong("block_count", f"is {blocks}, but the file has {len(file.tensors)} tensors")
    width, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", width // heads)
    metadata.must_be("attention.value_length", head_dim, "values as wide as keys")
    metadata.must_be("rope.dimension_count", head_dim, "rotation of the whole head")
    metadata.must_be("expert_count", 0, "no experts")
    max_length = metadata.integer("context_length")
    window = metadata.integer("attention.sliding_window", 0)
    if 0 < window < max_length:
        raise metadata.wrong("attention.sliding_window", f"is {window}; windows are not supported")
    norm = RMSNorm(metadata.number("attention.layer_norm_rms_epsilon"))
    try:
        mixer = Attention(
            heads,
            metadata.integer("attention.head_count_kv", heads),
            head_dim,
            Rope(
                metadata.number("rope.freq_base", 10_000.0),
                _rope_scaling(file, metadata, head_dim, max_length),
            ),
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            out_bias="blk.0.attn_output.bias" in file.tensors,
            qk_norm=norm if architecture == "qwen3" else None,
        )
    except GGUFError:
        raise
    except ValueError as error:
        raise GGUFError(f"{file.path}: {error}") from None
    ffn = SwiGLU(metadata.integer("feed_forward_length"), bias="blk.0.ffn_gate.bias" in file.tensors)
    vocab_size = _vocab_size(file, metadata, width)
    metadata.check_unread()
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        blocks=(Block(mixer, ffn, norm),) * blocks,
        final_norm=norm,
        tied_head=name_of(NAMES, "head") not in file.tensors,
        max_length=max_length,
    )


def _vocab_size(file: GGUFFile, metadata: _Metadata, width: int) -> int:
    embedding = file.tensors.get(name_of(NAMES, "embedding"))
    if embedding is None:
        raise GGUFError(f"{file.path}: has no tensor {name_of(NAMES, 'embedding')!r}, so it holds no model.")
    if len(embedding.shape) != 2 or embedding.shape[1] != width:
        raise GGUFError(
            f"{file.path}: {embedding.name!r} is {embedding.shape}; wanted (vocabulary, {width})."
        )
    rows = embedding.shape[0]
    metadata.must_be("vocab_size", rows, f"the {rows} rows of {embedding.name!r}")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        raise GGUFError(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} tokens for {rows} embedding rows."
        )
    return rows


def _rope_scaling(file: GGUFFile, metadata: _Metadata, head_dim: int, max_length: int) -> Scaling | None:
    """The scaling: linear, or a divisor for each frequency.

    GGUF stores Llama 3.1's scaling as divisors; its parameters are found again from them.
    """
    kind = metadata.string("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise metadata.wrong(
            "rope.scaling.type", f"is {kind!r}; 'none', 'linear' and {ROPE_FACTORS!r} are read"
        )
    # llama.cpp: a factor without a type is linear, 0 is none, and old files have the second name
    factor, older = (metadata.number_or_zero(key) for key in ("rope.scaling.factor", "rope.scale_linear"))
    factor = (factor or older or 1.0) if kind == "linear" else 1.0
    if ROPE_FACTORS not in file.tensors:
        return LinearScaling(factor) if factor != 1 else None
    if factor != 1:
        raise metadata.wrong("rope.scaling.factor", f"is {factor}; beside {ROPE_FACTORS!r} only 1 is read")
    stored = file.tensors[ROPE_FACTORS]
    if stored.shape != (head_dim // 2,):
        raise GGUFError(f"{file.path}: {ROPE_FACTORS!r} is {stored.shape}; wanted ({head_dim // 2},).")
    factors = dequantize(file.raw(ROPE_FACTORS), stored.type, stored.shape)
    if not np.all((factors > 0) & (factors < np.inf)):
        raise GGUFError(f"{file.path}: {ROPE_FACTORS!r} has {factors.min():g}; wanted positive numbers.")
    if np.all(factors == 1):
        return None
    rope = Rope(metadata.number("rope.freq_base", 10_000.0))
    lengths = [1 << power for power in range(8, max_length.bit_length())]
    for length in sorted(lengths, key=lambda length: length != 8192):  # try Llama 3.1 to 3.3 first
        scaling = _scaling_with_effect(rope, factors, length)
        if scaling and np.allclose(rope_factors(Rope(rope.theta, scaling), head_dim), factors, rtol=1e-4):
            return scaling
    # else a divisor for each frequency, at any length
    divisors = tuple(float(factor) for factor in factors)
    return LongRopeScaling(divisors, divisors, max_length)


def _scaling_with_effect(rope: Rope, factors: np.ndarray, length: int) -> Llama3Scaling | None:
    """The scaling with this original length that divides the lowest frequency like `factors`."""
    frequencies = rope.frequencies(2 * len(factors)).astype(np.float64)
    kept = Llama3Scaling(np.inf, 1.0, 4.0, length).scale(frequencies, rope.theta)[-1] / frequencies[-1]
    rest = 1 / float(factors[-1]) - kept
    return Llama3Scaling(float(f"{(1 - kept) / rest:.5g}"), 1.0, 4.0, length) if 0 < rest < 1 - kept else None


def rope_factors(rope: Rope, head_dim: int) -> np.ndarray:
    """[C / 2] float32: the scaling's divisor of each frequency."""
    if isinstance(rope.scaling, LongRopeScaling):
        return np.array(rope.scaling.short, np.float32)
    return Rope(rope.theta).frequencies(head_dim) / rope.frequencies(head_dim)


def _check_tensors(file: GGUFFile, table: list[Tensor]) -> None:
    names = {tensor.name for tensor in table}
    missing = [tensor.name for tensor in table if tensor.name not in file.tensors]
    if missing:
        raise GGUFError(
            f"{file.path}: lacks {len(missing)} tensors that its metadata requires: {_some(missing)}."
        )
    unknown = [name for name in file.tensors if name not in names and name != ROPE_FACTORS]
    if unknown:
        raise GGUFError(
            f"{file.path}: has {len(unknown)} tensors that its model does not have: {_some(unknown)}."
        )
    for tensor in table:
        if file.tensors[tensor.name].shape != tensor.shape:
            raise GGUFError(
                f"{file.path}: tensor {tensor.name!r} is {file.tensors[tensor.name].shape}, but by the metadata it "
                f"would be {tensor.shape}."
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _written(number: float) -> float:
    """The shortest decimal of a float32: 1e-05, not 9.99999974738e-06."""
    return float(np.float32(number).astype(str))


class _Metadata:
    """Reads the values under "<architecture>." with checks of type and range."""

    def __init__(self, file: GGUFFile):
        self.file = file
        architecture = file.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise GGUFError(
                f"{file.path}: general.architecture is {architecture!r}; known are {', '.join(ARCHITECTURES)}."
            )
        self.architecture: str = architecture
        self._read: set[str] = set()

    def wrong(self, key: str, problem: str) -> GGUFError:
        return GGUFError(f"{self.file.path}: {self.architecture}.{key} {problem}.")

    def value(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self.wrong(key, "is missing")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive int below 2**31, or the default."""
        value = self.value(key, default)
        if type(value) is not int or not (0 < value < 2**31 or value == default):
            raise self.wrong(key, f"is {value!r}; wanted a positive int below 2**31")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.wrong(key, f"is {value!r}; wanted a positive number")
        return _written(value)

    def number_or_zero(self, key: str) -> float:
        """The number, or 0 if it is absent."""
        value = self.value(key, 0.0)
        return 0.0 if type(value) in (int, float) and value == 0 else self.number(key)

    def string(self, key: str, default: str) -> str:
        value = self.value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, f"is {value!r}; wanted a string")
        return value

    def check_unread(self) -> None:
        """Raises GGUFError for an unread key of the architecture that may change the numbers."""
        prefix = f"{self.architecture}."
        for name, value in self.file.metadata.items():
            key = name.removeprefix(prefix)
            if not name.startswith(prefix) or key in self._read | IGNORED:
                continue
            if isinstance(value, np.ndarray) or value not in NEUTRAL.get(key, ()):
                raise self.wrong(key, f"is {str(value)[:100]}; only a model without it is read")

    def must_be(self, key: str, wanted: int, meaning: str) -> None:
        value = self.value(key, wanted)
        if value != wanted:
            raise self.wrong(key, f"is {value!r}; wanted {wanted} ({meaning})")

"""Decodes GGUF tensor bytes, in numpy: to numbers, or to small integers with the scales of their blocks.

The block layouts are those of ggml (ggml-common.h and ggml-quants.c, https://github.com/ggml-org/ggml). A block of
32 elements has one float16 scale `d` (and minimum `m`); a K-quant super-block of 256 has its own small scales too.
"""

# N blocks of a tensor

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from model.formats.gguf.container import BLOCKS


def dequantize(raw: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of one tensor as float32 of `shape`.

    Args:
      raw: uint8, exactly the tensor's bytes.
      kind: ggml's name of the type: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K.

    Raises:
      ValueError: a type that is not supported, or a number of bytes that does not fit `shape`.
    """
    if kind not in DECODERS:
        raise ValueError(f"tensor type {kind} is not read; only {', '.join(DECODERS)} are.")
    _check_size(raw, kind, shape)
    return DECODERS[kind](np.ascontiguousarray(raw).reshape(-1, _BLOCK_SIZES[kind][1])).reshape(shape)


class Unpacked(NamedTuple):
    """The parts of a quantized tensor, as the format `kind` of `model.kernels.quantized_matmul` has them."""

    kind: str
    values: np.ndarray  # int8, of the tensor's shape
    scales: np.ndarray  # [..., blocks of the last axis] float16 or float32
    offsets: np.ndarray | None  # like the scales


def unpack(raw: np.ndarray, kind: str, shape: tuple[int, ...]) -> Unpacked | None:
    """A quantized tensor without rounding: value times scale plus offset is its number. None: it is not quantized.

    Raises:
      ValueError: as `dequantize`.
    """
    if kind not in UNPACKERS:
        return None
    _check_size(raw, kind, shape)
    unpacked = UNPACKERS[kind](np.ascontiguousarray(raw).reshape(-1, _BLOCK_SIZES[kind][1]))
    by_block = lambda part: None if part is None else part.reshape(*shape[:-1], -1)
    scales, offsets = by_block(unpacked.scales), by_block(unpacked.offsets)
    return unpacked._replace(values=unpacked.values.reshape(shape), scales=scales, offsets=offsets)


def block_sizes(kind: str) -> tuple[int, int]:
    """(elements, bytes) of a block of ggml's type `kind`."""
    return _BLOCK_SIZES[kind]


def _check_size(raw: np.ndarray, kind: str, shape: tuple[int, ...]) -> None:
    elements, nbytes = _BLOCK_SIZES[kind]
    wanted = int(np.prod(shape, dtype=np.int64)) // elements * nbytes
    if raw.size != wanted or shape[-1] % elements:
        raise ValueError(
            f"{raw.size} bytes of {kind} are no tensor of shape {shape}, which has {wanted} bytes."
        )


def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(ml_dtypes.bfloat16).astype(np.float32)


def _q8_0(blocks: np.ndarray) -> Unpacked:
    """d, 32 signed bytes: d * q."""
    return Unpacked("int8", blocks[:, 2:].view(np.int8), _halves(blocks, 0), None)


def _q4_0(blocks: np.ndarray) -> Unpacked:
    """d, 16 bytes of two nibbles: d * (q - 8); the low nibbles are the first 16 elements."""
    return Unpacked("int4", _nibbles(blocks[:, 2:]).view(np.int8) - 8, _halves(blocks, 0), None)


def _q4_1(blocks: np.ndarray) -> Unpacked:
    """d, m, 16 bytes of two nibbles: d * q + m."""
    values = _nibbles(blocks[:, 4:]).view(np.int8) - 8
    return Unpacked("uint4", values, _halves(blocks, 0), _halves(blocks, 2))


def _q4_k(blocks: np.ndarray) -> Unpacked:
    """d, dmin, 12 bytes with a scale and a minimum of 6 bits for each of 8 groups, 128 bytes of two nibbles.

    The low nibbles of each 32 bytes are one group of 32 elements, the high nibbles the next.
    """
    packed = blocks[:, 4:16]
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales_N8 = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    mins_N8 = np.concatenate([mid & 63, (high >> 4) | (mid >> 6) << 4], axis=1)
    bytes_N41x32 = blocks[:, 16:].reshape(-1, 4, 1, 32)
    nibbles = np.concatenate([bytes_N41x32 & 15, bytes_N41x32 >> 4], axis=2)
    d_N1, dmin_N1 = (_halves(blocks, at).astype(np.float32) for at in (0, 2))
    return Unpacked("uint4", nibbles.view(np.int8) - 8, d_N1 * scales_N8, -dmin_N1 * mins_N8)


def _q6_k(blocks: np.ndarray) -> Unpacked:
    """128 bytes of low nibbles, 64 of high bit pairs, 16 signed scales, d: d * scale * (q - 32).

    Each half of 128 elements has four rows of 32: the low nibbles of the first and the second 32 bytes, then their high
    nibbles. The bit pairs of its 32 high bytes belong to the four rows in order. Each scale is for 16 elements.
    """
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    pairs = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    values = (nibbles | pairs << 4).view(np.int8) - 32
    scales_N16 = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return Unpacked("int8", values, _halves(blocks, 208).astype(np.float32) * scales_N16, None)


# type -> bytes [N, bytes a block] to its parts
UNPACKERS: dict[str, Callable[[np.ndarray], Unpacked]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}


def _numbers(unpack_blocks: Callable[[np.ndarray], Unpacked], blocks: np.ndarray) -> np.ndarray:
    """The numbers of blocks, float32."""
    kind, values, scales, offsets = unpack_blocks(blocks)
    wide = values.astype(np.float32)
    if kind == "uint4":
        wide += 8
    wide = wide.reshape(*scales.shape, -1)
    wide *= scales.astype(np.float32)[..., None]
    if offsets is not None:
        wide += offsets.astype(np.float32)[..., None]
    return wide


# type -> bytes [N, bytes a block] to float32
DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    **{name: functools.partial(_numbers, unpack_blocks) for name, unpack_blocks in UNPACKERS.items()},
}

_BLOCK_SIZES = {name: (elements, nbytes) for name, elements, nbytes in BLOCKS.values()}


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, [N, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], axis=1)

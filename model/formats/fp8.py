"""Weights in eight-bit floats (E4M3) with a float32 scale for each block of a matrix, as in DeepSeek-V3.

`NAME` [rows, columns] float8_e4m3fn and `NAME_scale_inv` [rows / block, columns / block]: each number is multiplied
by the scale of its block; blocks at the edges may be smaller. DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from model.formats.safetensors_file import SafetensorsError, StoredTensor

SCALES = "_scale_inv"
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """A matrix and its scales as one bfloat16 tensor."""

    name: str
    values: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]
    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def file(self) -> Path:
        return self.values.file

    def read(self) -> np.ndarray:
        return scaled(self.values.read(), self.scales.read(), self.block)


def scaled(values: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """[rows, columns] float8 times the scale of each block, in float32, as bfloat16."""
    whole = np.empty(values.shape, ml_dtypes.bfloat16)
    rows, columns = block
    for i, row_scales in enumerate(scales):  # one row of blocks at a time, to save memory
        each = np.repeat(row_scales.astype(np.float32), columns)[: values.shape[1]]
        part = slice(i * rows, (i + 1) * rows)
        whole[part] = (values[part].astype(np.float32) * each).astype(ml_dtypes.bfloat16)
    return whole


def block_of(quantization: Any) -> tuple[int, int] | None:
    """The block size of a config's quantization_config; None for another method.

    Raises ValueError for another format.
    """
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return None
    block, kind = quantization.get("weight_block_size"), quantization.get("fmt", "e4m3")
    whole = (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 2**31 for n in block)
    )
    if not isinstance(block, list) or not whole or kind != "e4m3":
        raise ValueError(
            f"quantization_config with fmt={kind!r} and weight_block_size={str(block)[:100]} is not supported; e4m3 "
            "with two block sizes, such as [128, 128], is."
        )
    return block[0], block[1]


def join(stored: dict[str, Any], block: tuple[int, int]) -> dict[str, Any]:
    """The tensors of a folder, with each matrix and its scales as one.

    Raises SafetensorsError for a pair that does not fit together.
    """
    joined = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALES)}
    for name in stored.keys() - joined.keys():
        scales, values = stored[name], joined.get(name.removesuffix(SCALES))
        blocks = None if values is None else tuple(-(-n // of) for n, of in zip(values.shape, block))
        if values is None or values.dtype != E4M3 or len(values.shape) != 2 or scales.shape != blocks:
            given = "nothing" if values is None else f"{values.dtype} {values.shape}"
            raise SafetensorsError(
                f"{scales.file}: {name!r} {scales.shape} scales {given}; wanted a float8_e4m3fn matrix, and a scale "
                f"for each block of {block}."
            )
        if scales.dtype != np.float32:
            raise SafetensorsError(f"{scales.file}: {name!r} is {scales.dtype}; wanted float32.")
        joined[name.removesuffix(SCALES)] = ScaledTensor(values.name, values, scales, block)
    return joined

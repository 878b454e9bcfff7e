"""Weights in MXFP4: blocks of 32 four-bit floats (E2M1) with one power of two as their scale.

OCP Microscaling Formats (MX) specification 1.0; packed as in the checkpoints of gpt-oss: `NAME_blocks` [..., rows,
groups, 16] uint8, two numbers a byte, low half first, and `NAME_scales` [..., rows, groups] uint8, the exponent plus
127. NAME itself is [..., groups * 32, rows].
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np

from model.formats.safetensors_file import SafetensorsError, StoredTensor

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
BLOCKS, SCALES = "_blocks", "_scales"


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """Blocks and scales as one bfloat16 tensor."""

    name: str
    blocks: StoredTensor
    scales: StoredTensor
    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, groups, half = self.blocks.shape
        return *lead, groups * 2 * half, rows

    @property
    def file(self) -> Path:
        return self.blocks.file

    def read(self) -> np.ndarray:
        return unpack(self.blocks.read(), self.scales.read())


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[..., rows, groups, 16] and [..., rows, groups] uint8 to [..., groups * 32, rows] bfloat16, exactly."""
    table = np.concatenate([VALUES, -VALUES])
    numbers = np.stack([table[blocks & 15], table[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], -1)
    numbers = np.ldexp(numbers, scales.astype(np.int32)[..., None] - 127)
    rows = numbers.reshape(*blocks.shape[:-2], -1)
    return np.swapaxes(rows, -1, -2).astype(ml_dtypes.bfloat16)


def join(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor | PackedTensor]:
    """The tensors of a folder, with each pair of blocks and scales as one.

    Raises SafetensorsError for a pair that does not fit together.
    """
    joined: dict[str, StoredTensor | PackedTensor] = {}
    for name, tensor in stored.items():
        whole = name.removesuffix(BLOCKS).removesuffix(SCALES)
        blocks, scales = stored.get(whole + BLOCKS), stored.get(whole + SCALES)
        if name == whole or blocks is None or scales is None:
            joined[name] = tensor
            continue
        if blocks.dtype != np.uint8 or scales.dtype != np.uint8 or blocks.shape != (*scales.shape, 16):
            raise SafetensorsError(
                f"{tensor.file}: {whole + BLOCKS!r} is {blocks.dtype} {blocks.shape} and {whole + SCALES!r} "
                f"{scales.dtype} {scales.shape}; wanted uint8 [..., 16] and uint8 [...]."
            )
        joined[whole] = PackedTensor(whole, blocks, scales)
    return joined

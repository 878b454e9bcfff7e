"""Reads safetensors files strictly, and writes them in a stream.

Format: https://github.com/huggingface/safetensors#format. Eight bytes give the length of a JSON header, which
names each tensor's dtype, shape and place; the numbers follow without gaps. The header is checked against the file's
length before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# packed weights; position ids and masks in old checkpoints of BERT and GPT-2; eight-bit floats
READ = DTYPES | {"U8": np.dtype(np.uint8), "I64": np.dtype("<i8"), "BOOL": np.dtype(np.bool_)}
READ |= {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}


class SafetensorsError(ValueError):
    """A header is damaged, does not fit the file, or has an unsupported dtype."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of an open file; `read` maps it into memory."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    bytes_of_file: np.ndarray = dataclasses.field(repr=False)  # uint8, memory-mapped
    start: int
    stop: int

    def read(self) -> np.ndarray:
        """A read-only view of the mapped file; a copy if the numbers are not aligned."""
        values = self.bytes_of_file[self.start : self.stop].view(self.dtype).reshape(self.shape)
        return values if values.flags.aligned else values.copy()


def read_header(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises:
      FileNotFoundError: no such file.
      SafetensorsError: names the file, the tensor and the problem.
    """
    path = Path(path)
    size = path.stat().st_size
    if size < 8:
        raise SafetensorsError(f"{path}: has {size} bytes; a safetensors file has at least 8.")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise SafetensorsError(
            f"{path}: the header claims {length} bytes, but the file has {size} (at most {MAX_HEADER_BYTES} are "
            "read): it is cut short or no safetensors file."
        )
    header = _parse(path, data[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    base = 8 + length
    tensors = {name: _tensor(path, name, entry, data, base) for name, entry in header.items()}
    _check_contiguous(path, list(tensors.values()), base, size)
    return tensors


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    values: Callable[[str], np.ndarray],
) -> None:
    """Write a file, one tensor at a time.

    Args:
      tensors: dtype and shape by name.
      values: returns the numbers of a tensor, called in the order of writing.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))  # aligned without gaps
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        stop = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = np.ascontiguousarray(values(name))
            if (array.dtype, array.shape) != tensors[name]:
                raise ValueError(f"{name} is {array.dtype} {array.shape}; announced as {tensors[name]}.")
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"{path}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise SafetensorsError(f"{path}: the header is a {type(header).__name__}, not an object.")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the name {twice!r} is there twice")
    return keys


def _tensor(path: Path, name: str, entry: Any, data: np.ndarray, base: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(
            f"{path}: tensor {name!r} has the entry {str(entry)[:80]}; wanted dtype, shape, data_offsets."
        )
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in READ:
        raise SafetensorsError(
            f"{path}: tensor {name!r} is {str(kind)[:40]}; only {', '.join(READ)} are read."
        )
    if not _naturals(shape) or len(shape) > 8:
        raise SafetensorsError(
            f"{path}: tensor {name!r} has the shape {str(shape)[:80]}, which is not valid."
        )
    if not _naturals(offsets) or len(offsets) != 2:
        raise SafetensorsError(
            f"{path}: tensor {name!r} has data_offsets {str(offsets)[:80]}; wanted [begin, end]."
        )
    nbytes = math.prod(shape) * READ[kind].itemsize
    if offsets[1] - offsets[0] != nbytes or base + offsets[1] > data.size:
        raise SafetensorsError(
            f"{path}: tensor {name!r} of {kind} {shape} has {nbytes} bytes, but lies at {offsets} of the "
            f"{data.size - base} bytes of data."
        )
    return StoredTensor(name, READ[kind], tuple(shape), path, data, base + offsets[0], base + offsets[1])


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_contiguous(path: Path, tensors: list[StoredTensor], base: int, size: int) -> None:
    position = base
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != position:
            problem = "overlaps the tensor before it" if tensor.start < position else "leaves a gap before it"
            raise SafetensorsError(
                f"{path}: tensor {tensor.name!r} at byte {tensor.start} {problem} (ends at {position})."
            )
        position = tensor.stop
    if position != size:
        raise SafetensorsError(f"{path}: the tensors end at byte {position}, but the file has {size}.")

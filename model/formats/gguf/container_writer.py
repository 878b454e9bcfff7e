"""A writer of the GGUF container, version 3: metadata and tensors. `model.formats.gguf.container` reads it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from configs.files import temporary_beside
from model.formats.gguf.container import BLOCKS, DEFAULT_ALIGNMENT, MAX_DIMS

TYPES = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}
DTYPES = {name: dtype for dtype, name in TYPES.items()}
_TYPE_IDS = {name: number for number, (name, _, _) in BLOCKS.items()}


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
        offset = _aligned(offset + math.prod(shape) * DTYPES[kind].itemsize)
    start = _aligned(len(header))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            for name, (kind, shape) in tensors.items():
                array = np.ascontiguousarray(values(name))
                if (array.dtype, array.shape) != (DTYPES[kind], shape):
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

"""A strict reader of the GGUF container, versions 2 and 3: metadata and raw tensor bytes, memory-mapped.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A header is believed only as far as the
file's own length allows: every count, length, shape and offset is checked before anything is allocated for
it, and whatever does not hold is a GGUFError that names the field and the file. Turning the bytes into
numbers is the model's business.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.typed import ConfigError

DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # ggml's own limit
MAX_KEY_BYTES = 65535

# type id -> (name, elements per block, bytes per block): the types whose data can be had
BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
# the other types that ggml names; a tensor of one is listed, but its bytes are refused
OTHER_TYPES = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

# metadata value type id -> (name, struct code, numpy dtype)
_SCALARS = {
    0: ("uint8", "<B", "<u1"),
    1: ("int8", "<b", "<i1"),
    2: ("uint16", "<H", "<u2"),
    3: ("int16", "<h", "<i2"),
    4: ("uint32", "<I", "<u4"),
    5: ("int32", "<i", "<i4"),
    6: ("float32", "<f", "<f4"),
    7: ("bool", "<B", "<u1"),
    10: ("uint64", "<Q", "<u8"),
    11: ("int64", "<q", "<i8"),
    12: ("float64", "<d", "<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class GGUFError(ConfigError):
    """A file that is no GGUF, is cut short, or whose header does not agree with itself or with the file."""


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor's entry in the header."""

    name: str
    shape: tuple[int, ...]  # numpy order, outermost first; GGUF itself stores the innermost first
    type: str  # ggml's name, e.g. "Q4_1"
    offset: int  # of the first byte, from the start of the file
    nbytes: int | None  # None for a type whose block size this reader does not know


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open file: its metadata and its tensors by name, in the order of the file.

    Metadata values are int, float, bool and str; an array of numbers or bools is a numpy array, an array of
    strings a list of str.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data: np.ndarray = dataclasses.field(repr=False)  # the whole file, uint8, memory-mapped
    # of a model in several files: the part that holds a tensor, for those that the first part does not hold
    parts: Mapping[str, GGUFFile] = dataclasses.field(default_factory=dict, repr=False)

    def raw(self, name: str) -> np.ndarray:
        """The bytes of one tensor, uint8 [nbytes], a view of the mapped file.

        Raises KeyError for a name that the file does not have and GGUFError for a type that is not supported.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {len(self.tensors)}, see .tensors")
        if name in self.parts:
            return self.parts[name].raw(name)
        tensor = self.tensors[name]
        if tensor.nbytes is None:
            supported = ", ".join(entry[0] for entry in BLOCKS.values())
            raise GGUFError(f"{self.path}: tensor {name!r} is {tensor.type}; only {supported} are read.")
        return self.data[tensor.offset : tensor.offset + tensor.nbytes]


def read(path: str | os.PathLike) -> GGUFFile:
    """Reads and checks a GGUF file's header and maps its tensors; of a model in several files, all of them.

    Args:
      path: a file; of several (NAME-00001-of-00003.gguf) the first.

    Raises FileNotFoundError for a missing file and GGUFError for one that is not exactly what its header
    says.
    """
    file = _read_one(Path(path))
    return _join(file) if _split(file) != (0, 1) else file


def _read_one(path: Path) -> GGUFFile:
    if path.is_dir():
        raise GGUFError(f"{path}: is a folder, not a GGUF file.")
    if path.stat().st_size == 0:
        raise GGUFError(f"{path}: is empty.")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    cursor = _Cursor(path, data)
    version, tensor_count, metadata_count = _read_preamble(cursor)
    metadata = _read_metadata(cursor, metadata_count)
    alignment = _alignment(path, metadata)
    entries = [_read_tensor_entry(cursor, i) for i in range(tensor_count)]
    start = -(-cursor.position // alignment) * alignment
    tensors = _place_tensors(path, entries, start, data.size, alignment)
    return GGUFFile(path, version, metadata, tensors, data)


def _split(file: GGUFFile) -> tuple[int, int]:
    """(number from 0, how many) of a file among those of its model."""
    found = file.metadata.get("split.no", 0), file.metadata.get("split.count", 1)
    number, count = found
    if type(number) is not int or type(count) is not int or not 0 <= number < max(count, 1):
        raise GGUFError(
            f"{file.path}: split.no and split.count are {found}; wanted a number and a larger count."
        )
    return number, max(count, 1)


def _join(first: GGUFFile) -> GGUFFile:
    """The first of several files with the tensors of all."""
    number, count = _split(first)
    name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", first.path.name, re.DOTALL)
    if name is None or (int(name[2]), int(name[3])) != (number + 1, count):
        raise GGUFError(
            f"{first.path}: is part {number + 1} of {count} of a model; wanted the name "
            f"NAME-{number + 1:05}-of-{count:05}.gguf, by which the others are found."
        )
    paths = [first.path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if number:
        raise GGUFError(
            f"{first.path}: is part {number + 1} of {count} of a model; give the first, {paths[0]}."
        )
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise GGUFError(
            f"{first.path}: is the first of {count} files; {len(missing)} are missing: {missing[0]}."
        )
    tensors, parts = dict(first.tensors), {}
    for i, path in enumerate(paths[1:], 1):
        part = _read_one(path)
        if _split(part) != (i, count):
            raise GGUFError(f"{path}: says that it is part {_split(part)[0] + 1} of {_split(part)[1]}.")
        if twice := tensors.keys() & part.tensors.keys():
            raise GGUFError(f"{path}: holds {min(twice)!r}, which another part holds too.")
        tensors |= part.tensors
        parts |= dict.fromkeys(part.tensors, part)
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise GGUFError(
            f"{first.path}: split.tensors.count is {total}, but {count} files hold {len(tensors)}."
        )
    return dataclasses.replace(first, tensors=tensors, parts=parts)


class _Cursor:
    """A position in the file, from which typed values are read with every length checked."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path = path
        self.view = memoryview(data)  # type: ignore[arg-type]  # an array is a buffer
        self.position = 0

    def left(self) -> int:
        return len(self.view) - self.position

    def fail(self, field: str, problem: str) -> GGUFError:
        return GGUFError(f"{self.path}: {field} {problem} (at byte {self.position} of {len(self.view)}).")

    def number(self, code: str, field: str) -> Any:
        size = struct.calcsize(code)
        if size > self.left():
            raise self.fail(field, f"needs {size} bytes, but {self.left()} are left: the file is cut short")
        (value,) = struct.unpack_from(code, self.view, self.position)
        self.position += size
        return value

    def count(self, field: str, item_bytes: int) -> int:
        """A uint64 that counts items of at least `item_bytes` each, which must fit in what is left."""
        count = self.number("<Q", field)
        if count * item_bytes > self.left():
            raise self.fail(field, f"is {count}, more than the {self.left()} bytes left can hold")
        return count

    def take(self, size: int) -> memoryview:
        taken = self.view[self.position : self.position + size]
        self.position += size
        return taken

    def string(self, field: str) -> str:
        length = self.count(f"length of {field}", 1)
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(field, f"is not UTF-8: {error.reason}") from None


def _read_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    if cursor.left() < 4 or bytes(cursor.take(4)) != b"GGUF":
        raise GGUFError(f"{cursor.path}: does not begin with 'GGUF', so it is no GGUF file.")
    version = cursor.number("<I", "version")
    if version not in (2, 3):
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        problem = "is big-endian" if big_endian else f"is {version}"
        raise cursor.fail("version", f"{problem}; little-endian versions 2 and 3 are read")
    tensor_count = cursor.count("tensor count", 24)  # name length, dimensions, type, offset
    metadata_count = cursor.count("metadata count", 13)  # key length, type, one byte of value
    return version, tensor_count, metadata_count


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(count):
        key = cursor.string(f"key of metadata entry {i}")
        if not key or len(key.encode()) > MAX_KEY_BYTES:
            problem = f"has {len(key)} characters; wanted 1 to {MAX_KEY_BYTES}"
            raise cursor.fail(f"key of metadata entry {i}", problem)
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r}", "is there twice")
        kind = cursor.number("<I", f"type of {key!r}")
        metadata[key] = _read_array(cursor, key) if kind == _ARRAY else _read_value(cursor, kind, key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> int | float | bool | str:
    if kind == _STRING:
        return cursor.string(f"value of {key!r}")
    if kind not in _SCALARS:
        raise cursor.fail(f"type of {key!r}", f"is {kind}, which GGUF does not define")
    value = cursor.number(_SCALARS[kind][1], f"value of {key!r}")
    if kind == _BOOL:
        if value > 1:
            raise cursor.fail(f"value of {key!r}", f"is {value}; a bool is 0 or 1")
        return bool(value)
    return value


def _read_array(cursor: _Cursor, key: str) -> np.ndarray | list[str]:
    kind = cursor.number("<I", f"item type of {key!r}")
    if kind == _STRING:
        count = cursor.count(f"length of array {key!r}", 8)
        return [cursor.string(f"item {i} of {key!r}") for i in range(count)]
    if kind == _ARRAY:
        raise cursor.fail(f"item type of {key!r}", "is array; arrays of arrays are not read")
    if kind not in _SCALARS:
        raise cursor.fail(f"item type of {key!r}", f"is {kind}, which GGUF does not define")
    dtype = np.dtype(_SCALARS[kind][2])
    count = cursor.count(f"length of array {key!r}", dtype.itemsize)
    values = np.frombuffer(cursor.take(count * dtype.itemsize), dtype).copy()
    if kind == _BOOL:
        if values.size and values.max() > 1:
            raise cursor.fail(f"array {key!r}", "holds a bool that is neither 0 nor 1")
        return values.astype(bool)
    return values


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or value < 1 or value & (value - 1):
        raise GGUFError(f"{path}: general.alignment is {value!r}; wanted a power of two.")
    return value


def _read_tensor_entry(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape outermost first, type id, offset in the data section) of one tensor."""
    name = cursor.string(f"name of tensor {index}")
    if not name:
        raise cursor.fail(f"name of tensor {index}", "is empty")
    dims = cursor.number("<I", f"dimensions of {name!r}")
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.fail(f"dimensions of {name!r}", f"are {dims}; wanted 1 to {MAX_DIMS}")
    shape = tuple(cursor.number("<Q", f"dimension {i} of {name!r}") for i in range(dims))[::-1]
    if 0 in shape or math.prod(shape) >= 2**63:
        raise cursor.fail(f"shape of {name!r}", f"is {shape}, which no array has")
    kind = cursor.number("<I", f"type of {name!r}")
    return name, shape, kind, cursor.number("<Q", f"offset of {name!r}")


def _place_tensors(
    path: Path, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int, alignment: int
) -> dict[str, GGUFTensor]:
    """The tensors by name, each inside the file, aligned, and clear of the others."""
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise GGUFError(f"{path}: tensor {name!r} is there twice.")
        if offset % alignment:
            raise GGUFError(f"{path}: offset of {name!r} is {offset}; wanted a multiple of {alignment}.")
        type_name, nbytes = _type_and_size(path, name, shape, kind)
        if start + offset + (nbytes or 1) > size:
            needs = f"{nbytes} bytes" if nbytes is not None else "its bytes"
            raise GGUFError(
                f"{path}: tensor {name!r} of shape {shape} has {needs} at byte {start + offset}, "
                f"but the file has {size}: it is cut short or its header lies."
            )
        tensors[name] = GGUFTensor(name, shape, type_name, start + offset, nbytes)
    _check_apart(path, list(tensors.values()))
    return tensors


def _type_and_size(path: Path, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int | None]:
    if kind not in BLOCKS:
        return OTHER_TYPES.get(kind, f"type {kind}"), None
    type_name, block, block_bytes = BLOCKS[kind]
    if shape[-1] % block:
        raise GGUFError(
            f"{path}: rows of {name!r} have {shape[-1]} elements; {type_name} stores blocks of {block}."
        )
    return type_name, math.prod(shape) // block * block_bytes


def _check_apart(path: Path, tensors: list[GGUFTensor]) -> None:
    by_offset = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in zip(by_offset, by_offset[1:]):
        if before.offset + max(before.nbytes or 0, 1) > after.offset:
            both = f"{before.name!r} and {after.name!r}"
            raise GGUFError(f"{path}: tensors {both} overlap at byte {after.offset}.")

"""Arrays that are read at their first use, in parts, so that a model may be larger than memory.

Peak memory while loading is the parameters plus one tensor, and a device of a mesh reads only its own slice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array in a file; `make` returns all of it, as a view of the mapped file if possible."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    unpacked: bool = False  # `make` computes, so its result is cached for reads of parts
    name: str = "a parameter"  # in errors

    def __getitem__(self, index: int | Index) -> np.ndarray:
        return cast(self.make()[index], self.dtype, self.name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return cast(self.make(), dtype or self.dtype, self.name, copy=bool(copy))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def astype(self, dtype: Any) -> Lazy:
        return dataclasses.replace(self, dtype=np.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Sliced:
    """An array in a file with readable parts; `read` takes an index of slices."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    name: str = "a parameter"  # in errors

    def __getitem__(self, index: int | Index) -> Any:
        if isinstance(index, int):  # one of several stacked layers also stays in its file
            read_layer = lambda rest: self.read((slice(index, index + 1), *rest))[0]
            return Sliced(self.shape[1:], self.dtype, read_layer, self.name)
        return cast(self.read(index), self.dtype, self.name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self.read((slice(None),) * len(self.shape))
        return cast(whole, dtype or self.dtype, self.name, copy=bool(copy))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def astype(self, dtype: Any) -> Sliced:
        return dataclasses.replace(self, dtype=np.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Arrays of one shape and dtype, stacked along a new first axis."""

    parts: Sequence[Any]  # Lazy, Stacked or numpy arrays

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.parts), *self.parts[0].shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.parts[0].dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: int | Index) -> np.ndarray:
        if isinstance(index, int):
            return np.asarray(self.parts[index])
        chosen, rest = self.parts[index[0]], index[1:]
        first = chosen[0][rest]
        out = np.empty((len(chosen), *first.shape), self.dtype)
        out[0] = first
        for i, part in enumerate(chosen[1:], 1):  # filled one by one, so that memory never holds two copies
            out[i] = part[rest]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[(slice(None),) * len(self.shape)]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def astype(self, dtype: Any) -> Stacked:
        return Stacked([part.astype(dtype) for part in self.parts])


LAZY = (Lazy, Sliced, Stacked)


def named(array: Any, name: str) -> Any:
    """The array with a name for errors; arrays that are not lazy are returned unchanged."""
    if isinstance(array, Stacked):
        return Stacked([named(part, name) for part in array.parts])
    return dataclasses.replace(array, name=name) if isinstance(array, (Lazy, Sliced)) else array


def cast(values: np.ndarray, dtype: Any, name: str, *, copy: bool = False) -> np.ndarray:
    """The values in another dtype. Raises ValueError for a value beyond float16, which ends at 65504."""
    if dtype != np.float16 or values.dtype == np.float16:
        return values.astype(dtype, copy=copy)
    with np.errstate(over="ignore"):
        out = values.astype(dtype)
    lost = np.isinf(out) & np.isfinite(values)
    if lost.any():
        largest = np.abs(values[lost].astype(np.float32)).max()
        raise ValueError(
            f"{name} has the value {largest:.4g}, which float16 can't hold: its largest is 65504. Use bfloat16."
        )
    return out


def place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """The array on the devices of a sharding; each device reads its own part."""
    if isinstance(array, Lazy) and array.unpacked:
        array = np.asarray(array)
    if not isinstance(array, LAZY):
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index or ()])

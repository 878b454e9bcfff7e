"""Arrays that are read when they are asked for, part by part: a model larger than memory passes through.

So peak memory while loading is the parameters plus one tensor, and a device of a mesh reads its own slice alone.
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
    """An array in a file; `make` gives it whole, as a view of the mapped file where it can."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    unpacked: bool = False  # `make` computes: what is wanted in parts is made once

    def __getitem__(self, index: int | Index) -> np.ndarray:
        return self.make()[index].astype(self.dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.make().astype(dtype or self.dtype, copy=bool(copy))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def astype(self, dtype: Any) -> Lazy:
        return dataclasses.replace(self, dtype=np.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Sliced:
    """An array in a file of which any part can be read by itself; `read` takes an index of slices."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    def __getitem__(self, index: int | Index) -> Any:
        if isinstance(index, int):  # a layer among stacked ones stays in its file too
            of_layer = lambda rest: self.read((slice(index, index + 1), *rest))[0]
            return Sliced(self.shape[1:], self.dtype, of_layer)
        return self.read(index).astype(self.dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read((slice(None),) * len(self.shape)).astype(dtype or self.dtype, copy=bool(copy))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def astype(self, dtype: Any) -> Sliced:
        return dataclasses.replace(self, dtype=np.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Arrays of one shape and dtype, one after the other along a new first axis."""

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
        for i, part in enumerate(chosen[1:], 1):  # filled one by one: never two copies of all
            out[i] = part[rest]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[(slice(None),) * len(self.shape)]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def astype(self, dtype: Any) -> Stacked:
        return Stacked([part.astype(dtype) for part in self.parts])


LAZY = (Lazy, Sliced, Stacked)


def place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """On the devices of a sharding, each of which reads its own part."""
    if isinstance(array, Lazy) and array.unpacked:
        array = np.asarray(array)
    if not isinstance(array, LAZY):
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index or ()])

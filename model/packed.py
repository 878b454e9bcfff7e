"""Weights as a CPU multiplies them: rounded values stay packed in memory, in the order in which they are read.

They take the place of `Quantized` ones where a model decodes (`packed_for_decoding`), and have no gradient.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.struct
import jax

from model.kernels.quantized_matmul import panels
from model.kernels.quantized_matmul.panels import Panels


@flax.struct.dataclass
class Packed:
    """A linear map in panels."""

    panels: Panels
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)  # as the config has it
    inputs: tuple[int, ...] = flax.struct.field(pytree_node=False)  # axes, counted from the last (negative)
    last: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)  # see `of_outputs`

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def product(self, x_MI: jax.Array) -> jax.Array:
        """x times the weight as a matrix, [M, O], summed in float32."""
        y_MO = panels.product(x_MI, self.panels)
        if self.last is None:
            return y_MO
        return self._sliced(y_MO.reshape(len(x_MI), *self._whole_outputs())).reshape(len(x_MI), -1)

    def dense(self, dtype: Any) -> jax.Array:
        """The dequantized array."""
        places = [i % self.ndim for i in self.inputs]
        order = places + [i for i in range(self.ndim) if i not in places]
        wide = panels.widened(self.panels).reshape([self.shape[i] for i in places] + self._whole_outputs())
        return self._sliced(wide.transpose([order.index(i) for i in range(self.ndim)])).astype(dtype)

    def rows(self, index: jax.Array, dtype: Any) -> jax.Array:
        """Of a weight [outputs, inputs] some outputs, dequantized: indices [...] to [..., inputs]."""
        return panels.columns(self.panels, index).astype(dtype)

    def of_outputs(self, last: slice) -> Packed:
        """A slice of the last axis, which is not an input. A product computes all of the axis."""
        start, stop, _ = last.indices(self.shape[-1])
        before = 0 if self.last is None else self.last[0]
        whole = self.shape[-1] if self.last is None else self.last[1]
        shape = (*self.shape[:-1], stop - start)
        return dataclasses.replace(self, shape=shape, last=(before + start, whole))

    def _whole_outputs(self) -> list[int]:
        outputs = [n for i, n in enumerate(self.shape) if i - self.ndim not in self.inputs]
        return outputs if self.last is None else [*outputs[:-1], self.last[1]]

    def _sliced(self, array: jax.Array) -> jax.Array:
        if self.last is None:
            return array
        return jax.lax.slice_in_dim(array, self.last[0], self.last[0] + self.shape[-1], axis=-1)

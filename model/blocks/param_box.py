"""A parameter's metadata: flax stores it in a box around the array, and `model.parameters` reads it."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax

Axes = tuple[str | None, ...]
LEADING = ("layers", "experts", "adapters")  # axes that stack separate arrays


@flax.struct.dataclass
class ParamBox(nn.meta.AxisMetadata):
    """A new parameter with its metadata; `nn.scan` adds the leading axis "layers"."""

    value: Any
    names: Axes = flax.struct.field(pytree_node=False)  # of its axes
    input_axes: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())  # (): not a linear map
    role: str = flax.struct.field(pytree_node=False, default="")
    decays: bool = flax.struct.field(pytree_node=False, default=False)
    order: int = flax.struct.field(pytree_node=False, default=0)  # see `made_before`
    is_weight: bool = flax.struct.field(pytree_node=False, default=False)  # may be quantized

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> ParamBox:
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> ParamBox:
        names = (*self.names[:index], params[nn.PARTITION_NAME], *self.names[index:])
        return self._with_axes(names, [i + (i >= index) for i in self.input_axes])

    def remove_axis(self, index: int, params: dict[Any, Any]) -> ParamBox:
        names = (*self.names[:index], *self.names[index + 1 :])
        return self._with_axes(names, [i - (i > index) for i in self.input_axes])

    def _with_axes(self, names: Axes, input_axes: list[int]) -> ParamBox:
        return dataclasses.replace(self, names=names, input_axes=tuple(input_axes))


def input_axes_of(axes: Axes, inputs: int | tuple[int, ...]) -> tuple[int, ...]:
    """The input axes of a linear map: `inputs` axes after the leading ones, or these indices."""
    if isinstance(inputs, tuple):
        return inputs
    lead = leading_axes(axes)
    return tuple(range(lead, lead + inputs))


def leading_axes(axes: Axes) -> int:
    """The number of axes of LEADING at the start."""
    return next((i for i, name in enumerate(axes) if name not in LEADING), len(axes))


def is_matrix(axes: Axes) -> bool:
    """Whether there are at least two axes besides those of layers and adapters."""
    return sum(name not in ("layers", "adapters") for name in axes) >= 2


def made_before(module: nn.Module) -> int:
    """The number of parameters made before in the block or, outside blocks, in the model.

    Parameters are made in the order of the computation, which a pytree of dicts does not keep.
    """
    scope = module.scope
    return 0 if scope is None else len(jax.tree.leaves(scope.root.variables().get("params", {})))

"""The metadata of a model's parameters, as modules declare them with `model.blocks.common.param`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from model.blocks.param_box import Axes, ParamBox, leading_axes
from model.config import ModelConfig
from model.function import Params, _boxed_shapes


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """A parameter's metadata."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: Axes  # logical names
    input_axes: tuple[int, ...]  # indices of a linear map's input axes; () for other parameters
    role: str  # what it does in the model
    decays: bool  # whether it has weight decay
    order: int  # the number of parameters made before it in its block or, outside blocks, in the model
    is_weight: bool  # whether it may be quantized

    def of_layer(self) -> ParamInfo:
        """The metadata without a leading axis of layers."""
        if self.axes[:1] != ("layers",):
            return self
        input_axes = tuple(i - 1 for i in self.input_axes)
        return dataclasses.replace(self, shape=self.shape[1:], axes=self.axes[1:], input_axes=input_axes)

    @property
    def lead(self) -> int:
        """The number of leading axes of layers, experts and adapters."""
        return leading_axes(self.axes)


def param_info(cfg: ModelConfig) -> Params:
    """The tree of `init` with a `ParamInfo` at each leaf; allocates nothing."""
    is_box = lambda leaf: isinstance(leaf, ParamBox)
    return jax.tree.map(_info, _boxed_shapes(cfg), is_leaf=is_box)


def _info(box: ParamBox) -> ParamInfo:
    shape, dtype = box.value.shape, box.value.dtype
    names = tuple(box.names)
    return ParamInfo(shape, dtype, names, box.input_axes, box.role, box.decays, box.order, box.is_weight)

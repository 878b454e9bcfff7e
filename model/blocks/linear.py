"""Linear maps of blocks, between the model's width and named axes, with biases and adapters."""

# B batch, T tokens, D model width, I inputs, O outputs, N adapters, R their rank

from __future__ import annotations

import functools
import itertools
import math
import string
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from model.blocks import lora
from model.blocks.common import Context, bias_param, fan_in_normal, param, weight_param
from model.blocks.lora import LoRA, LowRank
from model.kernels import backend, order
from model.packed import Packed
from model.weights import Quantized, Weight, dense, is_quantized, matmul

Axes = tuple[str | None, ...]
# map name -> (shape of the outputs, logical names of their axes, role of the map)
Outputs = dict[str, tuple[tuple[int, ...], Axes, str]]
ADAPTER_ROLES = {"a": "down to their rank", "b": "up from it", "magnitude": "each output's length"}

INPUTS, OUTPUTS = string.ascii_lowercase[:13], string.ascii_lowercase[13:]


class LinearMap(NamedTuple):
    """y = x W plus the output of each row's adapter, for any einsum of x and W."""

    weight: Weight  # [*inputs, *outputs]
    inputs: int  # the number of input axes
    adapter: LowRank | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, *inputs] to [B, T, *outputs]."""
        if self.adapter is None and backend.for_cpu():
            y_BTO = self.flat(x.reshape(*x.shape[:2], math.prod(x.shape[2:])))
            return y_BTO.reshape(*x.shape[:2], *self.weight.shape[self.inputs :])
        return self.einsum(self._spec(), x)

    def _spec(self) -> str:
        ins, outs = INPUTS[: self.inputs], OUTPUTS[: self.weight.ndim - self.inputs]
        return f"BT{ins},{ins}{outs}->BT{outs}"

    def flat(self, x_BTI: jax.Array) -> jax.Array:
        """The map between single axes, [B, T, I] to [B, T, O].

        XLA for TPUs lays out arrays with a narrow last axis, such as that of narrow heads, with tokens last, and copies
        them for kernels, which need channels last. A single wide axis avoids the copies.
        """
        (B, T, I), ins = x_BTI.shape, self.weight.shape[: self.inputs]
        outputs = math.prod(self.weight.shape[self.inputs :])
        if self.adapter is not None:
            return self(x_BTI.reshape(B, T, *ins)).reshape(B, T, outputs)
        if isinstance(self.weight, (Quantized, Packed)):
            return self.einsum(self._spec(), x_BTI.reshape(B, T, *ins)).reshape(B, T, outputs)
        weight_IO = self.weight.reshape(I, outputs)
        if not backend.for_cpu():
            return x_BTI @ weight_IO
        # XLA on CPU transposes no factor of a product of two matrices. Elsewhere a mesh that splits tokens would have
        # to gather them for this reshape.
        return (x_BTI.reshape(B * T, I) @ weight_IO).reshape(B, T, outputs)

    def of_recomputed(self, function: Callable, x: Any) -> jax.Array:
        """The map of `function(x)`. Only x is saved for the backward pass, which recomputes the rest."""
        if self.adapter is None and backend.for_cpu() and not is_quantized(self.weight):
            product = lambda x, weight: LinearMap(weight, self.inputs)(function(x))
            return order.recompute(product)(x, self.weight)
        return self(order.recompute(function)(x))

    def einsum(self, spec: str, x: jax.Array) -> jax.Array:
        """The einsum `spec` of x and the weight; the first letter of x is the row, "R" is the adapters' rank."""
        if self.adapter is None:
            return matmul(x, self.weight, spec)
        (x_axes, w_axes), y_axes = spec.split("->")[0].split(","), spec.split("->")[1]
        ins, outs, (a, b, gain) = w_axes[: self.inputs], w_axes[self.inputs :], self.adapter
        row = x_axes[0] if a.ndim > self.inputs + 1 else ""
        gained = set(outs) <= set(y_axes)
        if gain is not None and not gained:
            x = jnp.einsum(f"{x_axes},{row}{outs}->{x_axes}", x, gain)
        low_rank = f"{x_axes},{row}{ins}R,{row}R{outs}->{y_axes}"
        y = matmul(x, self.weight, spec) + jnp.einsum(low_rank, x, a, b)
        if gain is not None and gained:
            y = jnp.einsum(f"{y_axes},{row}{outs}->{y_axes}", y, gain)
        return y

    def part(self, outputs: slice) -> LinearMap:
        """The map to a slice of the outputs' last axis."""
        adapter = self.adapter
        if adapter is not None:
            gain = None if adapter.gain is None else adapter.gain[..., outputs]
            adapter = LowRank(adapter.a, adapter.b[..., outputs], gain)
        weight = self.weight
        part = (
            weight[..., outputs]
            if not isinstance(weight, (Quantized, Packed))
            else weight.of_outputs(outputs)
        )
        return LinearMap(part, self.inputs, adapter)


def linear(
    module: Any,
    name: str,
    x: jax.Array,
    shape: tuple[int, ...],
    axes: Axes,
    role: str = "",
    *,
    bias: bool = False,
    in_axes: Axes = ("embed",),
) -> jax.Array:
    """Maps [B, T, *inputs] to [B, T, *shape] with the parameter `name` and, if `bias`, `name`_bias.

    Args:
      module: a block's module; its `ctx` has the adapters and each row's choice of them.
      axes: logical names of the outputs' axes; `in_axes` has those of the inputs.
      role: what the map does, as `python -m model describe` shows it.
    """
    in_shape = x.shape[x.ndim - len(in_axes) :]
    y = linear_map(module, name, in_shape, shape, (*in_axes, *axes), role)(x)
    return add_bias(module, name, y, axes) if bias else y


def linears(module: Any, x: jax.Array, outs: Outputs, bias: bool = False) -> dict[str, jax.Array]:
    """Maps [B, T, D] to [B, T, *shape] with each parameter of `outs`; see `linear`.

    On a CPU one product computes all maps of many tokens, because narrow products are slow there.
    """
    maps, biases = {}, {}
    for name, (shape, axes, role) in outs.items():
        maps[name] = linear_map(module, name, x.shape[2:], shape, ("embed", *axes), role)
        if bias:
            biases[name] = bias_of(module, name, shape, axes)
    ys = _together(maps, x)
    return {name: y + biases[name] if bias else y for name, y in ys.items()}


def _together(maps: dict[str, LinearMap], x: jax.Array) -> dict[str, jax.Array]:
    B, T, D = x.shape
    # concatenating the weights copies them, which pays off for many tokens only
    if not backend.for_cpu() or B * T < D or any(each.adapter is not None for each in maps.values()):
        return {name: each(x) for name, each in maps.items()}
    weights = [
        each.weight.reshape(D, -1)
        for each in maps.values()
        if not isinstance(each.weight, (Quantized, Packed))
    ]
    if len(weights) < len(maps):
        return {name: each(x) for name, each in maps.items()}
    weight = jnp.concatenate(weights, axis=1)
    ends = list(itertools.accumulate(math.prod(each.weight.shape[1:]) for each in maps.values()))
    parts = jnp.split(LinearMap(weight, 1)(x), ends[:-1], axis=-1)
    return {
        name: part.reshape(B, T, *each.weight.shape[1:])
        for (name, each), part in zip(maps.items(), parts, strict=True)
    }


def linear_out(
    module: Any, y: jax.Array, in_axes: Axes, role: str = "", *, bias: bool = False, name: str = "o"
) -> jax.Array:
    """Maps all axes after tokens to the model's width. Deeper models start with smaller weights."""
    y = map_out(module, y.shape[2:], in_axes, role, name)(y)
    return add_bias(module, name, y, ("embed",)) if bias else y


def map_out(
    module: Any, in_shape: tuple[int, ...], in_axes: Axes, role: str = "", name: str = "o"
) -> LinearMap:
    """The map of `linear_out`."""
    ctx: Context = module.ctx
    init = fan_in_normal(math.prod(in_shape), scale=(2 * ctx.num_blocks) ** -0.5)
    return linear_map(module, name, in_shape, (ctx.width,), (*in_axes, "embed"), role, init)


def linear_map(
    module: Any,
    name: str,
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    axes: Axes,
    role: str = "",
    init: Callable | None = None,
) -> LinearMap:
    """Declares the parameter `name` [*in_shape, *out_shape] and its adapters.

    Args:
      init: default: normal with standard deviation 1 / sqrt(inputs).
    """
    ctx: Context = module.ctx
    init = init or fan_in_normal(math.prod(in_shape))
    weight = weight_param(module, ctx, name, (*in_shape, *out_shape), axes, init, len(in_shape), role)
    if len(in_shape) > 1:
        # without it, XLA for TPUs copies the gathered weights of a scanned layer to drop their axis of length 1
        weight = jax.lax.optimization_barrier(weight)
    adapters = adapters_of(module, name, weight, len(in_shape), axes)
    if adapters is None:
        return LinearMap(weight, len(in_shape))
    chosen = lora.select(*adapters, cast(LoRA, ctx.adapters).scale, ctx.adapter)
    return LinearMap(weight, len(in_shape), chosen)


def add_bias(module: Any, name: str, y: jax.Array, axes: Axes) -> jax.Array:
    """y plus the parameter `name`_bias, with the shape of y after its tokens."""
    return y + bias_of(module, name, y.shape[y.ndim - len(axes) :], axes)


def bias_of(module: Any, name: str, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """Declares the parameter `name`_bias; the axis "embed" is not sharded."""
    axes = tuple("norm" if axis == "embed" else axis for axis in axes)
    return bias_param(module, module.ctx, f"{name}_bias", shape, axes)


def adapters_of(
    module: Any, name: str, weight: Weight, inputs: int, axes: Axes, experts: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array | None] | None:
    """Declares the adapters of a linear map, if it has any.

    Args:
      weight: [*experts, *inputs, *outputs], with logical `axes`.
      inputs, experts: the number of axes of each.

    Returns:
      a [*experts, N, *inputs, R], b [*experts, N, R, *outputs] and, for DoRA, gains [*experts, N, *outputs].
    """
    ctx: Context = module.ctx
    spec = ctx.adapters
    if spec is None or not spec.adapts((*within_block(module.path), name)):
        return None
    split = lambda whole: (whole[:experts], whole[experts : experts + inputs], whole[experts + inputs :])
    (lead, ins, outs), (lead_axes, in_axes, out_axes) = split(weight.shape), split(axes)
    lead, lead_axes = (*lead, spec.slots), (*lead_axes, "adapters")

    def declare(end: str, shape: tuple[int, ...], names: Axes, init: Callable, inputs: int = 0) -> jax.Array:
        declared = f"{name}_lora_{end}", (*lead, *shape), (*lead_axes, *names)
        role = f"adapters of {name}: {ADAPTER_ROLES[end]}"
        return param(module, ctx, *declared, init, inputs, role, decay=inputs > 0)

    in_places, lead_places = range(len(lead), len(lead) + inputs), range(len(lead))
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_places, -1, lead_places)
    a = declare("a", (*ins, spec.rank), (*in_axes, None), uniform, inputs)
    b = declare("b", (spec.rank, *outs), (None, *out_axes), nn.initializers.zeros, 1)
    if not spec.decomposed:
        return a, b, None
    wide = dense(weight, jnp.float32)
    lengths = jnp.expand_dims(column_lengths(wide, inputs, experts), experts)
    start = lambda key, shape, dtype: jnp.broadcast_to(lengths, shape).astype(dtype)
    gains = functools.partial(lora.gains, scale=spec.scale)
    for _ in range(experts):
        gains = jax.vmap(gains)
    gain = gains(declare("magnitude", outs, out_axes, start), wide, a, b)
    return a, b, gain.astype(ctx.dtype)


def column_lengths(weight: jax.Array | np.ndarray, inputs: int, experts: int = 0) -> jax.Array:
    """[*experts, *outputs] float32: the length of each output's column of a map."""
    in_places = tuple(range(experts, experts + inputs))
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=in_places))


def within_block(path: tuple[str, ...]) -> tuple[str, ...]:
    """A module's path within its block."""
    blocks = [
        i for i, name in enumerate(path) if name.rpartition("_")[0].rpartition("_")[2] in ("block", "run")
    ]
    return path[blocks[-1] + 1 :] if blocks else path

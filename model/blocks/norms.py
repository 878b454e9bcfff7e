"""Normalization layers, computed in float32."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, in_float32, param
from model.kernels import cpu
from model.kernels.derivatives import differentiable


@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """x / rms(x) * scale over the last axis. Zhang and Sennrich 2019, arXiv:1910.07467."""

    eps: float = 1e-5
    # the parameter is the scale minus one, so weight decay moves the scale to one
    zero_centered: bool = False
    scale: bool = True

    def module(self, ctx: Context, name: str, *axes: str, reduced: int = 1, role: str = "") -> nn.Module:
        """A module for arrays with the last `axes` (logical names; default: the model's width).

        Each element of these axes has a scale; the mean is over the last `reduced` axes. `role` names the input.
        """
        return NormModule(self, ctx, axes or ("norm",), reduced, role, name=name)


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """(x - mean(x)) / std(x) * scale + bias over the last axis. Ba et al. 2016, arXiv:1607.06450."""

    eps: float = 1e-5
    bias: bool = True
    scale: bool = True

    def module(self, ctx: Context, name: str, *axes: str, reduced: int = 1, role: str = "") -> nn.Module:
        """As `RMSNorm.module`."""
        return NormModule(self, ctx, axes or ("norm",), reduced, role, name=name)


Norm = RMSNorm | LayerNorm


class NormModule(nn.Module):
    spec: Norm
    ctx: Context
    axes: tuple[str, ...]
    reduced: int
    role: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec = self.spec
        zero_centered = isinstance(spec, RMSNorm) and spec.zero_centered
        if isinstance(spec, LayerNorm):
            x32 = x.astype(jnp.float32)
            x = x32 - jnp.mean(x32, axis=tuple(range(-self.reduced, 0)), keepdims=True)
        x32 = by_rms(x, self.reduced, spec.eps)
        if spec.scale:
            scale = self._param("scale", x, 0.0 if zero_centered else 1.0)
            x32 = x32 * (1.0 + scale if zero_centered else scale)
        if isinstance(spec, LayerNorm) and spec.bias:
            x32 = x32 + self._param("bias", x, 0.0)
        return x32.astype(self.ctx.dtype)

    def _param(self, name: str, x: jax.Array, value: float) -> jax.Array:
        rows, shape = x.shape[: -len(self.axes)], x.shape[-len(self.axes) :]
        init, role = nn.initializers.constant(value), f"{name} of {self.role}" if self.role else ""
        parameter = param(self, in_float32(self.ctx), name, shape, self.axes, init, 0, role, decay=False)
        return cpu.for_rows(parameter, rows)


def _forward(axes: int, eps: float, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(cpu.row_dot(x32, x32, axes) / math.prod(x.shape[-axes:]) + eps)
    return x32 * inverse, (x, inverse)


def _backward(axes: int, saved: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple[jax.Array]:
    x, inverse = saved
    x32 = x.astype(jnp.float32)
    along = cpu.row_dot(d, x32, axes) * (inverse**2 / math.prod(x.shape[-axes:]))
    return (((d - x32 * along) * inverse).astype(x.dtype),)


def _tangent(axes: int, saved: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array]) -> jax.Array:
    (x, inverse), moved = saved, tangents[0].astype(jnp.float32)
    x32 = x.astype(jnp.float32)
    along = cpu.row_dot(moved, x32, axes) * (inverse**2 / math.prod(x.shape[-axes:]))
    return (moved - x32 * along) * inverse


def by_rms(x: jax.Array, axes: int, eps: float) -> jax.Array:
    """x / rms(x) over the last `axes` axes, float32. Saves x and one number a row for the backward pass."""
    derivatives = functools.partial(_tangent, axes), functools.partial(_backward, axes)
    return differentiable(functools.partial(_forward, axes, eps), *derivatives)(x)

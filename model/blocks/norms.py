"""Normalisation layers."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context


@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """x / rms(x) * scale over the last axis, computed in float32. Zhang and Sennrich 2019, arXiv:1910.07467."""

    eps: float = 1e-5

    def module(self, ctx: Context, name: str, axis: str = "norm") -> nn.Module:
        return RMSNormModule(self, ctx, axis, name=name)


class RMSNormModule(nn.Module):
    spec: RMSNorm
    ctx: Context
    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = jnp.asarray(self.param("scale", init, (x.shape[-1],), self.ctx.param_dtype))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.spec.eps)
        return (x32 * scale.astype(jnp.float32)).astype(self.ctx.dtype)

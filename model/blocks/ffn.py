"""Feed-forward networks."""

# B batch, T tokens, D model width, F feed-forward width

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, fan_in_normal, param
from model.sharding import constrain


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """down(silu(gate(x)) * up(x)). Shazeer 2020, arXiv:2002.05202."""

    width: int
    bias: bool = False

    def module(self, ctx: Context, name: str) -> nn.Module:
        return SwiGLUModule(self, ctx, name=name)


class SwiGLUModule(nn.Module):
    spec: SwiGLU
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict]:
        gate_BTF = self._linear("gate", x_BTD, ("embed", "mlp"), self.spec.width)
        up_BTF = self._linear("up", x_BTD, ("embed", "mlp"), self.spec.width)
        h_BTF = constrain(nn.silu(gate_BTF) * up_BTF, self.ctx.rules, "batch", "length", "act_mlp")
        y_BTD = self._linear(
            "down", h_BTF, ("mlp", "embed"), self.ctx.width, (2 * self.ctx.num_blocks) ** -0.5
        )
        return y_BTD, {}

    def _linear(
        self, name: str, x: jax.Array, axes: tuple[str, str], features: int, scale: float = 1.0
    ) -> jax.Array:
        fan_in = x.shape[-1]
        y = x @ param(self, self.ctx, name, (fan_in, features), axes, fan_in_normal(fan_in, scale))
        if self.spec.bias:
            bias_axis = "mlp" if axes[1] == "mlp" else "norm"
            y += param(self, self.ctx, f"{name}_bias", (features,), (bias_axis,), nn.initializers.zeros)
        return jnp.asarray(y)

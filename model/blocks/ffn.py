"""Feed-forward networks without experts."""

# B batch, T tokens, D model width, F feed-forward width

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, TokenInfo, fan_in_normal, param
from model.sharding import constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
    "sigmoid": nn.sigmoid,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x)). Shazeer 2020, arXiv:2002.05202."""

    width: int
    activation: str = "silu"
    bias: bool = False
    gate_scale: float = 1.0  # muP: of what the activation takes
    down_scale: float = 1.0  # muP: of the result

    roles = {
        "gate": "what opens each feature",
        "up": "value of each feature",
        "down": "adds the open features to the residual stream",
    }

    def __post_init__(self):
        check_activation(self.activation)

    def module(self, ctx: Context, name: str) -> nn.Module:
        return GatedMLPModule(self, ctx, name=name)

    def flops_per_token(self, width: int) -> float:
        """Of the forward pass."""
        return 2 * 3 * width * self.width


@dataclasses.dataclass(frozen=True)
class MLP:
    """down(activation(up(x))). Vaswani et al. 2017, arXiv:1706.03762."""

    width: int
    activation: str = "gelu"
    bias: bool = True

    roles = {
        "up": "value of each feature",
        "down": "adds the open features to the residual stream",
    }

    def __post_init__(self):
        check_activation(self.activation)

    def module(self, ctx: Context, name: str) -> nn.Module:
        return MLPModule(self, ctx, name=name)

    def flops_per_token(self, width: int) -> float:
        """Of the forward pass."""
        return 2 * 2 * width * self.width


SwiGLU = functools.partial(GatedMLP, activation="silu")
GeGLU = functools.partial(GatedMLP, activation="gelu_tanh")
ReGLU = functools.partial(GatedMLP, activation="relu")


class GatedMLPModule(nn.Module):
    spec: GatedMLP
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo) -> tuple[jax.Array, dict]:
        spec = self.spec
        gate_BTF = _linear(self, "gate", x_BTD, ("embed", "mlp"), spec.width)
        up_BTF = _linear(self, "up", x_BTD, ("embed", "mlp"), spec.width)
        h_BTF = ACTIVATIONS[spec.activation](gate_BTF * spec.gate_scale) * up_BTF
        return _down(self, h_BTF) * spec.down_scale, {}


class MLPModule(nn.Module):
    spec: MLP
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo) -> tuple[jax.Array, dict]:
        up_BTF = _linear(self, "up", x_BTD, ("embed", "mlp"), self.spec.width)
        return _down(self, ACTIVATIONS[self.spec.activation](up_BTF)), {}


def _down(module: GatedMLPModule | MLPModule, h_BTF: jax.Array) -> jax.Array:
    ctx = module.ctx
    h_BTF = constrain(h_BTF, ctx.rules, "batch", "length", "act_mlp")
    return _linear(module, "down", h_BTF, ("mlp", "embed"), ctx.width, (2 * ctx.num_blocks) ** -0.5)


def _linear(
    module: GatedMLPModule | MLPModule,
    name: str,
    x: jax.Array,
    axes: tuple[str, str],
    features: int,
    scale: float = 1.0,
) -> jax.Array:
    fan_in, ctx = x.shape[-1], module.ctx
    y = x @ param(module, ctx, name, (fan_in, features), axes, fan_in_normal(fan_in, scale))
    if module.spec.bias:
        bias_axis = "mlp" if axes[1] == "mlp" else "norm"
        y += param(module, ctx, f"{name}_bias", (features,), (bias_axis,), nn.initializers.zeros)
    return jnp.asarray(y)


def check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is not one of {', '.join(ACTIVATIONS)}.")

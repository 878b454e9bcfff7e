"""Dense feed-forward networks."""

# B batch, T tokens, D model width, F feed-forward width

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, TokenInfo
from model.blocks.linear import add_bias, linear, map_out
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
    gate_scale: float = 1.0  # muP: multiplies the activation's input
    down_scale: float = 1.0  # muP: multiplies the output

    def __post_init__(self):
        check_activation(self.activation)

    def module(self, ctx: Context, name: str, where: str = "") -> nn.Module:
        """`where` is a prefix of the parameters' roles."""
        return GatedMLPModule(self, ctx, where, name=name)

    def flops_per_token(self, width: int) -> float:
        """FLOPs of the forward pass."""
        return 2 * 3 * width * self.width


@dataclasses.dataclass(frozen=True)
class MLP:
    """down(activation(up(x))). Vaswani et al. 2017, arXiv:1706.03762."""

    width: int
    activation: str = "gelu"
    bias: bool = True

    def __post_init__(self):
        check_activation(self.activation)

    def module(self, ctx: Context, name: str, where: str = "") -> nn.Module:
        """As `GatedMLP.module`."""
        return MLPModule(self, ctx, where, name=name)

    def flops_per_token(self, width: int) -> float:
        """FLOPs of the forward pass."""
        return 2 * 2 * width * self.width


SwiGLU = functools.partial(GatedMLP, activation="silu")
GeGLU = functools.partial(GatedMLP, activation="gelu_tanh")
ReGLU = functools.partial(GatedMLP, activation="relu")


GATE, UP = "what opens each feature", "value of each feature"
DOWN = "adds the activated features to the residual stream"


class GatedMLPModule(nn.Module):
    spec: GatedMLP
    ctx: Context
    where: str = ""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo) -> tuple[jax.Array, dict]:
        spec, features = self.spec, ((self.spec.width,), ("mlp",))
        gate_BTF = linear(self, "gate", x_BTD, *features, self.where + GATE, bias=spec.bias)
        up_BTF = linear(self, "up", x_BTD, *features, self.where + UP, bias=spec.bias)
        activation = ACTIVATIONS[spec.activation]
        open_features = lambda gate_and_up: activation(gate_and_up[0] * spec.gate_scale) * gate_and_up[1]
        return _down(self, open_features, (gate_BTF, up_BTF)) * spec.down_scale, {}


class MLPModule(nn.Module):
    spec: MLP
    ctx: Context
    where: str = ""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo) -> tuple[jax.Array, dict]:
        spec = self.spec
        up_BTF = linear(self, "up", x_BTD, (spec.width,), ("mlp",), self.where + UP, bias=spec.bias)
        return _down(self, ACTIVATIONS[spec.activation], up_BTF), {}


def _down(module: GatedMLPModule | MLPModule, activate: Callable, x: Any) -> jax.Array:
    """The down projection of the features [B, T, F] that `activate` computes from x."""
    spec, rules = module.spec, module.ctx.rules
    features = lambda x: constrain(activate(x), rules, "batch", "length", "act_mlp")
    y_BTD = map_out(module, (spec.width,), ("mlp",), module.where + DOWN, "down").of_recomputed(features, x)
    return add_bias(module, "down", y_BTD, ("embed",)) if spec.bias else y_BTD


def check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is not one of {', '.join(ACTIVATIONS)}.")

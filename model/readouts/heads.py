"""Readouts with outputs for each token: a scalar (value, reward), a vector, or one number for each label.

A readout is a frozen dataclass with `name` and `read` in `ModelConfig.heads`; its output is `out.heads[name]`.
"""

# B batch, T tokens, D model width, L labels

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, bias_param, param
from model.readouts.hidden_states import HiddenStates


class Readout(Protocol):
    """A readout of a model's last hidden states, beside the vocabulary."""

    @property
    def name(self) -> str:
        """The key in `out.heads`."""
        ...

    def read(self, module: nn.Module, ctx: Context, hidden_states: HiddenStates) -> Any:
        """The output, an array or a pytree. It runs within a compact method of `module`, which owns the parameters."""
        ...


@dataclasses.dataclass(frozen=True)
class ScalarHead:
    """A linear map of the final hidden state to one number a token, float32: `out.heads[name]` is [B, T]."""

    name: str  # "value", "reward"

    def read(self, module: nn.Module, ctx: Context, hidden_states: HiddenStates) -> jax.Array:
        name, zeros = f"{self.name}_head", nn.initializers.zeros
        role = f"the {self.name} of each token"
        w_D = param(module, ctx, name, (ctx.width,), ("norm",), zeros, role=role, decay=False)
        bias = bias_param(module, ctx, f"{name}_bias", (), ())
        return (
            jnp.einsum("BTD,D->BT", hidden_states.hidden_BTD, w_D, preferred_element_type=jnp.float32) + bias
        )


@dataclasses.dataclass(frozen=True)
class LinearHead:
    """A linear map of the final hidden state to a vector a token, float32: `out.heads[name]` is [B, T, width]."""

    name: str
    width: int

    def read(self, module: nn.Module, ctx: Context, hidden_states: HiddenStates) -> jax.Array:
        zeros, role = nn.initializers.zeros, f"the {self.name} of each token"
        axes = ("embed", None)
        w_DN = param(
            module, ctx, f"{self.name}_head", (ctx.width, self.width), axes, zeros, 1, role, decay=True
        )
        return jnp.einsum("BTD,DN->BTN", hidden_states.hidden_BTD, w_DN, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class ClassHead:
    """A linear map of the final hidden state to a number for each label, float32: `out.heads[name]` is [B, T, labels].

    To classify a whole text, use one token: the first one of an encoder, the last one of a decoder.
    """

    name: str
    labels: tuple[str, ...]
    bias: bool = True
    pooled: bool = False  # reads the pooler's output instead of the hidden state

    def read(self, module: nn.Module, ctx: Context, hidden_states: HiddenStates) -> jax.Array:
        name, L = f"{self.name}_head", len(self.labels)
        read_BTD = cast(jax.Array, hidden_states.pooled_BTD) if self.pooled else hidden_states.hidden_BTD
        role = f"the {self.name} of each token"
        w_DL = param(
            module, ctx, name, (ctx.width, L), ("embed", None), nn.initializers.zeros, 1, role, decay=True
        )
        y_BTL = jnp.einsum("BTD,DL->BTL", read_BTD, w_DL, preferred_element_type=jnp.float32)
        return y_BTL + bias_param(module, ctx, f"{name}_bias", (L,), (None,)) if self.bias else y_BTL

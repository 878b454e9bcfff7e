"""Readouts that give each token numbers of its own: a scalar (value, reward) or one for each label.

A further readout is a frozen dataclass with a `name` and `read`, put into `ModelConfig.heads`: its result is
`out.heads[name]`.
"""

# B batch, T tokens, D model width, L labels

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, bias_param, param
from model.readouts.stream import Stream


class Readout(Protocol):
    """What is read from a model's last hidden states, beside the vocabulary."""

    @property
    def name(self) -> str:
        """The key of `out.heads`."""
        ...

    def read(self, module: nn.Module, ctx: Context, stream: Stream) -> Any:
        """The result, an array or a pytree. Called within a compact method of `module`, which has the parameters."""
        ...


@dataclasses.dataclass(frozen=True)
class ScalarHead:
    """A linear map of the final hidden state to one number a token, float32: `out.heads[name]` is [B, T]."""

    name: str  # "value", "reward"

    def read(self, module: nn.Module, ctx: Context, stream: Stream) -> jax.Array:
        name, zeros = f"{self.name}_head", nn.initializers.zeros
        role = f"the {self.name} of each token"
        w_D = param(module, ctx, name, (ctx.width,), ("norm",), zeros, role=role, decay=False)
        bias = bias_param(module, ctx, f"{name}_bias", (), ())
        return jnp.einsum("BTD,D->BT", stream.hidden_BTD, w_D, preferred_element_type=jnp.float32) + bias


@dataclasses.dataclass(frozen=True)
class ClassHead:
    """A linear map of the final hidden state to a number for each label, float32: `out.heads[name]` is [B, T, labels].

    Where a text as a whole is classified, one token has its numbers: an encoder's first, a decoder's last.
    """

    name: str
    labels: tuple[str, ...]
    bias: bool = True
    pooled: bool = False  # reads what the pooler makes of the hidden state

    def read(self, module: nn.Module, ctx: Context, stream: Stream) -> jax.Array:
        name, L = f"{self.name}_head", len(self.labels)
        read_BTD = cast(jax.Array, stream.pooled_BTD) if self.pooled else stream.hidden_BTD
        role = f"the {self.name} of each token"
        w_DL = param(
            module, ctx, name, (ctx.width, L), ("embed", None), nn.initializers.zeros, 1, role, decay=True
        )
        y_BTL = jnp.einsum("BTD,DL->BTL", read_BTD, w_DL, preferred_element_type=jnp.float32)
        return y_BTL + bias_param(module, ctx, f"{name}_bias", (L,), (None,)) if self.bias else y_BTL

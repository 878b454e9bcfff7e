"""The layer between an encoder's last hidden state and its logits or pooled vector.

Devlin et al. 2018, arXiv:1810.04805.
"""

# B batch, T tokens, D model width

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax

from model.blocks.common import Context, bias_param, fan_in_normal, weight_param
from model.blocks.ffn import ACTIVATIONS, check_activation
from model.blocks.norms import LayerNorm, Norm
from model.weights import matmul


@dataclasses.dataclass(frozen=True)
class Transform:
    """norm(activation(linear(x))), as wide as the model: before BERT's logits, and its pooler."""

    activation: str = "gelu"
    bias: bool = True
    norm: Norm | None = LayerNorm()

    def __post_init__(self):
        check_activation(self.activation)

    def module(self, ctx: Context, name: str, role: str = "") -> nn.Module:
        """`role` names the output."""
        return TransformModule(self, ctx, role, name=name)


class TransformModule(nn.Module):
    spec: Transform
    ctx: Context
    role: str = ""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        spec, D = self.spec, x_BTD.shape[-1]
        declared = "dense", (D, D), ("embed", None), fan_in_normal(D)
        w_DE = weight_param(self, self.ctx, *declared, role=self.role)
        y_BTD = matmul(x_BTD, w_DE, "BTD,DE->BTE")
        if spec.bias:
            y_BTD += bias_param(self, self.ctx, "dense_bias", (D,), ("norm",))
        y_BTD = ACTIVATIONS[spec.activation](y_BTD)
        return y_BTD if spec.norm is None else spec.norm.module(self.ctx, "norm", role=self.role)(y_BTD)

"""The recurrent block of Griffin: a short convolution and a real-gated linear recurrent unit (RG-LRU).

De et al. 2024, arXiv:2402.19427, as in RecurrentGemma, arXiv:2404.07839.
"""

# B batch, T tokens, D model width, H heads (blocks of the gates), C head width, K taps of the convolution

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, TokenInfo, bias_param, fan_in_normal, param, weight_param
from model.blocks.linear import linear, linear_out
from model.blocks.recurrence import (
    OUTPUT_GATE,
    READ_OUT,
    SegmentOrder,
    begin,
    causal_conv,
    finish,
    param32,
)
from model.kernels.linear_scan import linear_scan
from model.sharding import constrain
from model.weights import matmul

SHARPNESS = 8.0  # "c" of the paper: log decay = -c * gate * softplus(a)
HEADS = ("heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class RGLRU:
    """gelu(y) * recurrence(conv(x)); the gates' maps are block-diagonal, one block a head."""

    num_heads: int
    head_dim: int
    conv_width: int = 4

    def module(self, ctx: Context, name: str) -> nn.Module:
        return RGLRUModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """A row's last tokens before the convolution and its state [H, C]."""
        heads = (self.num_heads, self.head_dim)
        return {
            "conv": jnp.zeros((num_rows, self.conv_width - 1, *heads), dtype),
            "state": jnp.zeros((num_rows, *heads), jnp.float32),
        }

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {"conv": ("rows", None, "act_heads", None), "state": ("rows", "act_heads", None)}

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass."""
        return 2 * self.num_heads * self.head_dim * (3 * width + 2 * self.head_dim)


class RGLRUModule(nn.Module):
    spec: RGLRU
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, ctx, state = self.spec, self.ctx, {}
        heads, K = (spec.num_heads, spec.head_dim), spec.conv_width
        x_BTD, order = begin(spec, x_BTD, info, cache)
        y_BTHC = nn.gelu(linear(self, "y", x_BTD, heads, HEADS, OUTPUT_GATE, bias=True), approximate=True)
        role = "input of the convolution and the state"
        x_BTHC = linear(self, "x", x_BTD, heads, HEADS, role, bias=True)
        declared = (K, *heads), (None, *HEADS), fan_in_normal(K)
        w_KHC = param(self, ctx, "conv", *declared, role="mixes each channel over the last tokens")
        x_BTHC, state["conv"] = causal_conv(x_BTHC, w_KHC, order.state["conv"], order)
        x_BTHC += bias_param(self, ctx, "conv_bias", heads, HEADS)
        x_BTHC = constrain(x_BTHC, ctx.rules, "batch", "length", "act_heads", None)
        h_BTHC, state["state"] = self._recur(x_BTHC, order)
        y_BTD = linear_out(self, h_BTHC.astype(ctx.dtype) * y_BTHC, HEADS, READ_OUT, bias=True)
        return finish(y_BTD, state, order, info, cache)

    def _recur(self, x_BTHC: jax.Array, order: SegmentOrder) -> tuple[jax.Array, jax.Array]:
        """(the states of all tokens in float32, the last state)."""
        declared = x_BTHC.shape[2:], HEADS, _between_decays(0.9, 0.999)
        a_HC = param32(self, self.ctx, "a", *declared, "how fast each channel forgets")
        asked_BTHC = self._gate("a_gate", x_BTHC, "how much of its forgetting rate a token uses")
        log_decay_BTHC = -SHARPNESS * asked_BTHC * jax.nn.softplus(a_HC)
        # sqrt(1 - decay^2) keeps the state's size. A document's first token has no state before it, so its factor is 1.
        # Not with expm1: Griffin's code and transformers subtract, and the logits show the difference in rounding.
        room_BTHC = jnp.sqrt(jnp.maximum(1 - jnp.exp(2 * log_decay_BTHC), 1e-30))
        room_BTHC = jnp.where(order.first_BT[..., None, None], 1.0, room_BTHC)
        let_in_BTHC = self._gate("x_gate", x_BTHC, "how much of the token enters the state")
        input_BTHC = x_BTHC.astype(jnp.float32) * let_in_BTHC * room_BTHC
        return linear_scan(
            order.only_real(input_BTHC), order.only_real(log_decay_BTHC), order.first_BT, order.state["state"]
        )

    def _gate(self, name: str, x_BTHC: jax.Array, role: str) -> jax.Array:
        H, C = x_BTHC.shape[2:]
        declared = (H, C, C), ("heads", None, "head_dim"), fan_in_normal(C)
        w_HCC = weight_param(self, self.ctx, name, *declared, inputs=(1,), role=role)
        bias_HC = bias_param(self, self.ctx, f"{name}_bias", (H, C), HEADS)
        return jax.nn.sigmoid((matmul(x_BTHC, w_HCC, "BTHI,HIC->BTHC") + bias_HC).astype(jnp.float32))


def _between_decays(low: float, high: float):
    """softplus(a) such that exp(-c softplus(a)), the decay of an open gate, is uniform by area in [low, high]."""

    def init(key, shape, dtype):
        square = jax.random.uniform(key, shape, jnp.float32, low**2, high**2)
        return jnp.log(jnp.expm1(-0.5 * jnp.log(square) / SHARPNESS)).astype(dtype)

    return init

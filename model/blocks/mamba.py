"""The Mamba mixer: a selective state space model for every channel. Gu and Dao 2023, arXiv:2312.00752.

With norms on time step, B and C: Jamba, arXiv:2403.19887 (learned scales), Falcon Mamba, arXiv:2410.05355 (none).
"""

# B batch, T tokens, D model width, F inner width, N state width, R rank of the time step, K taps of the convolution

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, TokenInfo, bias_param, fan_in_normal, param
from model.blocks.linear import linear, linear_out
from model.blocks.norms import Norm
from model.blocks.recurrence import (
    FORGETTING,
    OUTPUT_GATE,
    READ_OUT,
    TIME_STEP,
    SegmentOrder,
    begin,
    causal_conv,
    finish,
    inverse_softplus_of_log_uniform,
    param32,
)
from model.kernels.linear_scan import selective_scan
from model.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Mamba:
    """The time step is a map of rank `dt_rank` from the inner width to itself."""

    width: int
    state_dim: int
    dt_rank: int
    conv_width: int = 4
    conv_bias: bool = True
    bias: bool = False  # biases of the maps from and to the model's width
    norm: Norm | None = None  # norms of the low-rank time step, B and C

    def module(self, ctx: Context, name: str) -> nn.Module:
        return MambaModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """A row's last tokens before the convolution and its state [F, N]."""
        return {
            "conv": jnp.zeros((num_rows, self.conv_width - 1, self.width), dtype),
            "ssm": jnp.zeros((num_rows, self.width, self.state_dim), jnp.float32),
        }

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {"conv": ("rows", None, "act_mlp"), "ssm": ("rows", "act_mlp", None)}

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass, with the recurrence run token by token."""
        chosen = 2 * self.dt_rank + 2 * self.state_dim
        return 2 * self.width * (3 * width + chosen) + 4 * self.width * self.state_dim


class MambaModule(nn.Module):
    spec: Mamba
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, ctx, state, inner = self.spec, self.ctx, {}, (self.spec.width,)
        x_BTD, order = begin(spec, x_BTD, info, cache)
        role = "input of the convolution and the state"
        x_BTF = linear(self, "in_x", x_BTD, inner, ("mlp",), role, bias=spec.bias)
        z_BTF = linear(self, "in_z", x_BTD, inner, ("mlp",), OUTPUT_GATE, bias=spec.bias)
        declared = (spec.conv_width, *inner), (None, "mlp"), fan_in_normal(spec.conv_width)
        w_KF = param(self, ctx, "conv", *declared, role="mixes each channel over the last tokens")
        x_BTF, state["conv"] = causal_conv(x_BTF, w_KF, order.state["conv"], order)
        if spec.conv_bias:
            x_BTF += bias_param(self, ctx, "conv_bias", inner, ("mlp",))
        x_BTF = constrain(nn.silu(x_BTF), ctx.rules, "batch", "length", "act_mlp")
        y_BTF, state["ssm"] = self._scan(x_BTF, order)
        y_BTF = (y_BTF * nn.silu(z_BTF.astype(jnp.float32))).astype(ctx.dtype)
        y_BTD = linear_out(self, y_BTF, ("mlp",), READ_OUT, bias=spec.bias)
        return finish(y_BTD, state, order, info, cache)

    def _scan(self, x_BTF: jax.Array, order: SegmentOrder) -> tuple[jax.Array, jax.Array]:
        spec, ctx, (F, N) = self.spec, self.ctx, (self.spec.width, self.spec.state_dim)
        select = functools.partial(self._selected, x_BTF)
        low_BTR = select(
            "dt_low", spec.dt_rank, "the token to the low rank of its time step", "the low-rank time step"
        )
        k_BTN = select("B", N, "how the token is written to the state", "B")
        q_BTN = select("C", N, "how the token reads the state", "C")
        role = "the low rank to each channel's time step"
        dt_BTF = linear(self, "dt", low_BTR, (F,), ("mlp",), role, in_axes=(None,)).astype(jnp.float32)
        start = inverse_softplus_of_log_uniform(1e-3, 1e-1)
        dt_BTF = jax.nn.softplus(dt_BTF + param32(self, ctx, "dt_bias", (F,), ("mlp",), start, TIME_STEP))
        A_FN = -jnp.exp(param32(self, ctx, "A_log", (F, N), ("mlp", None), _log_of_count, FORGETTING))
        D_F = param32(self, ctx, "D", (F,), ("mlp",), nn.initializers.ones, "what passes by the state")
        y_BTF, state_BFN = selective_scan(
            x_BTF, order.only_real(dt_BTF), A_FN, k_BTN, q_BTN, order.first_BT, order.state["ssm"]
        )
        return y_BTF + D_F * x_BTF.astype(jnp.float32), state_BFN

    def _selected(self, x_BTF: jax.Array, name: str, size: int, role: str, what: str) -> jax.Array:
        """What each token selects: the low-rank time step, B or C."""
        y, norm = linear(self, name, x_BTF, (size,), (None,), role, in_axes=("mlp",)), self.spec.norm
        return y if norm is None else norm.module(self.ctx, f"{name}_norm", role=what)(y)


def _log_of_count(key, shape: tuple[int, ...], dtype) -> jax.Array:
    """log(1), log(2), ... along the last axis: S4D's real start."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1)), shape).astype(dtype)

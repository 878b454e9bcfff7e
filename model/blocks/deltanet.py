"""Mixers of the gated delta rule: Gated DeltaNet, with one decay a head, and Kimi's, with one a channel.

Yang et al. 2024, "Gated Delta Networks", arXiv:2412.06464; Kimi Linear, arXiv:2510.26692.
"""

# B batch, T tokens, D model width, H heads, G key heads, K key width, V value width, W taps of the convolutions

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, TokenInfo, fan_in_normal, param
from model.blocks.linear import linear, linear_out
from model.blocks.recurrence import (
    HEAD_FORGETTING,
    OUTPUT_GATE,
    READ_OUT,
    SegmentOrder,
    begin,
    causal_conv,
    finish,
    head_rms_norm,
    inverse_softplus_of_log_uniform,
    log_uniform,
    param32,
)
from model.kernels.delta_rule import delta_rule
from model.sharding import constrain

Axes = tuple[str | None, ...]
KEYS: Axes = ("kv_heads", "head_dim")
VALUES: Axes = ("heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet:
    """Each key head (with its query) serves num_heads / num_key_heads value heads."""

    num_heads: int
    num_key_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 4
    norm_eps: float = 1e-6  # of the RMS norm of each head's output, before the gate
    negative_eigenvalues: bool = False  # the step size beta is in (0, 2) instead of (0, 1)

    def __post_init__(self):
        if self.num_heads % self.num_key_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_key_heads={self.num_key_heads}. "
                "Each key head serves a whole number of value heads."
            )

    def module(self, ctx: Context, name: str) -> nn.Module:
        return GatedDeltaNetModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """A row's last tokens before each convolution and its state [H, K, V]."""
        tail, keys = (num_rows, self.conv_width - 1), (self.num_key_heads, self.key_dim)
        return {
            "conv_q": jnp.zeros((*tail, *keys), dtype),
            "conv_k": jnp.zeros((*tail, *keys), dtype),
            "conv_v": jnp.zeros((*tail, self.num_heads, self.value_dim), dtype),
            "state": jnp.zeros((num_rows, self.num_heads, self.key_dim, self.value_dim), jnp.float32),
        }

    def cache_axes(self) -> dict[str, Axes]:
        keys, values = ("rows", None, "act_kv_heads", None), ("rows", None, "act_heads", None)
        return {"conv_q": keys, "conv_k": keys, "conv_v": values, "state": ("rows", "act_heads", None, None)}

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass, with the recurrence run token by token."""
        keys, values = self.num_key_heads * self.key_dim, self.num_heads * self.value_dim
        return 2 * width * (2 * keys + 3 * values + 2 * self.num_heads) + 6 * values * self.key_dim


class GatedDeltaNetModule(nn.Module):
    spec: GatedDeltaNet
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, ctx, state = self.spec, self.ctx, {}
        keys, values = (spec.num_key_heads, spec.key_dim), (spec.num_heads, spec.value_dim)
        x_BTD, order = begin(spec, x_BTD, info, cache)
        q_BTGK, k_BTGK = (_short_conv(self, name, x_BTD, keys, KEYS, order, state) for name in "qk")
        v_BTHV = _short_conv(self, "v", x_BTD, values, VALUES, order, state)
        z_BTHV = linear(self, "z", x_BTD, values, VALUES, OUTPUT_GATE)
        beta_BTH = jax.nn.sigmoid(
            linear(self, "b", x_BTD, values[:1], VALUES[:1], REPLACED).astype(jnp.float32)
        )
        beta_BTH = beta_BTH * (2.0 if spec.negative_eigenvalues else 1.0)
        a_BTH = linear(
            self, "a", x_BTD, values[:1], VALUES[:1], "each head's decay: how much of the state remains"
        )
        log_decay_BTH = _log_decay(self, ctx, a_BTH, VALUES[:1], role="where that starts from")

        group = spec.num_heads // spec.num_key_heads
        q_BTHK, k_BTHK = (jnp.repeat(_unit(x), group, axis=2) for x in (q_BTGK, k_BTGK))
        o_BTHV, state["state"] = delta_rule(
            q_BTHK * spec.key_dim**-0.5,
            k_BTHK,
            v_BTHV,
            order.only_real(log_decay_BTH)[..., None],
            order.only_real(beta_BTH),
            order.first_BT,
            order.state["state"],
            rules=ctx.rules,
        )
        gate_BTHV = nn.silu(z_BTHV.astype(jnp.float32))
        y_BTHV = (head_rms_norm(self, ctx, o_BTHV, spec.norm_eps) * gate_BTHV).astype(ctx.dtype)
        return finish(linear_out(self, y_BTHV, VALUES, READ_OUT), state, order, info, cache)


@dataclasses.dataclass(frozen=True)
class KimiDeltaAttention:
    """The delta rule with a decay for each key channel; decay and output gate are low-rank maps."""

    num_heads: int
    head_dim: int
    conv_width: int = 4
    norm_eps: float = 1e-5
    # log decay = bound * sigmoid(...), instead of -exp(A_log) softplus(...)
    decay_lower_bound: float | None = None

    def module(self, ctx: Context, name: str) -> nn.Module:
        return KimiDeltaAttentionModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """A row's last tokens before each convolution and its state [H, K, V]."""
        tail = (num_rows, self.conv_width - 1, self.num_heads, self.head_dim)
        state = (num_rows, self.num_heads, self.head_dim, self.head_dim)
        return {f"conv_{name}": jnp.zeros(tail, dtype) for name in "qkv"} | {
            "state": jnp.zeros(state, jnp.float32)
        }

    def cache_axes(self) -> dict[str, Axes]:
        axes: dict[str, Axes] = {f"conv_{name}": ("rows", None, "act_heads", None) for name in "qkv"}
        return axes | {"state": ("rows", "act_heads", None, None)}

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass, with the recurrence run token by token."""
        inner = self.num_heads * self.head_dim
        low_rank = 2 * self.head_dim * (width + inner)
        return 2 * (width * (4 * inner + self.num_heads) + low_rank) + 6 * inner * self.head_dim


class KimiDeltaAttentionModule(nn.Module):
    spec: KimiDeltaAttention
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, ctx, state = self.spec, self.ctx, {}
        heads = (spec.num_heads, spec.head_dim)
        x_BTD, order = begin(spec, x_BTD, info, cache)
        q_BTHK, k_BTHK, v_BTHV = (
            _short_conv(self, name, x_BTD, heads, VALUES, order, state) for name in "qkv"
        )
        beta_BTH = jax.nn.sigmoid(
            linear(self, "b", x_BTD, heads[:1], VALUES[:1], REPLACED).astype(jnp.float32)
        )
        f_BTHK = self._low_rank("f", x_BTD, heads, "decay", "how much each channel keeps")
        bound, role = spec.decay_lower_bound, "where the decay starts from"
        log_decay_BTHK = _log_decay(self, ctx, f_BTHK, VALUES, bound, role)
        o_BTHV, state["state"] = delta_rule(
            _unit(q_BTHK) * spec.head_dim**-0.5,
            _unit(k_BTHK),
            v_BTHV,
            order.only_real(log_decay_BTHK),
            order.only_real(beta_BTH),
            order.first_BT,
            order.state["state"],
            rules=ctx.rules,
        )
        g_BTHV = self._low_rank("g", x_BTD, heads, "gate", "the gate of each channel of the output")
        gate_BTHV = jax.nn.sigmoid(g_BTHV.astype(jnp.float32))
        y_BTHV = (head_rms_norm(self, ctx, o_BTHV, spec.norm_eps) * gate_BTHV).astype(ctx.dtype)
        return finish(linear_out(self, y_BTHV, VALUES, READ_OUT), state, order, info, cache)

    def _low_rank(self, name: str, x_BTD: jax.Array, heads: tuple[int, int], of: str, to: str) -> jax.Array:
        down, up = f"the token to the low rank of its {of}", f"the low rank to {to}"
        low_BTK = linear(self, f"{name}_a", x_BTD, (self.spec.head_dim,), (None,), down)
        return linear(self, f"{name}_b", low_BTK, heads, VALUES, up, in_axes=(None,))


REPLACED = "how much of what the state held at the key is replaced"
# The roles of each map and of its convolution.
SHORT_CONVS = {
    "q": ("queries: where a token reads the state", "mixes queries over the last tokens"),
    "k": ("keys: where it writes", "mixes keys over the last tokens"),
    "v": ("values: what it writes", "mixes values over the last tokens"),
}


def _short_conv(
    module: GatedDeltaNetModule | KimiDeltaAttentionModule,
    name: str,
    x_BTD: jax.Array,
    shape: tuple[int, int],
    axes: Axes,
    order: SegmentOrder,
    state: dict,
) -> jax.Array:
    """silu(conv(x W)); stores the convolution's new tail in `state`."""
    ctx, taps, (role, conv_role) = module.ctx, module.spec.conv_width, SHORT_CONVS[name]
    x_BTHK = linear(module, name, x_BTD, shape, axes, role)
    declared = (taps, *shape), (None, *axes), fan_in_normal(taps)
    w_WHK = param(module, ctx, f"conv_{name}", *declared, role=conv_role)
    y_BTHK, state[f"conv_{name}"] = causal_conv(x_BTHK, w_WHK, order.state[f"conv_{name}"], order)
    return constrain(nn.silu(y_BTHK), ctx.rules, "batch", "length", f"act_{axes[0]}", None)


def _log_decay(
    module: nn.Module,
    ctx: Context,
    a_BTHC: jax.Array,
    axes: Axes,
    lower_bound: float | None = None,
    role: str = "",
) -> jax.Array:
    """-exp(A_log) softplus(a + dt_bias) in float32, with one A_log a head; [B, T, H] or [B, T, H, K] as given."""
    start = inverse_softplus_of_log_uniform(1e-3, 1e-1)
    shift = param32(module, ctx, "dt_bias", a_BTHC.shape[2:], axes, start, role)
    heads = a_BTHC.shape[2:3], axes[:1]
    A_log_H = param32(module, ctx, "A_log", *heads, log_uniform(1.0, 16.0), HEAD_FORGETTING)
    rate = jnp.exp(A_log_H).reshape(-1, *(1,) * (a_BTHC.ndim - 3))
    if lower_bound is not None:
        return lower_bound * jax.nn.sigmoid(rate * (a_BTHC.astype(jnp.float32) + shift))
    return -rate * jax.nn.softplus(a_BTHC.astype(jnp.float32) + shift)


def _unit(x_BTHK: jax.Array) -> jax.Array:
    """x / |x| over the last axis, float32."""
    x_BTHK = x_BTHK.astype(jnp.float32)
    return x_BTHK * jax.lax.rsqrt(jnp.sum(x_BTHK * x_BTHK, axis=-1, keepdims=True) + 1e-6)

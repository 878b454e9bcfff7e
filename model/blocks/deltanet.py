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
    Walk,
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
    """Each key head (with its query) serves num_heads / num_key_heads heads of values."""

    num_heads: int
    num_key_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 4
    norm_eps: float = 1e-6  # of the RMS norm over a head's output, before the gate
    negative_eigenvalues: bool = False  # the step size beta is in (0, 2) instead of (0, 1)

    roles = {
        "q": "queries: where a token reads the state",
        "k": "keys: where it writes",
        "v": "values: what it writes",
        "conv_q": "mixes queries with those of the last few tokens",
        "conv_k": "mixes keys with those of the last few tokens",
        "conv_v": "mixes values with those of the last few tokens",
        "b": "how much of what the state held at the key is replaced",
        "z": "gate: opens each channel of the output",
        "a": "how much of the state each head keeps",
        "dt_bias": "where that starts from",
        "A_log": "how fast a head forgets, as a logarithm",
        "norm": "scale of each head's output",
        "o": "adds what was read from the state to the residual stream",
    }

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
        """Of the forward pass; the recurrence as if token by token."""
        keys, values = self.num_key_heads * self.key_dim, self.num_heads * self.value_dim
        return 2 * width * (2 * keys + 3 * values + 2 * self.num_heads) + 6 * values * self.key_dim


class GatedDeltaNetModule(nn.Module):
    spec: GatedDeltaNet
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, ctx, state = self.spec, self.ctx, {}
        keys, values = (spec.num_key_heads, spec.key_dim), (spec.num_heads, spec.value_dim)
        x_BTD, walk = begin(spec, x_BTD, info, cache)
        q_BTGK, k_BTGK = (
            _short_conv(self, ctx, name, x_BTD, keys, KEYS, spec.conv_width, walk, state) for name in "qk"
        )
        v_BTHV = _short_conv(self, ctx, "v", x_BTD, values, VALUES, spec.conv_width, walk, state)
        z_BTHV = linear(self, "z", x_BTD, values, VALUES)
        beta_BTH = jax.nn.sigmoid(linear(self, "b", x_BTD, values[:1], VALUES[:1]).astype(jnp.float32))
        beta_BTH = beta_BTH * (2.0 if spec.negative_eigenvalues else 1.0)
        a_BTH = linear(self, "a", x_BTD, values[:1], VALUES[:1])
        log_decay_BTH = _log_decay(self, ctx, a_BTH, VALUES[:1])

        group = spec.num_heads // spec.num_key_heads
        q_BTHK, k_BTHK = (jnp.repeat(_unit(x), group, axis=2) for x in (q_BTGK, k_BTGK))
        o_BTHV, state["state"] = delta_rule(
            q_BTHK * spec.key_dim**-0.5,
            k_BTHK,
            v_BTHV,
            walk.only_real(log_decay_BTH)[..., None],
            walk.only_real(beta_BTH),
            walk.first_BT,
            walk.state["state"],
            rules=ctx.rules,
        )
        gate_BTHV = nn.silu(z_BTHV.astype(jnp.float32))
        y_BTHV = (head_rms_norm(self, ctx, o_BTHV, spec.norm_eps) * gate_BTHV).astype(ctx.dtype)
        return finish(linear_out(self, y_BTHV, VALUES), state, walk, info, cache)


@dataclasses.dataclass(frozen=True)
class KimiDeltaAttention:
    """The delta rule with a decay for each channel of the key; decay and output gate are maps of low rank."""

    num_heads: int
    head_dim: int
    conv_width: int = 4
    norm_eps: float = 1e-5
    decay_lower_bound: float | None = (
        None  # log decay = bound * sigmoid(...), instead of -exp(A_log) softplus(...)
    )

    roles = {
        "q": "queries: where a token reads the state",
        "k": "keys: where it writes",
        "v": "values: what it writes",
        "conv_q": "mixes queries with those of the last few tokens",
        "conv_k": "mixes keys with those of the last few tokens",
        "conv_v": "mixes values with those of the last few tokens",
        "b": "how much of what the state held at the key is replaced",
        "f_a": "the token to the low rank of its decay",
        "f_b": "the low rank to how much each channel keeps",
        "g_a": "the token to the low rank of its gate",
        "g_b": "the low rank to the gate of each channel of the output",
        "dt_bias": "where the decay starts from",
        "A_log": "how fast a head forgets, as a logarithm",
        "norm": "scale of each head's output",
        "o": "adds what was read from the state to the residual stream",
    }

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
        """Of the forward pass; the recurrence as if token by token."""
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
        x_BTD, walk = begin(spec, x_BTD, info, cache)
        q_BTHK, k_BTHK, v_BTHV = (
            _short_conv(self, ctx, name, x_BTD, heads, VALUES, spec.conv_width, walk, state) for name in "qkv"
        )
        beta_BTH = jax.nn.sigmoid(linear(self, "b", x_BTD, heads[:1], VALUES[:1]).astype(jnp.float32))
        log_decay_BTHK = _log_decay(
            self, ctx, self._low_rank("f", x_BTD, heads), VALUES, spec.decay_lower_bound
        )
        o_BTHV, state["state"] = delta_rule(
            _unit(q_BTHK) * spec.head_dim**-0.5,
            _unit(k_BTHK),
            v_BTHV,
            walk.only_real(log_decay_BTHK),
            walk.only_real(beta_BTH),
            walk.first_BT,
            walk.state["state"],
            rules=ctx.rules,
        )
        gate_BTHV = jax.nn.sigmoid(self._low_rank("g", x_BTD, heads).astype(jnp.float32))
        y_BTHV = (head_rms_norm(self, ctx, o_BTHV, spec.norm_eps) * gate_BTHV).astype(ctx.dtype)
        return finish(linear_out(self, y_BTHV, VALUES), state, walk, info, cache)

    def _low_rank(self, name: str, x_BTD: jax.Array, heads: tuple[int, int]) -> jax.Array:
        low_BTK = linear(self, f"{name}_a", x_BTD, (self.spec.head_dim,), (None,))
        return linear(self, f"{name}_b", low_BTK, heads, VALUES, in_axes=(None,))


def _short_conv(
    module: nn.Module,
    ctx: Context,
    name: str,
    x_BTD: jax.Array,
    shape: tuple[int, int],
    axes: Axes,
    taps: int,
    walk: Walk,
    state: dict,
) -> jax.Array:
    """silu(conv(x W)); the convolution's new tail goes into `state`."""
    x_BTHK = linear(module, name, x_BTD, shape, axes)
    w_WHK = param(module, ctx, f"conv_{name}", (taps, *shape), (None, *axes), fan_in_normal(taps))
    y_BTHK, state[f"conv_{name}"] = causal_conv(x_BTHK, w_WHK, walk.state[f"conv_{name}"], walk)
    return constrain(nn.silu(y_BTHK), ctx.rules, "batch", "length", f"act_{axes[0]}", None)


def _log_decay(
    module: nn.Module, ctx: Context, a_BTHC: jax.Array, axes: Axes, lower_bound: float | None = None
) -> jax.Array:
    """-exp(A_log) softplus(a + dt_bias) in float32, with one A_log a head; [B, T, H] or [B, T, H, K] as given."""
    start = inverse_softplus_of_log_uniform(1e-3, 1e-1)
    shift = param32(module, ctx, "dt_bias", a_BTHC.shape[2:], axes, start)
    A_log_H = param32(module, ctx, "A_log", a_BTHC.shape[2:3], axes[:1], log_uniform(1.0, 16.0))
    rate = jnp.exp(A_log_H).reshape(-1, *(1,) * (a_BTHC.ndim - 3))
    if lower_bound is not None:
        return lower_bound * jax.nn.sigmoid(rate * (a_BTHC.astype(jnp.float32) + shift))
    return -rate * jax.nn.softplus(a_BTHC.astype(jnp.float32) + shift)


def _unit(x_BTHK: jax.Array) -> jax.Array:
    """x / |x| over the last axis, float32."""
    x_BTHK = x_BTHK.astype(jnp.float32)
    return x_BTHK * jax.lax.rsqrt(jnp.sum(x_BTHK * x_BTHK, axis=-1, keepdims=True) + 1e-6)

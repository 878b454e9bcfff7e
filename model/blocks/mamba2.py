"""The Mamba-2 mixer: a selective state space with one decay a head.

Dao and Gu 2024, arXiv:2405.21060. With the options of its descendants: multipliers (Falcon-H1), a clamped time step
(Nemotron-H, Zamba2), no norm before the output (Falcon-H1).
"""

# B batch, T tokens, D model width, H heads in G groups, P head width, N state width, K taps of the convolution

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
    inverse_softplus_of_log_uniform,
    log_uniform,
    param32,
)
from model.kernels.ssd import CHUNK, ssd
from model.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Mamba2:
    """Heads of one group share their keys (B) and queries (C), as in grouped-query attention."""

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int = 1
    conv_width: int = 4
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    norm_eps: float | None = 1e-5  # of the gated RMS norm over each group's channels; None: gate without norm
    norm_before_gate: bool = False
    dt_min: float = 0.0  # the time step is clamped to [dt_min, dt_max]
    dt_max: float | None = None
    in_multiplier: float = 1.0
    multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)  # of z, x, B, C, dt
    out_multiplier: float = 1.0

    roles = {
        "in_z": "gate: opens each channel of the output",
        "in_x": "values: what a token writes to the state",
        "in_B": "keys: where it writes",
        "in_C": "queries: where it reads",
        "in_dt": "each head's time step: how much it writes and forgets",
        "conv_x": "mixes values with those of the last few tokens",
        "conv_B": "mixes keys with those of the last few tokens",
        "conv_C": "mixes queries with those of the last few tokens",
        "dt_bias": "where a token's time step starts from",
        "A_log": "how fast the state forgets, as a logarithm",
        "D": "what passes by the state",
        "norm": "scale of the gated output",
        "o": "adds what was read from the state to the residual stream",
    }

    def __post_init__(self):
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_groups={self.num_groups}. "
                "Each group's keys and queries serve a whole number of heads."
            )

    def module(self, ctx: Context, name: str) -> nn.Module:
        return Mamba2Module(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """A row's last tokens before each convolution and its state [H, P, N]."""
        tail, heads, groups = (num_rows, self.conv_width - 1), self.num_heads, self.num_groups
        return {
            "conv_x": jnp.zeros((*tail, heads, self.head_dim), dtype),
            "conv_B": jnp.zeros((*tail, groups, self.state_dim), dtype),
            "conv_C": jnp.zeros((*tail, groups, self.state_dim), dtype),
            "ssm": jnp.zeros((num_rows, heads, self.head_dim, self.state_dim), jnp.float32),
        }

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {
            "conv_x": ("rows", None, "act_heads", None),
            "conv_B": ("rows", None, None, None),
            "conv_C": ("rows", None, None, None),
            "ssm": ("rows", "act_heads", None, None),
        }

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """Of the forward pass; the recurrence as if token by token."""
        inner = self.num_heads * self.head_dim
        projected = 3 * inner + 2 * self.num_groups * self.state_dim + self.num_heads
        return 2 * width * projected + 4 * inner * self.state_dim


class Mamba2Module(nn.Module):
    spec: Mamba2
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec = self.spec
        x_BTD, walk = begin(spec, x_BTD, info, cache)
        x_BTD = x_BTD * spec.in_multiplier
        heads, groups = (spec.num_heads, spec.head_dim), (spec.num_groups, spec.state_dim)
        z_BTHP = self._project("z", x_BTD, heads, ("heads", "head_dim"))
        x_BTHP = self._project("x", x_BTD, heads, ("heads", "head_dim"))
        k_BTGN = self._project("B", x_BTD, groups, (None, "head_dim"))
        q_BTGN = self._project("C", x_BTD, groups, (None, "head_dim"))
        dt_BTH = self._project("dt", x_BTD, (spec.num_heads,), ("heads",))

        state = {}
        x_BTHP = self._conv("conv_x", x_BTHP, ("heads", "head_dim"), walk, state)
        k_BTGN = self._conv("conv_B", k_BTGN, (None, "head_dim"), walk, state)
        q_BTGN = self._conv("conv_C", q_BTGN, (None, "head_dim"), walk, state)
        y_BTHP, state["ssm"] = self._scan(x_BTHP, k_BTGN, q_BTGN, dt_BTH, walk)
        y_BTHP = self._gate(y_BTHP, z_BTHP)
        y_BTD = linear_out(self, y_BTHP, ("heads", "head_dim"), spec.out_bias) * spec.out_multiplier
        return finish(y_BTD, state, walk, info, cache)

    def _project(
        self, name: str, x_BTD: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> jax.Array:
        y = linear(self, f"in_{name}", x_BTD, shape, axes, self.spec.in_bias)
        y = y * self.spec.multipliers[("z", "x", "B", "C", "dt").index(name)]
        head = "act_heads" if axes[0] == "heads" else None
        return constrain(y, self.ctx.rules, "batch", "length", head, *(None,) * (len(shape) - 1))

    def _conv(
        self, name: str, x_BTF: jax.Array, axes: tuple[str | None, ...], walk: Walk, state: dict
    ) -> jax.Array:
        K, shape = self.spec.conv_width, x_BTF.shape[2:]
        w_KF = param(self, self.ctx, name, (K, *shape), (None, *axes), fan_in_normal(K))
        y_BTF, state[name] = causal_conv(x_BTF, w_KF, walk.state[name], walk)
        if self.spec.conv_bias:
            y_BTF += param(self, self.ctx, f"{name}_bias", shape, axes, nn.initializers.zeros)
        return nn.silu(y_BTF)

    def _scan(self, x_BTHP, k_BTGN, q_BTGN, dt_BTH, walk: Walk) -> tuple[jax.Array, jax.Array]:
        spec, ctx, shape, axes = self.spec, self.ctx, (self.spec.num_heads,), ("heads",)
        start = inverse_softplus_of_log_uniform(1e-3, 1e-1)
        dt_bias_H = param32(self, ctx, "dt_bias", shape, axes, start)
        A_H = -jnp.exp(param32(self, ctx, "A_log", shape, axes, log_uniform(1.0, 16.0)))
        D_H = param32(self, ctx, "D", shape, axes, nn.initializers.ones)
        dt_BTH = jax.nn.softplus(dt_BTH.astype(jnp.float32) + dt_bias_H)
        dt_BTH = walk.only_real(jnp.clip(dt_BTH, spec.dt_min, spec.dt_max))
        x_BTHP = x_BTHP.astype(jnp.float32)
        y_BTHP, state_BHPN = ssd(
            x_BTHP * dt_BTH[..., None],
            A_H * dt_BTH,
            k_BTGN,
            q_BTGN,
            walk.first_BT,
            walk.state["ssm"],
            CHUNK,
            ctx.rules,
        )
        return y_BTHP + D_H[:, None] * x_BTHP, state_BHPN

    def _gate(self, y_BTHP: jax.Array, z_BTHP: jax.Array) -> jax.Array:
        """Float32 in, the dtype of the computation out."""
        spec, gate_BTHP = self.spec, nn.silu(z_BTHP.astype(jnp.float32))
        if not spec.norm_before_gate or spec.norm_eps is None:
            y_BTHP = y_BTHP * gate_BTHP
        if spec.norm_eps is not None:
            y_BTGF = y_BTHP.reshape(*y_BTHP.shape[:2], spec.num_groups, -1)
            y_BTGF *= jax.lax.rsqrt(jnp.mean(y_BTGF * y_BTGF, axis=-1, keepdims=True) + spec.norm_eps)
            heads, axes = (spec.num_heads, spec.head_dim), ("heads", "head_dim")
            y_BTHP = y_BTGF.reshape(y_BTHP.shape) * param32(
                self, self.ctx, "norm", heads, axes, nn.initializers.ones
            )
            if spec.norm_before_gate:
                y_BTHP = y_BTHP * gate_BTHP
        return y_BTHP.astype(self.ctx.dtype)

"""The Mamba-2 mixer: a selective state space model with one decay a head.

Dao and Gu 2024, arXiv:2405.21060. With the options of its descendants: multipliers (Falcon-H1), a clamped time step
(Nemotron-H, Zamba2), no norm before the output (Falcon-H1).
"""

# B batch, T tokens, D model width, H heads in G groups, P head width, N state width, K taps of the convolution
# F channels of all heads or groups side by side

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, TokenInfo, bias_param, fan_in_normal, param
from model.blocks.linear import Axes, add_bias, bias_of, linear_map, map_out
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
    log_uniform,
    param32,
)
from model.kernels.ssd import ssd
from model.sharding import constrain

Shape = tuple[int, ...]
HEADS, GROUPS = ("heads", "head_dim"), (None, "head_dim")


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
    norm_eps: float | None = 1e-5  # of the gated RMS norm of each group's channels; None: a gate without norm
    norm_before_gate: bool = False
    dt_min: float = 0.0  # the time step is clamped to [dt_min, dt_max]
    dt_max: float | None = None
    in_multiplier: float = 1.0
    # multiply z, x, B, C, dt
    multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
    out_multiplier: float = 1.0

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
        """FLOPs of the forward pass, with the recurrence run token by token."""
        inner = self.num_heads * self.head_dim
        projected = 3 * inner + 2 * self.num_groups * self.state_dim + self.num_heads
        return 2 * width * projected + 4 * inner * self.state_dim


class Mamba2Module(nn.Module):
    spec: Mamba2
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec = self.spec
        x_BTD, order = begin(spec, x_BTD, info, cache)
        x_BTD = x_BTD * spec.in_multiplier
        heads, groups = (spec.num_heads, spec.head_dim), (spec.num_groups, spec.state_dim)
        project = functools.partial(self._project, x_BTD)
        z_BTF = project("z", heads, HEADS, OUTPUT_GATE)
        x_BTF = project("x", heads, HEADS, "values: what a token writes to the state")
        k_BTF = project("B", groups, GROUPS, "keys: where it writes")
        q_BTF = project("C", groups, GROUPS, "queries: where it reads")
        time_step = "each head's time step: how much it writes and forgets"
        dt_BTH = project("dt", (spec.num_heads,), ("heads",), time_step)

        state = {}
        conv = functools.partial(self._conv, order, state)
        x_BTF = conv("conv_x", x_BTF, heads, HEADS, "mixes values over the last tokens")
        k_BTF = conv("conv_B", k_BTF, groups, GROUPS, "mixes keys over the last tokens")
        q_BTF = conv("conv_C", q_BTF, groups, GROUPS, "mixes queries over the last tokens")
        y_BTF, state["ssm"] = self._scan(x_BTF, k_BTF, q_BTF, dt_BTH, order)
        y_BTF = self._gate(y_BTF, z_BTF)
        y_BTD = map_out(self, heads, HEADS, READ_OUT).flat(y_BTF)
        y_BTD = add_bias(self, "o", y_BTD, ("embed",)) if spec.out_bias else y_BTD
        return finish(y_BTD * spec.out_multiplier, state, order, info, cache)

    def _project(self, x_BTD: jax.Array, name: str, shape: Shape, axes: Axes, role: str) -> jax.Array:
        y_BTF = linear_map(self, f"in_{name}", x_BTD.shape[2:], shape, ("embed", *axes), role).flat(x_BTD)
        if self.spec.in_bias:
            y_BTF += bias_of(self, f"in_{name}", shape, axes).reshape(-1)
        y_BTF *= self.spec.multipliers[("z", "x", "B", "C", "dt").index(name)]
        return constrain(
            y_BTF, self.ctx.rules, "batch", "length", "act_heads" if axes[0] == "heads" else None
        )

    def _conv(
        self,
        order: SegmentOrder,
        state: dict,
        name: str,
        x_BTF: jax.Array,
        shape: Shape,
        axes: Axes,
        role: str,
    ) -> jax.Array:
        K = self.spec.conv_width
        w_KF = param(self, self.ctx, name, (K, *shape), (None, *axes), fan_in_normal(K), role=role).reshape(
            K, -1
        )
        tail_BKF = order.state[name].reshape(x_BTF.shape[0], K - 1, x_BTF.shape[2])
        y_BTF, tail_BKF = causal_conv(x_BTF, w_KF, tail_BKF, order)
        state[name] = tail_BKF.reshape(*tail_BKF.shape[:2], *shape)
        if self.spec.conv_bias:
            y_BTF += bias_param(self, self.ctx, f"{name}_bias", shape, axes).reshape(-1)
        return nn.silu(y_BTF)

    def _scan(self, x_BTF, k_BTF, q_BTF, dt_BTH, order: SegmentOrder) -> tuple[jax.Array, jax.Array]:
        spec, ctx, shape, axes = self.spec, self.ctx, (self.spec.num_heads,), ("heads",)
        B, T, F = x_BTF.shape
        start = inverse_softplus_of_log_uniform(1e-3, 1e-1)
        dt_bias_H = param32(self, ctx, "dt_bias", shape, axes, start, TIME_STEP)
        A_H = -jnp.exp(param32(self, ctx, "A_log", shape, axes, log_uniform(1.0, 16.0), FORGETTING))
        D_H = param32(self, ctx, "D", shape, axes, nn.initializers.ones, "what passes by the state")
        dt_BTH = jax.nn.softplus(dt_BTH.astype(jnp.float32) + dt_bias_H)
        dt_BTH = order.only_real(jnp.clip(dt_BTH, spec.dt_min, spec.dt_max))
        y_BTHP, state_BHPN = ssd(
            x_BTF.reshape(B, T, spec.num_heads, spec.head_dim),
            A_H * dt_BTH,
            k_BTF.reshape(B, T, spec.num_groups, spec.state_dim),
            q_BTF.reshape(B, T, spec.num_groups, spec.state_dim),
            order.first_BT,
            order.state["ssm"],
            rules=ctx.rules,
            scale_BTH=dt_BTH,
        )
        passed_BTF = jnp.repeat(D_H, spec.head_dim) * x_BTF.astype(jnp.float32)
        return y_BTHP.reshape(B, T, F) + passed_BTF, state_BHPN

    def _gate(self, y_BTF: jax.Array, z_BTF: jax.Array) -> jax.Array:
        """float32 input, output in `ctx.dtype`."""
        spec, gate_BTF = self.spec, nn.silu(z_BTF.astype(jnp.float32))
        if not spec.norm_before_gate or spec.norm_eps is None:
            y_BTF = y_BTF * gate_BTF
        if spec.norm_eps is not None:
            y_BTGF = y_BTF.reshape(*y_BTF.shape[:2], spec.num_groups, -1)
            y_BTGF *= jax.lax.rsqrt(jnp.mean(y_BTGF * y_BTGF, axis=-1, keepdims=True) + spec.norm_eps)
            declared = y_BTF.shape[2:], ("heads",), nn.initializers.ones
            scale_F = param32(self, self.ctx, "norm", *declared, "scale of the gated output")
            y_BTF = y_BTGF.reshape(y_BTF.shape) * scale_F
            if spec.norm_before_gate:
                y_BTF = y_BTF * gate_BTF
        return y_BTF.astype(self.ctx.dtype)

"""The two mixers of RWKV-7 "Goose": time mixing and channel mixing; both have a token shift, which needs a state.

Peng et al. 2025, arXiv:2503.14456. Each is a mixer of its own; a layer of the paper is two residual steps.
"""

# B batch, T tokens, D model width, H heads, C head width, F feed-forward width

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Carry, Context, Report, TokenInfo, bias_param, fan_in_normal, param
from model.blocks.linear import linear, linear_map, linear_out
from model.blocks.recurrence import HEAD_NORM, READ_OUT, SegmentOrder, begin, causal_conv, finish, param32
from model.kernels.rwkv7 import rwkv7
from model.sharding import constrain

HEADS = ("heads", "head_dim")
FASTEST = -math.exp(-0.5)  # lower bound of a channel's log decay; the upper bound is 0


@dataclasses.dataclass(frozen=True)
class RWKV7:
    """Decay, learning rate, gate and value mix of a token are maps of low rank.

    With `first`, the module shares its values with later blocks through the carry.
    """

    num_heads: int
    head_dim: int
    decay_rank: int
    rate_rank: int  # of the in-context learning rate "a"
    gate_rank: int
    value_rank: int
    first: bool = False
    norm_eps: float = 64e-5  # of the norm of each head's output

    def module(self, ctx: Context, name: str) -> nn.Module:
        return RWKV7Module(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """A row's last token [D] and its state [H, C, C]."""
        state = (num_rows, self.num_heads, self.head_dim, self.head_dim)
        return {
            "shift": jnp.zeros((num_rows, 1, self.num_heads * self.head_dim), dtype),
            "state": jnp.zeros(state, jnp.float32),
        }

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {"shift": ("rows", None, None), "state": ("rows", "act_heads", None, None)}

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass, with the recurrence run token by token."""
        ranks = self.decay_rank + self.rate_rank + self.gate_rank + (0 if self.first else self.value_rank)
        return 2 * (4 * width * width + 2 * width * ranks) + 8 * width * self.head_dim


# The use of each mix with the previous token.
SHIFTS = {
    "r": "for the reading",
    "w": "for the decay",
    "k": "for the key",
    "v": "for the value",
    "a": "for the rate",
    "g": "for the gate",
}
# For each low-rank map: its output, the role of its second factor, the role of its bias.
LOW_RANKS = {
    "w": ("decay", "how much each channel keeps", "where the decay starts from"),
    "a": ("rate", "how much of the state is replaced", "where the rate starts from"),
    "v": (
        "share of the first layer's values",
        "the share of the first layer's values",
        "where that share starts from",
    ),
    "g": ("gate", "the gate of each channel of the output", ""),
}


class RWKV7Module(nn.Module):
    spec: RWKV7
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, ctx, state = self.spec, self.ctx, {}
        if spec.num_heads * spec.head_dim != ctx.width:
            raise ValueError(
                f"RWKV-7's heads fill the model's width: num_heads={spec.num_heads} times head_dim={spec.head_dim} "
                f"is not {ctx.width}."
            )
        x_BTD, order = begin(spec, x_BTD, info, cache)
        mixed, state["shift"] = _token_shift(self, ctx, x_BTD, SHIFTS, order)
        r_BTHC = self._project("r", mixed["r"], "receptance: where a token reads the state")
        k_BTHC = self._project("k", mixed["k"], "keys: where it writes")
        v_BTHC = self._project("v", mixed["v"], "values: what it writes")
        carry = Carry(first_values=v_BTHC) if spec.first else Carry()
        if not spec.first:
            if info.carry.first_values is None:
                raise ValueError("RWKV7(first=False), but no RWKV7(first=True) comes before it.")
            mix_BTHC = jax.nn.sigmoid(self._low_rank("v", mixed["v"], spec.value_rank, 0.73))
            v_BTHC += (info.carry.first_values - v_BTHC) * mix_BTHC
        decay_BTHC = self._low_rank("w", mixed["w"], spec.decay_rank, _slow_to_fast, jnp.tanh)
        log_decay_BTHC = FASTEST * jax.nn.sigmoid(decay_BTHC.astype(jnp.float32))
        rate_BTHC = jax.nn.sigmoid(self._low_rank("a", mixed["a"], spec.rate_rank, -0.19).astype(jnp.float32))
        gate_BTHC = self._low_rank("g", mixed["g"], spec.gate_rank, None, jax.nn.sigmoid)

        k_BTHC = k_BTHC.astype(jnp.float32)
        erase_BTHC = order.only_real(
            _unit(k_BTHC * self._channels("k_k", 0.71, "scale of the key that erases"))
        )
        weaken_HC = self._channels("k_a", 1.02, "how much the learning rate weakens the written key")
        k_BTHC = k_BTHC * (1 + (rate_BTHC - 1) * weaken_HC)
        o_BTHC, state["state"] = rwkv7(
            r_BTHC,
            order.only_real(log_decay_BTHC),
            order.only_real(k_BTHC),
            v_BTHC,
            -erase_BTHC,
            erase_BTHC * rate_BTHC,
            order.first_BT,
            order.state["state"],
        )
        own_HC = self._channels("r_k", -0.04, "how much of its own value a token reads")
        own_BTH1 = jnp.sum(r_BTHC * k_BTHC * own_HC, axis=-1, keepdims=True)
        y_BTHC = (self._norm(o_BTHC) + own_BTH1 * v_BTHC.astype(jnp.float32)).astype(ctx.dtype) * gate_BTHC
        y_BTD, cache = finish(linear_out(self, y_BTHC, HEADS, READ_OUT), state, order, info, cache)
        return y_BTD, cache, Report(carry=carry)

    def _project(self, name: str, x_BTD: jax.Array, role: str) -> jax.Array:
        heads = (self.spec.num_heads, self.spec.head_dim)
        y_BTHC = linear(self, name, x_BTD, heads, HEADS, role)
        return constrain(y_BTHC, self.ctx.rules, "batch", "length", "act_heads", None)

    def _low_rank(self, name: str, x_BTD: jax.Array, rank: int, bias, between=None) -> jax.Array:
        """between(x `name`_a) `name`_b + `name`_bias; `bias` is the bias's initial value, None for no bias."""
        heads, small = (self.spec.num_heads, self.spec.head_dim), fan_in_normal(rank, 0.1)
        (of, to, from_), zeros = LOW_RANKS[name], nn.initializers.zeros
        down, up = f"the token to the low rank of its {of}", f"the low rank to {to}"
        low_BTR = linear_map(self, f"{name}_a", x_BTD.shape[2:], (rank,), ("embed", None), down, zeros)(x_BTD)
        low_BTR = low_BTR if between is None else between(low_BTR)
        y_BTHC = linear_map(self, f"{name}_b", (rank,), heads, (None, *HEADS), up, small)(low_BTR)
        if bias is not None:
            start = bias if callable(bias) else nn.initializers.constant(bias)
            y_BTHC += bias_param(self, self.ctx, f"{name}_bias", heads, HEADS, start, from_)
        return y_BTHC

    def _channels(self, name: str, start: float, role: str) -> jax.Array:
        heads = (self.spec.num_heads, self.spec.head_dim)
        return param32(self, self.ctx, name, heads, HEADS, nn.initializers.constant(start), role)

    def _norm(self, o_BTHC: jax.Array) -> jax.Array:
        """Layer norm of each head."""
        o_BTHC = o_BTHC - jnp.mean(o_BTHC, axis=-1, keepdims=True)
        o_BTHC *= jax.lax.rsqrt(jnp.mean(o_BTHC * o_BTHC, axis=-1, keepdims=True) + self.spec.norm_eps)
        return o_BTHC * self._channels("norm", 1.0, HEAD_NORM) + self._channels(
            "norm_bias", 0.0, "bias of norm"
        )


@dataclasses.dataclass(frozen=True)
class RWKV7ChannelMix:
    """value(relu(key(x mixed with the previous token))^2): a feed-forward network with a token shift."""

    width: int
    model_width: int  # of the token in a row's state

    def module(self, ctx: Context, name: str) -> nn.Module:
        return RWKV7ChannelMixModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """A row's last token."""
        return {"shift": jnp.zeros((num_rows, 1, self.model_width), dtype)}

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {"shift": ("rows", None, None)}

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass."""
        return 2 * 2 * width * self.width


class RWKV7ChannelMixModule(nn.Module):
    spec: RWKV7ChannelMix
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        ctx = self.ctx
        x_BTD, order = begin(self.spec, x_BTD, info, cache)
        mixed, tail = _token_shift(self, ctx, x_BTD, {"k": ""}, order)
        role = "value of each feature"
        h_BTF = jnp.square(nn.relu(linear(self, "k", mixed["k"], (self.spec.width,), ("mlp",), role)))
        h_BTF = constrain(h_BTF, ctx.rules, "batch", "length", "act_mlp")
        y_BTD = linear_out(self, h_BTF, ("mlp",), "adds the activated features to the residual stream")
        return finish(y_BTD, {"shift": tail}, order, info, cache)


def _token_shift(
    module: nn.Module, ctx: Context, x_BTD: jax.Array, shifts: dict[str, str], order: SegmentOrder
) -> tuple[dict[str, jax.Array], jax.Array]:
    """(for each name of `shifts`, x mixed with the previous token by the shares "x_`name`" [D]; the new last token)."""
    before_BTD, tail = causal_conv(x_BTD, jnp.array([[1.0], [0.0]]), order.state["shift"], order)
    delta_BTD, D = before_BTD - x_BTD, x_BTD.shape[-1]
    start = lambda key, shape, dtype: (1 - jnp.sqrt(jnp.arange(D) / D)).astype(dtype)
    mixed = {}
    for name, purpose in shifts.items():
        role = f"how much of the previous token is mixed in {purpose}".rstrip()
        mixed[name] = x_BTD + delta_BTD * param(module, ctx, f"x_{name}", (D,), ("norm",), start, 0, role)
    return mixed, tail


def _unit(x_BTHC: jax.Array) -> jax.Array:
    square_BTH1 = jnp.sum(x_BTHC * x_BTHC, axis=-1, keepdims=True)
    return x_BTHC * jax.lax.rsqrt(jnp.maximum(square_BTH1, 1e-24))


def _slow_to_fast(key, shape: tuple[int, ...], dtype) -> jax.Array:
    """The decay's bias: from channels with long memory to channels with short memory."""
    ramp = jnp.linspace(0.0, 1.0, math.prod(shape)).reshape(shape)
    return (-5.5 + 6 * ramp**1.5).astype(dtype)

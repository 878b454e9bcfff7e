"""The computation of a mixture's experts, and how tokens get to them and back.

`dropless` sorts tokens by expert and multiplies ragged groups (Gale et al. 2022, arXiv:2211.15841). `through_slots`
gives every expert the same number of slots in each row, so that shapes are static and split over devices; who gets
one is decided by `capacity_slots` (Lepikhin et al. 2020, arXiv:2006.16668) or `expert_choice_slots`.
"""

# B batch, T tokens, D model width, F feed-forward width, E experts, K experts of a token, S slots of an expert
# N = B * T tokens, M = N * K pairs of a token and one of its experts

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, fan_in_normal, param
from model.blocks.ffn import ACTIVATIONS, MLP, GatedMLP
from model.kernels.grouped_matmul import grouped_matmul
from model.sharding import ShardingRules, constrain

# of x, weights [E, in, out] and biases [E, out]
Linear = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU:
    """down((up(x) + 1) * g * sigmoid(alpha * g)), g = gate(x), both cut at `limit`: the experts of gpt-oss."""

    width: int
    limit: float = 7.0
    alpha: float = 1.702
    bias: bool = True

    roles = {
        "gate": "what opens each feature",
        "up": "value of each feature",
        "down": "adds the open features to the residual stream",
    }

    def flops_per_token(self, width: int) -> float:
        """Of the forward pass."""
        return 2 * 3 * width * self.width


Expert = GatedMLP | MLP | ClampedSwiGLU


class Experts(nn.Module):
    """`num_experts` feed-forward networks with stacked parameters: gate, up [E, D, F] and down [E, F, D]."""

    spec: Expert
    num_experts: int
    ctx: Context

    @nn.compact
    def __call__(self, x: jax.Array, linear: Linear) -> jax.Array:
        """Apply the experts to `x`, whose rows `linear` brings to their own experts' parameters."""
        spec, width, depth = self.spec, self.ctx.width, self.ctx.num_blocks
        up = self._linear(linear, "up", x, (width, spec.width), ("embed", "mlp"))
        if isinstance(spec, MLP):
            h = ACTIVATIONS[spec.activation](up)
        else:
            gate = self._linear(linear, "gate", x, (width, spec.width), ("embed", "mlp"))
            h = _clamped(spec, gate, up) if isinstance(spec, ClampedSwiGLU) else _gated(spec, gate, up)
        y = self._linear(linear, "down", h, (spec.width, width), ("mlp", "embed"), (2 * depth) ** -0.5)
        return y * spec.down_scale if isinstance(spec, GatedMLP) else y

    def _linear(self, linear: Linear, name: str, x, sizes, axes, scale: float = 1.0) -> jax.Array:
        E, bias = self.num_experts, None
        weights = param(self, self.ctx, name, (E, *sizes), ("experts", *axes), fan_in_normal(sizes[0], scale))
        if self.spec.bias:
            bias_axes = ("experts", "mlp" if axes[1] == "mlp" else "norm")
            bias = param(self, self.ctx, f"{name}_bias", (E, sizes[1]), bias_axes, nn.initializers.zeros)
        return linear(x, weights, bias)


def _gated(spec: GatedMLP, gate: jax.Array, up: jax.Array) -> jax.Array:
    return ACTIVATIONS[spec.activation](gate * spec.gate_scale) * up


def _clamped(spec: ClampedSwiGLU, gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
    return (up + 1) * gate * nn.sigmoid(spec.alpha * gate)


def dropless(
    experts: Experts, x_BTD: jax.Array, chosen_BTK: jax.Array, weights_BTK: jax.Array, weigh_input: bool
) -> jax.Array:
    """Every token through all the experts that it chose, however many chose the same; float32."""
    B, T, D = x_BTD.shape
    K = chosen_BTK.shape[-1]
    expert_M = chosen_BTK.reshape(-1)
    order_M = jnp.argsort(expert_M)
    sorted_M = expert_M[order_M]
    sizes_E = jnp.bincount(expert_M, length=experts.num_experts)

    def linear(x, weights, bias):
        y = grouped_matmul(x, weights, sizes_E)
        return y if bias is None else y + bias[sorted_M]

    x_MD = x_BTD.reshape(B * T, D)[order_M // K]
    if weigh_input:
        x_MD = (x_MD * weights_BTK.reshape(-1)[order_M, None]).astype(x_BTD.dtype)
    y_MD = experts(x_MD, linear)[jnp.argsort(order_M)].astype(jnp.float32)
    y_BTKD = y_MD.reshape(B, T, K, D)
    return y_BTKD.sum(2) if weigh_input else jnp.einsum("BTKD,BTK->BTD", y_BTKD, weights_BTK)


def through_slots(
    experts: Experts,
    x_BTD: jax.Array,
    slots_BTES: jax.Array,
    weights_BTE: jax.Array,
    weigh_input: bool,
    rules: ShardingRules | None,
) -> jax.Array:
    """Tokens through the slots that they hold, summed over their experts; float32, 0 for tokens without a slot.

    Args:
      slots_BTES: bool, slot s of expert e in row b holds token t.
      weights_BTE: float32.
    """

    def linear(x_EBSI, weights_EIO, bias_EO):
        y_EBSO = jnp.einsum("EBSI,EIO->EBSO", x_EBSI, weights_EIO)
        return y_EBSO if bias_EO is None else y_EBSO + bias_EO[:, None, None]

    slots_BTES = slots_BTES.astype(jnp.float32)
    weighted_BTES = slots_BTES * weights_BTE[..., None]
    into, out = (weighted_BTES, slots_BTES) if weigh_input else (slots_BTES, weighted_BTES)
    x_EBSD = jnp.einsum("BTES,BTD->EBSD", into.astype(x_BTD.dtype), x_BTD)
    x_EBSD = constrain(x_EBSD, rules, "act_experts", "batch", None, "act_embed")
    y_EBSD = constrain(experts(x_EBSD, linear), rules, "act_experts", "batch", None, "act_embed")
    return jnp.einsum("BTES,EBSD->BTD", out, y_EBSD, preferred_element_type=jnp.float32)


def capacity_slots(
    chosen_BTK: jax.Array, weights_BTK: jax.Array, real_BT: jax.Array, num_experts: int, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """(slots [B, T, E, S] bool, weights [B, T, E] float32) with S = capacity slots an expert in each row.

    All tokens' first choices are served before any second choice, earlier tokens first; what finds its expert full
    is dropped. So a token may lose a place to a later one, and rows of another length drop others: train with it,
    sample with `dropless`.
    """
    B, T, K = chosen_BTK.shape
    wanted_BTKE = jax.nn.one_hot(chosen_BTK, num_experts, dtype=jnp.int32) * real_BT[:, :, None, None]
    queue_BQE = wanted_BTKE.swapaxes(1, 2).reshape(B, K * T, num_experts)
    place_BQE = jnp.cumsum(queue_BQE, axis=1) - queue_BQE
    place_BTKE = place_BQE.reshape(B, K, T, num_experts).swapaxes(1, 2)
    place_BTE = jnp.sum(place_BTKE * wanted_BTKE, axis=2)
    held_BTE = wanted_BTKE.any(2)
    slots_BTES = held_BTE[..., None] & (place_BTE[..., None] == jnp.arange(capacity))
    return slots_BTES, jnp.einsum("BTKE,BTK->BTE", wanted_BTKE, weights_BTK)


def expert_choice_slots(
    tokens_BES: jax.Array, weights_BES: jax.Array, real_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(slots [B, T, E, S] bool, weights [B, T, E] float32) of experts that chose their tokens."""
    T = real_BT.shape[1]
    slots_BTES = (tokens_BES[:, None] == jnp.arange(T)[None, :, None, None]) & real_BT[:, :, None, None]
    return slots_BTES, jnp.einsum("BTES,BES->BTE", slots_BTES, weights_BES)

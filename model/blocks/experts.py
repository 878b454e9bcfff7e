"""The experts of an MoE, and the dispatch of tokens to them.

`dropless` sorts tokens by expert and multiplies ragged groups (Gale et al. 2022, arXiv:2211.15841). `through_slots`
gives every expert the same number of slots in each row, so that shapes are static and split over devices;
`capacity_slots` (Lepikhin et al. 2020, arXiv:2006.16668) or `expert_choice_slots` assigns the slots.
"""

# B batch, T tokens, D model width, F feed-forward width, E experts, K experts of a token, S slots of an expert
# N = B * T tokens, M = N * K pairs of a token and one of its experts

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.blocks.common import Context, bias_param, fan_in_normal, weight_param
from model.blocks.ffn import ACTIVATIONS, DOWN, GATE, MLP, UP, GatedMLP
from model.blocks.linear import adapters_of
from model.blocks.lora import LoRA
from model.kernels.grouped_matmul.dispatch import Places, from_rows, sorted_by, to_rows
from model.kernels.grouped_matmul.sharded import (
    Split,
    first_part_on_mesh,
    split_of,
    spread_on_mesh,
)
from model.kernels.order import recompute
from model.sharding import ShardingRules, constrain
from model.weights import Weight, grouped_product, matmul


class Layout(NamedTuple):
    """The products of rows of tokens with the parameters of their experts."""

    # (rows, weights [E, in, out], logical names of the last two axes) -> rows
    multiply: Callable[[jax.Array, Weight, tuple[str | None, str | None]], jax.Array]
    spread: Callable[[jax.Array, str], jax.Array]  # a bias [E, out] -> an array to add to the rows
    once: Callable[[jax.Array], jax.Array]  # adds to rows that may be partial sums: only to one part
    adapter: jax.Array | None  # int32, each row's adapter, one column; None: the first for all


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU:
    """down((up(x) + 1) * g * sigmoid(alpha * g)), g = gate(x), both clipped at `limit`: the experts of gpt-oss."""

    width: int
    limit: float = 7.0
    alpha: float = 1.702
    bias: bool = True

    def flops_per_token(self, width: int) -> float:
        """FLOPs of the forward pass."""
        return 2 * 3 * width * self.width


Expert = GatedMLP | MLP | ClampedSwiGLU


class Experts(nn.Module):
    """`num_experts` feed-forward networks with stacked parameters: gate, up [E, D, F] and down [E, F, D]."""

    spec: Expert
    num_experts: int
    ctx: Context

    @nn.compact
    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Apply the experts to the rows of `x`."""
        spec, width, depth = self.spec, self.ctx.width, self.ctx.num_blocks
        up = self._linear(layout, "up", x, (width, spec.width), ("embed", "mlp"), UP)
        if isinstance(spec, MLP):
            h = recompute(ACTIVATIONS[spec.activation])(up)
        else:
            gate = self._linear(layout, "gate", x, (width, spec.width), ("embed", "mlp"), GATE)
            activate = functools.partial(_clamped if isinstance(spec, ClampedSwiGLU) else _gated, spec)
            h = recompute(lambda gate_and_up: activate(*gate_and_up))((gate, up))
        y = self._linear(layout, "down", h, (spec.width, width), ("mlp", "embed"), DOWN, (2 * depth) ** -0.5)
        return y * spec.down_scale if isinstance(spec, GatedMLP) else y

    def _linear(self, layout: Layout, name: str, x, sizes, axes, role: str, scale: float = 1.0) -> jax.Array:
        E, axes, init = self.num_experts, ("experts", *axes), fan_in_normal(sizes[0], scale)
        weights = weight_param(self, self.ctx, name, (E, *sizes), axes, init, 1, f"in each expert: {role}")
        y = layout.multiply(x, weights, axes[1:])
        adapters = adapters_of(self, name, weights, 1, axes, experts=1)
        if adapters is not None:
            y = self._adapted(layout, axes[1:], x, y, *adapters)
        if self.spec.bias:
            bias_axes = ("experts", "mlp" if axes[-1] == "mlp" else "norm")
            bias = bias_param(self, self.ctx, f"{name}_bias", (E, sizes[1]), bias_axes)
            bias_of_rows = layout.spread(bias, bias_axes[1])
            y += layout.once(bias_of_rows) if axes[1] == "mlp" else bias_of_rows
        return y

    def _adapted(self, layout: Layout, names: tuple[str, str], x, y, a_ENIR, b_ENRO, gain_ENO) -> jax.Array:
        """y of the map plus each row's adapter; the rows of one expert may have different adapters."""
        adapters = cast(LoRA, self.ctx.adapters)
        result = y
        for n in range(1 if layout.adapter is None else adapters.slots):
            inner = layout.multiply(x, a_ENIR[:, n], (names[0], None))
            low_rank = layout.multiply(inner, b_ENRO[:, n] * adapters.scale, (None, names[1]))
            adapted = y + low_rank.astype(y.dtype)
            if gain_ENO is not None:
                adapted *= layout.spread(gain_ENO[:, n], names[1])
            result = adapted if layout.adapter is None else jnp.where(layout.adapter == n, adapted, result)
        return result


def _gated(spec: GatedMLP, gate: jax.Array, up: jax.Array) -> jax.Array:
    return ACTIVATIONS[spec.activation](gate * spec.gate_scale) * up


def _clamped(spec: ClampedSwiGLU, gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
    return (up + 1) * gate * nn.sigmoid(spec.alpha * gate)


def dropless(
    experts: Experts, x_BTD: jax.Array, chosen_BTK: jax.Array, weights_BTK: jax.Array, weigh_input: bool
) -> jax.Array:
    """The weighted sum of each token's experts, float32; no token is dropped."""
    split = split_of(experts.ctx.rules, *x_BTD.shape[:2])
    tokens, rows = split.tokens, split.rows
    adapter_B = experts.ctx.adapter
    sort = split.run(
        functools.partial(_sorted_rows, split, experts.num_experts, weigh_input),
        (tokens, tokens, tokens, PartitionSpec(split.batch)),
        rows,
    )
    sorted_ = sort(x_BTD, chosen_BTK, weights_BTK, adapter_B)
    layout = Layout(
        lambda x, weights_EIO, names: grouped_product(split, x, weights_EIO, sorted_.sizes_E, names),
        lambda vectors_EO, name: spread_on_mesh(split, vectors_EO, sorted_.expert_M, name),
        functools.partial(first_part_on_mesh, split),
        sorted_.adapter_M1,
    )
    add_up = functools.partial(_added_up, split, experts.num_experts, weigh_input)
    y_MD = experts(sorted_.x_MD, layout)
    parts = PartitionSpec(split.parts, *tokens)
    found_PBTD = split.run(add_up, (rows, rows, tokens, tokens), parts)(
        y_MD, sorted_.places, chosen_BTK, weights_BTK
    )
    return found_PBTD.sum(0).astype(jnp.float32)


class Rows(NamedTuple):
    """Pairs of a token and an expert, sorted by expert; on a mesh, those of one device."""

    x_MD: jax.Array
    expert_M: jax.Array  # counted from the device's first expert; pairs of other devices' experts come last
    places: Places
    sizes_E: jax.Array  # for the device's experts
    adapter_M1: jax.Array | None


def _sorted_rows(
    split: Split, num_experts: int, weigh_input: bool, x_BTD, chosen_BTK, weights_BTK, adapter_B
) -> Rows:
    B, T, D = x_BTD.shape
    count = split.experts_here(num_experts)[1]
    own_BTK, is_own_BTK = _own(split, num_experts, chosen_BTK)
    expert_M = jnp.where(is_own_BTK, own_BTK, count).reshape(-1)
    places = sorted_by(expert_M)
    x_MD = to_rows(x_BTD.reshape(B * T, D), places)
    if weigh_input:
        x_MD = (x_MD * weights_BTK.reshape(-1)[places.pair_M, None]).astype(x_BTD.dtype)
    adapter_M = None if adapter_B is None else jnp.repeat(adapter_B, expert_M.size // B)[places.pair_M]
    sizes_E = jnp.bincount(expert_M, length=count + 1)[:count]
    adapter_M1 = None if adapter_M is None else adapter_M[:, None]
    return Rows(x_MD, expert_M[places.pair_M], places, sizes_E, adapter_M1)


def _added_up(split: Split, num_experts: int, weigh_input: bool, y_MD, places, chosen_BTK, weights_BTK):
    """[1, B, T, D]: the sum of this device's experts for each token; a partial sum has the dtype of `y`."""
    B, T, K = chosen_BTK.shape
    weights_BTK = jnp.ones_like(weights_BTK) if weigh_input else weights_BTK
    if split.experts:
        weights_BTK = jnp.where(_own(split, num_experts, chosen_BTK)[1], weights_BTK, 0)
    y_BTD = from_rows(y_MD, weights_BTK.reshape(B * T, K), places).reshape(1, B, T, -1)
    return y_BTD.astype(y_MD.dtype) if split.parts else y_BTD


def _own(split: Split, num_experts: int, chosen_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(experts counted from the device's first, whether the device has each)."""
    first, count = split.experts_here(num_experts)
    own_BTK = chosen_BTK - first
    return own_BTK, (own_BTK >= 0) & (own_BTK < count)


def through_slots(
    experts: Experts,
    x_BTD: jax.Array,
    slots_BTES: jax.Array,
    weights_BTE: jax.Array,
    weigh_input: bool,
    rules: ShardingRules | None,
) -> jax.Array:
    """The weighted sum of experts over each token's slots, float32; 0 for tokens without a slot.

    Args:
      slots_BTES: bool, slot s of expert e in row b holds token t.
      weights_BTE: float32.
    """

    adapter_B = experts.ctx.adapter
    layout = Layout(
        lambda x_EBSI, weights_EIO, names: matmul(x_EBSI, weights_EIO, "EBSI,EIO->EBSO"),
        lambda vectors_EO, name: vectors_EO[:, None, None],
        lambda y: y,
        None if adapter_B is None else adapter_B[:, None, None],
    )
    slots_BTES = slots_BTES.astype(jnp.float32)
    weighted_BTES = slots_BTES * weights_BTE[..., None]
    into, out = (weighted_BTES, slots_BTES) if weigh_input else (slots_BTES, weighted_BTES)
    x_EBSD = jnp.einsum("BTES,BTD->EBSD", into.astype(x_BTD.dtype), x_BTD)
    x_EBSD = constrain(x_EBSD, rules, "act_experts", "batch", None, "act_embed")
    y_EBSD = constrain(experts(x_EBSD, layout), rules, "act_experts", "batch", None, "act_embed")
    return jnp.einsum("BTES,EBSD->BTD", out, y_EBSD, preferred_element_type=jnp.float32)


def capacity_slots(
    chosen_BTK: jax.Array, weights_BTK: jax.Array, real_BT: jax.Array, num_experts: int, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """(slots [B, T, E, S] bool, weights [B, T, E] float32) with S = capacity slots an expert in each row.

    First choices of all tokens come before second choices, and earlier tokens before later ones; choices of a full
    expert are dropped. A token may lose a slot to a later one, and the choice depends on the row's length, so sampling
    needs `dropless`.
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
    """(slots [B, T, E, S] bool, weights [B, T, E] float32) for experts that choose their tokens."""
    T = real_BT.shape[1]
    slots_BTES = (tokens_BES[:, None] == jnp.arange(T)[None, :, None, None]) & real_BT[:, :, None, None]
    return slots_BTES, jnp.einsum("BTES,BES->BTE", slots_BTES, weights_BES)

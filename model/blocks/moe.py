"""Mixture of experts (MoE): a feed-forward part with many networks, of which each token uses some.

Shazeer et al. 2017, arXiv:1701.06538; load-balance loss: Fedus et al. 2021, arXiv:2101.03961; router z-loss: Zoph et
al. 2022, arXiv:2202.08906; balancing without a loss: Wang et al. 2024, arXiv:2408.15664; shared experts: Dai et al.
2024, arXiv:2401.06066. Routing is in router.py, computation in experts.py.
"""

# B batch, T tokens, D model width, E experts, K experts of a token

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.balance import Over, balance_of_tokens, token_weights
from model.blocks.common import Context, TokenInfo, bias_param, fan_in_normal, in_float32, param
from model.blocks.experts import (
    Expert,
    Experts,
    capacity_slots,
    dropless,
    expert_choice_slots,
    through_slots,
)
from model.blocks.ffn import MLP, GatedMLP
from model.blocks.linear import linear
from model.blocks.router import ExpertChoice, Router, SparseMixer
from model.weighted import WeightedSum

DISPATCH = ("dropless", "capacity")


@dataclasses.dataclass(frozen=True)
class MoE:
    """Each token uses `experts_per_token` of `num_experts` networks, and the `shared` one if there is one.

    The loss coefficients multiply the mean over the model's MoE layers, as in Hugging Face and MegaBlocks.
    """

    num_experts: int
    experts_per_token: int  # with `ExpertChoice`: the mean
    expert: Expert
    router: Router | SparseMixer | ExpertChoice = Router()
    shared: GatedMLP | MLP | None = None
    shared_gate: bool = False  # multiply the shared expert's output by sigmoid(x @ shared_gate)
    weigh_input: bool = False  # Llama 4: weights multiply an expert's input, not its output
    # "capacity": in training, tokens of a row beyond an expert's slots are dropped
    dispatch: str = "dropless"
    capacity_factor: float = 1.25  # slots, relative to an even load
    balance_loss: float = 0.0  # coefficient of the load-balance loss
    # "batch" balances a whole batch, which is not the sum of its microbatches' losses
    balance_over: Over = "document"
    z_loss: float = 0.0  # coefficient of the mean squared log-normalizer of the router's logits
    balance_rate: float = 0.0  # balancing without a loss: the step size of each expert's `choice_bias`

    def __post_init__(self):
        for name in ("num_experts", "experts_per_token", "expert", "router"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}=None: a mixture of experts needs it.")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is not in 1 to num_experts={self.num_experts}."
            )
        if self.dispatch not in DISPATCH:
            raise ValueError(f"dispatch={self.dispatch!r} is not one of {', '.join(DISPATCH)}.")
        if self.balance_rate and not self.has_choice_bias:
            raise ValueError("balance_rate moves the router's choice_bias: use Router(choice_bias=True).")
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate=True gates a shared expert, and there is none.")
        self.router.check(self.num_experts, self.experts_per_token)

    def module(self, ctx: Context, name: str) -> nn.Module:
        return MoEModule(self, ctx, name=name)

    def flops_per_token(self, width: int) -> float:
        """FLOPs of the forward pass: the chosen experts, the shared one, the router."""
        shared = self.shared.flops_per_token(width) if self.shared is not None else 0
        routing = 2 * width * (self.num_experts + self.shared_gate)
        return self.experts_per_token * self.expert.flops_per_token(width) + shared + routing

    @property
    def has_choice_bias(self) -> bool:
        return isinstance(self.router, Router) and self.router.choice_bias

    def active_share(self, path: str) -> float:
        """The share of a parameter that one token uses, by its path."""
        return self.experts_per_token / self.num_experts if path.startswith("experts/") else 1.0

    def slots(self, length: int) -> int:
        """Slots of each expert in a row of `length` tokens."""
        factor = 1.0 if isinstance(self.router, ExpertChoice) else self.capacity_factor
        return min(length, math.ceil(factor * self.experts_per_token * length / self.num_experts))


class MoEModule(nn.Module):
    spec: MoE
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo) -> tuple[jax.Array, dict[str, WeightedSum]]:
        spec, ctx = self.spec, self.ctx
        real_BT = jnp.ones(x_BTD.shape[:2], bool) if info.segment_ids is None else info.segment_ids != 0
        logits_BTE = self._logits(x_BTD)
        bias_E = self._choice_bias()
        if isinstance(spec.router, ExpertChoice):
            y_BTD, counts_BTE, computed = self._experts_choose(spec.router, x_BTD, logits_BTE, real_BT, info)
        else:
            y_BTD, counts_BTE, computed = self._tokens_choose(
                spec.router, x_BTD, logits_BTE, bias_E, real_BT, info
            )
        load_E = jnp.einsum("BTE,BT->E", counts_BTE, real_BT.astype(jnp.float32))
        self.sow("intermediates", "expert_load", load_E)
        y_BTD = y_BTD.astype(ctx.dtype)
        if spec.shared is not None:
            y_BTD += self._shared(spec.shared, x_BTD, info)
        computed = load_E.sum() if computed is None else computed
        return y_BTD, _aux(spec, logits_BTE, counts_BTE, computed, bias_E, real_BT, info)

    def _logits(self, x_BTD: jax.Array) -> jax.Array:
        E, D, ctx = self.spec.num_experts, self.ctx.width, in_float32(self.ctx)
        role = "which experts suit a token"
        w_DE = param(self, ctx, "router", (D, E), ("embed", "norm"), fan_in_normal(D), 1, role)
        # TPUs would round both to bfloat16, which changes close choices
        highest = jax.lax.Precision.HIGHEST
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), w_DE, precision=highest)
        if self.spec.router.bias:
            logits_BTE += bias_param(self, ctx, "router_bias", (E,), ("norm",))
        return logits_BTE

    def _choice_bias(self) -> jax.Array | None:
        if not self.spec.has_choice_bias:
            return None
        role = "balances the experts' loads; affects the choice, not the weights"
        # Stored in float32 in any model: its steps are a thousandth, and bfloat16's at 8 are a sixteenth.
        ctx = dataclasses.replace(in_float32(self.ctx), param_dtype=jnp.dtype("float32"))
        return bias_param(self, ctx, "choice_bias", (self.spec.num_experts,), ("norm",), role=role)

    def _tokens_choose(
        self, router: Router | SparseMixer, x_BTD, logits_BTE, bias_E, real_BT, info: TokenInfo
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(y, counts of each token's choices of each expert [B, T, E], choices that were computed; None: all)."""
        spec, ctx = self.spec, self.ctx
        experts = Experts(spec.expert, spec.num_experts, ctx, name="experts")
        chosen_BTK, weights_BTK = router.choose(logits_BTE, bias_E, spec.experts_per_token)
        counts_BTE = jnp.zeros(logits_BTE.shape, jnp.float32)
        for k in range(spec.experts_per_token):
            counts_BTE += jax.nn.one_hot(chosen_BTK[..., k], spec.num_experts)
        if spec.dispatch == "dropless" or not ctx.train:
            return dropless(experts, x_BTD, chosen_BTK, weights_BTK, spec.weigh_input), counts_BTE, None
        slots_BTES, weights_BTE = capacity_slots(
            chosen_BTK, weights_BTK, real_BT, spec.num_experts, spec.slots(x_BTD.shape[1])
        )
        y_BTD = through_slots(experts, x_BTD, slots_BTES, weights_BTE, spec.weigh_input, ctx.rules)
        return y_BTD, counts_BTE, slots_BTES.sum(dtype=jnp.float32)

    def _experts_choose(
        self, router: ExpertChoice, x_BTD, logits_BTE, real_BT, info: TokenInfo
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        spec, ctx = self.spec, self.ctx
        if info.rows is not None:
            raise ValueError("a router with ExpertChoice needs whole rows: it cannot decode with a cache.")
        experts = Experts(spec.expert, spec.num_experts, ctx, name="experts")
        tokens_BES, weights_BES = router.choose_tokens(logits_BTE, real_BT, spec.slots(x_BTD.shape[1]))
        slots_BTES, weights_BTE = expert_choice_slots(tokens_BES, weights_BES, real_BT)
        y_BTD = through_slots(experts, x_BTD, slots_BTES, weights_BTE, spec.weigh_input, ctx.rules)
        return y_BTD, slots_BTES.sum(3, dtype=jnp.float32), None

    def _shared(self, spec: GatedMLP | MLP, x_BTD: jax.Array, info: TokenInfo) -> jax.Array:
        y_BTD, _ = spec.module(self.ctx, "shared", "in the shared expert: ")(x_BTD, info)
        if not self.spec.shared_gate:
            return y_BTD
        role = "gate: scales the shared expert's output"
        return nn.sigmoid(linear(self, "shared_gate", x_BTD, (1,), ("norm",), role)) * y_BTD


def _aux(
    spec: MoE,
    logits_BTE: jax.Array,
    counts_BTE: jax.Array,
    computed: jax.Array,
    bias_E: jax.Array | None,
    real_BT: jax.Array,
    info: TokenInfo,
) -> dict[str, WeightedSum]:
    """The router's losses and metrics, sums over real tokens; training adds "loss", with coefficients applied.

    Args:
      counts_BTE: how often each token chose each expert.
      computed: how many of these choices were computed.
    """
    weights_BT = token_weights(info, real_BT)
    real_BT, tokens = real_BT.astype(jnp.float32), real_BT.sum(dtype=jnp.float32)
    probs_BTE = spec.router.probabilities(logits_BTE)
    entropy_BT = -jnp.sum(probs_BTE * jnp.log(jnp.maximum(probs_BTE, 1e-20)), -1)
    z_BT = jax.nn.logsumexp(logits_BTE, axis=-1) ** 2
    balance_BT = balance_of_tokens(counts_BTE, probs_BTE, real_BT > 0, info, spec.balance_over)
    load_E = jnp.einsum("BTE,BT->E", counts_BTE, real_BT)
    share_E = load_E / jnp.maximum(load_E.sum(), 1)
    dropped = 1 - computed / jnp.maximum(load_E.sum(), 1)
    loss = WeightedSum.of(spec.balance_loss * balance_BT + spec.z_loss * z_BT, weights_BT)
    if bias_E is not None and spec.balance_rate:
        load_E = jnp.einsum("BTE,BT->E", counts_BTE, weights_BT)
        loss = WeightedSum(
            loss.total + _bias_gradient(bias_E, (load_E - load_E.mean()) / spec.experts_per_token),
            loss.weight,
        )
    return {
        "loss": loss,
        "moe_load_balance": WeightedSum.of(balance_BT, real_BT),
        "moe_z_loss": WeightedSum.of(z_BT, real_BT),
        "moe_entropy": WeightedSum.of(entropy_BT, real_BT),
        "moe_dropped": WeightedSum(dropped * tokens, tokens),
        "moe_max_load": WeightedSum(share_E.max() * spec.num_experts * tokens, tokens),
    }


def _bias_gradient(bias_E: jax.Array, error_E: jax.Array) -> jax.Array:
    """Zero, with the gradient `error_E` for the bias: the optimizer sees the overloaded experts."""
    return jnp.sum(jax.lax.stop_gradient(error_E) * (bias_E - jax.lax.stop_gradient(bias_E)))

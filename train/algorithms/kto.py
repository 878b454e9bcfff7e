"""Kahneman-Tversky optimization: completions that are labelled desired or undesired, one by one."""

# B rows, T tokens

from __future__ import annotations

import dataclasses
from typing import ClassVar, cast

import jax
import jax.numpy as jnp

from configs.typed import check_above, check_at_least
from model import WeightedSum
from model.logprobs import TokenScores
from train import losses
from train.algorithms.algorithm import (
    Algorithm,
    Metrics,
    completion_sums,
    real_rows,
    with_aux,
    with_row_weights,
)
from train.models import Batch, Models, Role


@dataclasses.dataclass(frozen=True)
class KTO(Algorithm):
    """Ethayarajh et al. 2024, arXiv:2402.01306.

    The reference point is measured on each batch: completions of a row behind the prompt of the row before.
    """

    beta: float = 0.1
    desired_weight: float = 1.0
    undesired_weight: float = (
        1.0  # desired_weight * desired rows and undesired_weight * undesired rows should be alike
    )
    reference: str | None = None  # a model in place of the policy at the start

    batch_kind: ClassVar[str] = "labelled"
    min_rows: ClassVar[int] = 2

    def __post_init__(self):
        check_above(0, beta=self.beta)
        check_at_least(0, desired_weight=self.desired_weight, undesired_weight=self.undesired_weight)

    def roles(self) -> dict[str, Role]:
        return {"policy": Role(trained=True), "reference": Role(source=self.reference)}

    def prepare(self, models: Models, batch: Batch) -> Batch:
        other = mismatched(batch)
        policy_B, reference_B = (
            completion_sums(models[name].logprobs(other), other) for name in ("policy", "reference")
        )
        kl = losses.kto_reference_point(policy_B, reference_B, real_rows(other))
        reference_logprobs = models["reference"].logprobs(batch)
        return batch | {"reference_logprobs": reference_logprobs, "kl": jnp.full(len(policy_B), kl)}

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        real_B = real_rows(batch)
        out = models["policy"].scored(with_row_weights(batch, real_B))
        policy_B = completion_sums(cast(TokenScores, out.scores).logprobs, batch)
        reference_B = completion_sums(batch["reference_logprobs"], batch)
        desired_B = batch["labels"] == 1
        loss_B = losses.kto(
            policy_B,
            reference_B,
            desired_B,
            batch["kl"],
            self.beta,
            self.desired_weight,
            self.undesired_weight,
        )
        reward_B = self.beta * (policy_B - reference_B)
        above_B = (policy_B - reference_B > batch["kl"]) == desired_B
        metrics = {
            "accuracy": WeightedSum.of(above_B, real_B),
            "kl": WeightedSum.of(batch["kl"], real_B),
            "desired_reward": WeightedSum.of(reward_B, real_B * desired_B),
            "undesired_reward": WeightedSum.of(reward_B, real_B * ~desired_B),
        }
        return with_aux(WeightedSum.of(loss_B, real_B), metrics, out.aux)


def mismatched(batch: Batch) -> Batch:
    """The batch with the completion of each row behind the prompt of the row before it, cut off at T tokens.

    A prompt ends where the first target counts; rows hold one example each.
    """
    prompt = {name: jnp.roll(batch[name], 1, axis=0) for name in ("targets", "tokens", "loss_weights")}
    T = batch["tokens"].shape[1]
    counted_B = jnp.sum(batch["loss_weights"] > 0, axis=1)
    first = lambda weights_BT: jnp.argmax(weights_BT > 0, axis=1)
    start_B, own_B = first(prompt["loss_weights"]), first(batch["loss_weights"])
    place_BT = jnp.arange(T) - start_B[:, None]  # 0 at the first target that counts
    # the target at place i is the completion's i-th token, and the token there the one before it
    target_BT = _at(batch["targets"], own_B[:, None] + place_BT)
    token_BT = _at(batch["tokens"], own_B[:, None] + place_BT)
    last = jnp.minimum(start_B + _span(batch), T)
    in_prompt_BT, real_BT = place_BT < 0, jnp.arange(T) < last[:, None]
    tokens_BT = jnp.where(place_BT <= 0, prompt["tokens"], token_BT)
    targets_BT = jnp.where(in_prompt_BT, prompt["targets"], target_BT)
    weights_BT = _at(batch["loss_weights"], own_B[:, None] + place_BT)
    exists_B = (counted_B > 0) & (jnp.sum(prompt["loss_weights"] > 0, axis=1) > 0)
    weights_BT = jnp.where(in_prompt_BT | ~real_BT | ~exists_B[:, None], 0.0, weights_BT)
    return batch | {
        "tokens": jnp.where(real_BT, tokens_BT, 0),
        "targets": jnp.where(real_BT, targets_BT, 0),
        "loss_weights": weights_BT,
        "segment_ids": real_BT.astype(jnp.int32),
        "positions": jnp.where(real_BT, jnp.arange(T), 0),
    }


def _span(batch: Batch) -> jax.Array:
    """[B] targets from the first that counts to the last that counts."""
    counts_BT = batch["loss_weights"] > 0
    T = counts_BT.shape[1]
    last_B = T - jnp.argmax(counts_BT[:, ::-1], axis=1)
    return jnp.where(counts_BT.any(axis=1), last_B - jnp.argmax(counts_BT, axis=1), 0)


def _at(x_BT: jax.Array, index_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BT, jnp.clip(index_BT, 0, x_BT.shape[1] - 1), axis=1)

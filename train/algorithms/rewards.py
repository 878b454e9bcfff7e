"""Reward models: of whole completions from pairs, and of the steps of a solution from labels."""

# B rows, T tokens, N pairs (B = 2 N)

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from configs.typed import check_at_least
from model import ScalarHead, WeightedSum
from train import losses
from train.algorithms.algorithm import Algorithm, Metrics, pairs, real_pairs, with_aux, with_row_weights
from train.models import Batch, Models, Role, batch_inputs, no_logits

REWARD = ScalarHead("reward")


@dataclasses.dataclass(frozen=True)
class RewardModel(Algorithm):
    """Bradley-Terry from preference pairs: a language model with a scalar head, read at a completion's last token.

    `margin` [B] of a batch, where there is one, says by how much the chosen completion shall be better; datasets have
    none.
    """

    centring: float = 0.01  # coefficient of (r_chosen + r_rejected)^2, which keeps rewards near 0

    batch_kind: ClassVar[str] = "preference"

    def __post_init__(self):
        check_at_least(0, centring=self.centring)

    def roles(self) -> dict[str, Role]:
        return {"policy": Role(trained=True, head=REWARD)}

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        real_N = real_pairs(batch)
        batch = with_row_weights(batch, 0.5 * jnp.repeat(real_N, 2))
        out = models["policy"](batch_inputs(batch), logits_at=no_logits(batch))
        chosen_N, rejected_N = pairs(at_end(out.heads[REWARD.name], batch))
        margin_N = pairs(batch["margin"])[0] if "margin" in batch else 0.0
        loss_N = losses.reward_model(chosen_N, rejected_N, margin_N, self.centring)
        chosen_length, rejected_length = pairs(jnp.sum(batch["loss_weights"], axis=1))
        longer_N, shorter_N = chosen_length > rejected_length, chosen_length < rejected_length
        right_N = chosen_N > rejected_N
        metrics = {
            "accuracy": WeightedSum.of(right_N, real_N),
            # rewards that follow the length are right on the first of these and wrong on the second
            "accuracy_chosen_longer": WeightedSum.of(right_N, real_N * longer_N),
            "accuracy_chosen_shorter": WeightedSum.of(right_N, real_N * shorter_N),
            "margin": WeightedSum.of(chosen_N - rejected_N, real_N),
            "margin_chosen_longer": WeightedSum.of(chosen_N - rejected_N, real_N * longer_N),
            "margin_chosen_shorter": WeightedSum.of(chosen_N - rejected_N, real_N * shorter_N),
            "reward": WeightedSum.of((chosen_N + rejected_N) / 2, real_N),
            # the squared error of the probability that the chosen one is better; 0.25 is a coin
            "brier": WeightedSum.of(jax.nn.sigmoid(rejected_N - chosen_N) ** 2, real_N),
        }
        return with_aux(WeightedSum.of(loss_N, real_N), metrics, out.aux)


@dataclasses.dataclass(frozen=True)
class ProcessRewardModel(Algorithm):
    """The probability that a solution is right up to each step, read at the step's last token.

    Lightman et al. 2023, arXiv:2305.20050. `step_labels` of a batch are probabilities at these tokens, where
    `loss_weights` are 1.
    """

    batch_kind: ClassVar[str] = "steps"

    def roles(self) -> dict[str, Role]:
        return {"policy": Role(trained=True, head=REWARD)}

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        out = models["policy"](batch_inputs(batch), logits_at=no_logits(batch))
        logits_BT, mask_BT = out.heads[REWARD.name], batch["loss_weights"]
        labels_BT = batch["step_labels"]
        loss = WeightedSum.of(losses.process_reward(logits_BT, labels_BT, mask_BT), mask_BT)
        good_BT = labels_BT >= 0.5
        right_BT = (logits_BT > 0) == good_BT
        metrics = {
            "accuracy": WeightedSum.of(right_BT, mask_BT),
            "accuracy_right_steps": WeightedSum.of(right_BT, mask_BT * good_BT),
            "accuracy_wrong_steps": WeightedSum.of(right_BT, mask_BT * ~good_BT),
        }
        return with_aux(loss, metrics, out.aux)


def at_end(x_BT: jax.Array, batch: Batch) -> jax.Array:
    """[B]: the value at the last token of each row's completion, the one that the last counted target is."""
    T = x_BT.shape[1]
    last_B = T - 1 - jnp.argmax(batch["loss_weights"][:, ::-1] > 0, axis=1)
    # the last counted target is the token after `last_B`, which is in the row unless the row was cut there
    last_B = jnp.minimum(last_B + 1, jnp.sum(batch["segment_ids"] != 0, axis=1) - 1)
    return jnp.take_along_axis(x_BT, jnp.maximum(last_B, 0)[:, None], axis=1)[:, 0]

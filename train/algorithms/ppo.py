"""Proximal policy optimization with four models: policy, reference, reward and value (PPO-RLHF)."""

# B rows, T tokens

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, cast

import jax
import jax.numpy as jnp

from configs.typed import check_above, check_at_least
from model import ScalarHead, WeightedSum
from model.logprobs import ScoreOptions, TokenScores
from train import losses
from train.advantages import gae, whiten
from train.algorithms.algorithm import Algorithm, Metrics, real_rows, with_aux
from train.algorithms.rewards import REWARD, at_end
from train.models import Batch, Models, Role, batch_inputs, no_logits

VALUE = ScalarHead("value")


@dataclasses.dataclass(frozen=True)
class PPO(Algorithm):
    """Ouyang et al. 2022, arXiv:2203.02155: a reward at the end of an answer, and a penalty a token for leaving the
    reference; advantages by GAE, whitened over the batch; policy and value are clipped.

    Beside the usual keys a batch has `sampler_logprobs` [B, T] and `rewards` [B], what verifiers gave; a reward model's
    score is added.
    """

    reward: str | None = None  # a run of the algorithm RewardModel; None: verifiers' rewards alone
    # where the value model starts; None: the reward model, its head too, or else the policy with a head of zeros
    value: str | None = None
    clip: float = 0.2
    dual_clip: float | None = None  # above 1: bounds the loss of a negative advantage
    value_clip: float | None = 0.2
    value_weight: float = 0.5  # coefficient of the value loss
    value_lr_scale: float = 1.0  # the value model's learning rate, relative to the policy's
    gamma: float = 1.0
    lam: float = 0.95
    kl_weight: float = 0.05  # coefficient of the penalty, in rewards a nat
    kl_target: float | None = (
        None  # nats an answer: the coefficient follows it (Ziegler et al. 2019, arXiv:1909.08593)
    )
    kl_horizon: int = 10_000  # answers in which the coefficient adapts
    whiten: bool = True
    minibatches: int = 4  # of one set of rollouts
    epochs: int = 1  # passes over one set of rollouts
    temperature: float | None = None  # of the log-probabilities; None: that of the rollouts

    batch_kind: ClassVar[str] = "trajectory"

    def __post_init__(self):
        check_at_least(1, minibatches=self.minibatches, epochs=self.epochs, kl_horizon=self.kl_horizon)
        check_at_least(0, clip=self.clip, value_weight=self.value_weight, value_lr_scale=self.value_lr_scale)
        check_at_least(0, kl_weight=self.kl_weight)
        if not 0 <= self.gamma <= 1 or not 0 <= self.lam <= 1:
            raise ValueError(f"gamma={self.gamma} and lam={self.lam}; wanted 0 to 1.")
        if self.dual_clip is not None:
            check_above(1, dual_clip=self.dual_clip)
        for name in ("value_clip", "kl_target", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}; wanted more than 0, or None.")

    def roles(self) -> dict[str, Role]:
        start = self.value or self.reward
        roles = {
            "policy": Role(trained=True),
            "reference": Role(),
            "value": Role(
                source=start,
                trained=True,
                head=VALUE,
                head_from=REWARD.name,
                lr_scale=self.value_lr_scale,
            ),
        }
        if self.reward is not None:
            roles["reward"] = Role(source=self.reward, head=REWARD, needs_head=True)
        return roles

    def prepare(self, models: Models, batch: Batch) -> Batch:
        mask_BT, real_B = batch["loss_weights"], real_rows(batch)
        reference_BT = models["reference"].logprobs(batch, self.temperature or 1.0)
        values_BT = models["value"].read_head(batch, VALUE.name)
        score_B = batch["rewards"]
        if "reward" in models:
            score_B = score_B + at_end(models["reward"].read_head(batch, REWARD.name), batch)
        score_B = score_B * real_B
        kl_BT = jnp.where(mask_BT > 0, batch["sampler_logprobs"] - reference_BT, 0.0)
        weight_B = batch["kl_weight"] if "kl_weight" in batch else jnp.full(len(score_B), self.kl_weight)
        rewards_BT = -weight_B[:, None] * kl_BT + score_B[:, None] * last_choice(mask_BT)
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, self.gamma, self.lam)
        if self.whiten:
            advantages_BT = whiten(advantages_BT, mask_BT)
        return batch | {
            "advantages": advantages_BT,
            "returns": returns_BT,
            "old_values": values_BT,
            "score": score_B,
            "kl": jnp.sum(kl_BT, axis=1),
        }

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        mask_BT, real_B, sampled_BT = batch["loss_weights"], real_rows(batch), batch["sampler_logprobs"]
        out = models["policy"].scored(batch, ScoreOptions(self.temperature or 1.0, entropy=True))
        scores = cast(TokenScores, out.scores)
        policy_BT = losses.ppo_policy(
            scores.logprobs, sampled_BT, batch["advantages"], mask_BT, self.clip, dual_clip=self.dual_clip
        )
        value_out = models["value"](batch_inputs(batch), logits_at=no_logits(batch))
        values_BT = value_out.heads[VALUE.name]
        value_BT = losses.ppo_value(
            values_BT, batch["old_values"], batch["returns"], mask_BT, self.value_clip
        )
        loss = WeightedSum.of(policy_BT + self.value_weight * value_BT, mask_BT)
        ratio_BT = jnp.exp(jnp.where(mask_BT > 0, scores.logprobs - sampled_BT, 0.0))
        metrics = {
            "policy_loss": WeightedSum.of(policy_BT, mask_BT),
            "value_loss": WeightedSum.of(value_BT, mask_BT),
            "score": WeightedSum.of(batch["score"], real_B),
            "kl": WeightedSum.of(batch["kl"], real_B),  # nats an answer, from the reference
            "mismatch_kl": WeightedSum.of(losses.kl_k3(sampled_BT, scores.logprobs), mask_BT),
            "clipped": WeightedSum.of(-policy_BT < ratio_BT * batch["advantages"], mask_BT),
            "entropy": WeightedSum.of(jax.lax.stop_gradient(cast(jax.Array, scores.entropy)), mask_BT),
        }
        return with_aux(loss, metrics, out.aux)

    def next_kl_weight(self, weight: float, kl: float, answers: int) -> float:
        """The coefficient after a set of rollouts with a mean KL of `kl` nats an answer."""
        if self.kl_target is None:
            return weight
        error = min(max(kl / self.kl_target - 1, -0.2), 0.2)
        return weight * (1 + error * answers / self.kl_horizon)


def last_choice(mask_BT: jax.Array) -> jax.Array:
    """[B, T] float32: 1 at the last token that the policy chose in a row."""
    later_BT = jnp.cumsum(mask_BT[:, ::-1] > 0, axis=1)[:, ::-1]
    return ((mask_BT > 0) & (later_BT == 1)).astype(jnp.float32)

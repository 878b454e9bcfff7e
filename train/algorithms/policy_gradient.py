"""Policy gradients on trajectories that a sampler wrote; rl/ makes the batches.

Beside the usual keys a batch has `sampler_logprobs` of the targets at the sampling temperature and `advantages`, both
[B, T] float32.
"""

# B rows, T tokens

from __future__ import annotations

import dataclasses
from typing import ClassVar, cast

import jax
import jax.numpy as jnp

from configs.typed import check_above, check_at_least
from model import WeightedSum
from model.logprobs import ScoreOptions, TokenScores
from train import losses
from train.algorithms.algorithm import Algorithm, Metrics, with_aux
from train.models import Batch, Models


@dataclasses.dataclass(frozen=True)
class GRPO(Algorithm):
    """Group relative policy optimization: advantages are relative to other answers to the same prompt.

    Shao et al. 2024, arXiv:2402.03300, with DAPO's loss over all tokens and clip-higher (Yu et al. 2025,
    arXiv:2503.14476). `mismatch_kl` is the k3 estimate of KL(sampler || trainer): on the first update after a rollout
    the parameters are the sampler's, so it measures how far the two programs disagree.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    minibatches: int = 1  # updates from one set of rollouts
    normalise_std: bool = True  # divide advantages by the group's standard deviation
    temperature: float | None = None  # of the log-probabilities; None: that of the rollouts

    batch_kind: ClassVar[str] = "trajectory"

    def __post_init__(self):
        check_at_least(1, minibatches=self.minibatches)
        check_at_least(0, clip_low=self.clip_low, clip_high=self.clip_high)
        if self.temperature is not None:
            check_above(0, temperature=self.temperature)

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        temperature = 1.0 if self.temperature is None else self.temperature
        out = models["policy"].scored(batch, ScoreOptions(temperature, entropy=True))
        scores = cast(TokenScores, out.scores)
        weights_BT, advantages_BT = batch["loss_weights"], batch["advantages"]
        sampled_BT = batch["sampler_logprobs"]
        loss_BT = losses.ppo_policy(
            scores.logprobs, sampled_BT, advantages_BT, weights_BT, self.clip_low, self.clip_high
        )
        ratio_BT = jnp.exp(jnp.where(weights_BT > 0, scores.logprobs - sampled_BT, 0.0))
        metrics = {
            # the sampler's tokens: its log-probabilities stand where a KL from the policy's has the policy's
            "mismatch_kl": WeightedSum.of(losses.kl_k3(sampled_BT, scores.logprobs), weights_BT),
            "clipped": WeightedSum.of(-loss_BT < ratio_BT * advantages_BT, weights_BT),
            "entropy": WeightedSum.of(jax.lax.stop_gradient(cast(jax.Array, scores.entropy)), weights_BT),
        }
        return with_aux(WeightedSum.of(loss_BT, weights_BT), metrics, out.aux)

"""Next-token prediction: pretraining and supervised fine-tuning differ in the dataset's mask only."""

# B rows, T tokens

from __future__ import annotations

import dataclasses
from typing import ClassVar, cast

import jax
import jax.numpy as jnp

from model import ModelConfig, WeightedSum
from model.blocks.common import add_up
from model.logprobs import ScoreOptions, TokenScores
from model.readouts.mtp import look_ahead, same_segment
from train.algorithms.algorithm import Algorithm, Metrics, with_aux
from train.models import Batch, Models


@dataclasses.dataclass(frozen=True)
class LanguageModelling(Algorithm):
    """Cross-entropy weighted by `loss_weights`, plus z_loss * log(Z)^2, plus mtp_weight times the mean MTP loss.

    Z-loss: Chowdhery et al. 2022, arXiv:2204.02311. The sum of each MTP module is divided by the weight of the
    next-token loss, as in DeepSeek-V3 (arXiv:2412.19437, section 2.2), so the loss does not depend on how the batch is
    split.
    """

    z_loss: float = 0.0  # coefficient of log(Z)^2; 1e-4 is usual
    mtp_weight: float = 0.3  # coefficient of the mean MTP loss; 0: MTP modules are not trained

    batch_kind: ClassVar[str] = "lm"

    def trains_mtp(self, cfg: ModelConfig) -> bool:
        return self.mtp_weight != 0 and cfg.mtp is not None

    def loss(self, models: Models, batch: Batch, rng: jax.Array) -> tuple[WeightedSum, Metrics]:
        policy = models["policy"]
        out = policy.scored(batch, ScoreOptions(likeliest=self.trains_mtp(policy.cfg)))
        scores = cast(TokenScores, out.scores)
        weights_BT = batch["loss_weights"]
        nll = WeightedSum.of(-scores.logprobs, weights_BT)
        loss = WeightedSum(nll.total + self.z_loss * jnp.sum(weights_BT * scores.log_z**2), nll.weight)
        metrics, aux = {"nll": nll}, out.aux
        if self.mtp_weight and out.mtp_scores:
            later, total = mtp_losses(out.mtp_scores, batch)
            loss = WeightedSum(loss.total + self.mtp_weight / len(out.mtp_scores) * total, loss.weight)
            metrics, aux = metrics | later, add_up(aux, out.mtp_aux)
        return with_aux(loss, metrics, aux)


def mtp_losses(scores_by_module: tuple[TokenScores, ...], batch: Batch) -> tuple[Metrics, jax.Array]:
    """(loss and accuracy of each MTP module by name, the sum of all losses).

    At token i, module k predicts the target of token i + k, if this token is in the same segment and has a loss weight.

    Args:
      scores_by_module: `Output.mtp_scores`, with the likeliest tokens.
    """
    metrics, total = {}, jnp.zeros((), jnp.float32)
    for k, scores in enumerate(scores_by_module, 1):
        weights_BT = look_ahead(batch["loss_weights"], k) * same_segment(batch["segment_ids"], k)
        nll = WeightedSum.of(-scores.logprobs, weights_BT)
        right_BT = scores.likeliest == look_ahead(batch["targets"], k)
        metrics |= {
            f"mtp_{k}_nll": nll,
            f"mtp_{k}_accuracy": WeightedSum.of(right_BT, weights_BT),
        }
        total += nll.total
    return metrics, total

"""Preferences in pairs: rows 2n and 2n + 1 of a batch are the chosen and the rejected completion of one prompt."""

# B rows, T tokens, N pairs (B = 2 N)

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, cast

import jax
import jax.numpy as jnp

from configs.typed import check_above, check_at_least
from model import WeightedSum
from model.logprobs import ScoreOptions, TokenScores
from train import losses
from train.algorithms.algorithm import (
    Algorithm,
    Metrics,
    completion_averages,
    completion_sums,
    pairs,
    real_pairs,
    with_aux,
    with_row_weights,
)
from train.models import Batch, Models, Role


def reference_role(reference: str | None) -> Role:
    """A frozen model: the policy as it was at the start, or the model at a path."""
    return Role(source=reference)


@dataclasses.dataclass(frozen=True)
class DPO(Algorithm):
    """Direct preference optimization against a frozen reference, and its variants; see `train.losses`.

    Rafailov et al. 2023, arXiv:2305.18290.
    """

    # sigmoid: DPO; robust: rDPO; hinge: SLiC; ipo: IPO, of length-averaged log-probabilities
    variant: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    beta: float = 0.1  # strength of the penalty for leaving the reference
    label_smoothing: float = 0.0  # the share of flipped labels: above 0, "sigmoid" is conservative DPO
    average_length: bool = (
        False  # log-probabilities are divided by the completion's length, as IPO's always are
    )
    nll_weight: float = 0.0  # coefficient of the chosen completions' mean loss a token (RPO)
    reference: str | None = None  # a model in place of the policy at the start

    batch_kind: ClassVar[str] = "preference"

    def __post_init__(self):
        _check_smoothing(self.label_smoothing)
        check_above(0, beta=self.beta)
        check_at_least(0, nll_weight=self.nll_weight)
        if self.label_smoothing and self.variant in ("hinge", "ipo"):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} has no meaning for variant={self.variant!r}. Set it to 0, or "
                "use the variant sigmoid or robust."
            )

    def roles(self) -> dict[str, Role]:
        return {"policy": Role(trained=True), "reference": reference_role(self.reference)}

    def prepare(self, models: Models, batch: Batch) -> Batch:
        return batch | {"reference_logprobs": models["reference"].logprobs(batch)}

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        real_N = real_pairs(batch)
        batch = with_row_weights(batch, 0.5 * jnp.repeat(real_N, 2))
        out = models["policy"].scored(batch)
        logprobs_BT = cast(TokenScores, out.scores).logprobs
        reduce = completion_averages if self.average_length or self.variant == "ipo" else completion_sums
        chosen_N, rejected_N = pairs(reduce(logprobs_BT, batch))
        ref_chosen_N, ref_rejected_N = pairs(reduce(batch["reference_logprobs"], batch))
        loss_N = self._loss(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N)
        if self.nll_weight:
            nll_N, _ = pairs(-completion_averages(logprobs_BT, batch))
            loss_N += self.nll_weight * nll_N
        rewards = self.beta * (chosen_N - ref_chosen_N), self.beta * (rejected_N - ref_rejected_N)
        return with_aux(WeightedSum.of(loss_N, real_N), margins(*rewards, real_N), out.aux)

    def _loss(self, *logprobs_N: jax.Array) -> jax.Array:
        if self.variant == "robust":
            return losses.robust_dpo(*logprobs_N, beta=self.beta, label_smoothing=self.label_smoothing)
        if self.variant == "hinge":
            return losses.hinge(*logprobs_N, beta=self.beta)
        if self.variant == "ipo":
            return losses.ipo(*logprobs_N, beta=self.beta)
        return losses.dpo(*logprobs_N, beta=self.beta, label_smoothing=self.label_smoothing)


@dataclasses.dataclass(frozen=True)
class ORPO(Algorithm):
    """Odds ratio preference optimization: supervised and preference loss in one, without a reference.

    Hong et al. 2024, arXiv:2403.07691.
    """

    beta: float = 0.1  # coefficient of the odds-ratio loss

    batch_kind: ClassVar[str] = "preference"

    def __post_init__(self):
        check_at_least(0, beta=self.beta)

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        chosen_N, rejected_N, real_N, aux = _averages(models, batch)
        loss = WeightedSum.of(losses.orpo(chosen_N, rejected_N, self.beta), real_N)
        metrics = margins(chosen_N, rejected_N, real_N) | {"nll": WeightedSum.of(-chosen_N, real_N)}
        return with_aux(loss, metrics, aux)


@dataclasses.dataclass(frozen=True)
class SimPO(Algorithm):
    """Simple preference optimization: length-averaged log-probabilities and a target margin, without a reference.

    Meng et al. 2024, arXiv:2405.14734.
    """

    beta: float = 2.0
    gamma: float = 1.0  # the target margin, nats
    label_smoothing: float = 0.0
    nll_weight: float = (
        0.0  # coefficient of the chosen completions' mean loss a token (CPO's supervised part)
    )

    batch_kind: ClassVar[str] = "preference"

    def __post_init__(self):
        _check_smoothing(self.label_smoothing)
        check_above(0, beta=self.beta)
        check_at_least(0, gamma=self.gamma, nll_weight=self.nll_weight)

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        chosen_N, rejected_N, real_N, aux = _averages(models, batch)
        loss_N = losses.simpo(chosen_N, rejected_N, self.beta, self.gamma, self.label_smoothing)
        loss = WeightedSum.of(loss_N - self.nll_weight * chosen_N, real_N)
        metrics = margins(self.beta * chosen_N, self.beta * rejected_N, real_N)
        return with_aux(loss, metrics | {"nll": WeightedSum.of(-chosen_N, real_N)}, aux)


def margins(chosen_N: jax.Array, rejected_N: jax.Array, real_N: jax.Array) -> Metrics:
    """Accuracy, and the means of rewards and of their difference."""
    return {
        "accuracy": WeightedSum.of(chosen_N > rejected_N, real_N),
        "margin": WeightedSum.of(chosen_N - rejected_N, real_N),
        "chosen_reward": WeightedSum.of(chosen_N, real_N),
        "rejected_reward": WeightedSum.of(rejected_N, real_N),
    }


def _averages(models: Models, batch: Batch):
    """(chosen and rejected log-probabilities a token, weight of each pair, the blocks' aux)."""
    real_N = real_pairs(batch)
    out = models["policy"].scored(with_row_weights(batch, 0.5 * jnp.repeat(real_N, 2)), ScoreOptions())
    averages_B = completion_averages(cast(TokenScores, out.scores).logprobs, batch)
    return *pairs(averages_B), real_N, out.aux


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}; wanted at least 0 and less than 0.5.")

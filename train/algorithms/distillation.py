"""Distillation: a student learns a teacher's distributions; both have one vocabulary, widths may differ."""

# B rows, T tokens, k likeliest tokens of the teacher, V vocabulary, D teacher's width

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, cast

import jax
import jax.numpy as jnp

from configs import ConfigError
from configs.typed import check_above, check_at_least
from model import ModelConfig, Output, WeightedSum
from model.logprobs import ScoreOptions, scores_of_logits
from model.readouts.heads import LinearHead
from train import losses
from train.algorithms.algorithm import Algorithm, Metrics, with_aux
from train.models import Batch, Models, Role, batch_inputs

HIDDEN = "teacher_hidden"


@dataclasses.dataclass(frozen=True)
class Distillation(Algorithm):
    """Generalized Jensen-Shannon divergence to a teacher, a token. Agarwal et al. 2023 (GKD), arXiv:2306.13649.

    The teacher runs beside the student, or its likeliest tokens are read from a folder of `python -m train.teacher`:
    then the forward KL is over these and one more outcome for all others, and a validation loss, for which no cache has
    rows, is that of next-token prediction. Sequence-level distillation is LanguageModelling on what the teacher wrote.
    """

    teacher: str | None = None  # what `init_from` takes
    cache: str | None = None  # a folder of `python -m train.teacher`, in place of `teacher`
    beta: float = (
        0.0  # 0: forward KL(teacher || student); 1: reverse KL(student || teacher); 0.5: Jensen-Shannon
    )
    temperature: float = 1.0  # divides the logits of both
    nll_weight: float = 0.0  # coefficient of the ordinary loss on the data's own tokens
    # coefficient of the mean squared difference of the last hidden states, the student's through a new linear map
    hidden_weight: float = 0.0
    teacher_width: int = 0  # of the teacher's hidden states; with hidden_weight

    batch_kind: ClassVar[str] = "lm"

    def __post_init__(self):
        if (self.teacher is None) == (self.cache is None):
            raise ValueError("Distillation needs either `teacher` or `cache`.")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta}; wanted 0 to 1.")
        check_above(0, temperature=self.temperature)
        check_at_least(0, nll_weight=self.nll_weight, hidden_weight=self.hidden_weight)
        check_at_least(0, teacher_width=self.teacher_width)
        if self.cache is not None and (self.beta or self.hidden_weight):
            raise ValueError(
                "a cache holds a teacher's likeliest tokens, enough for the forward KL alone: set beta=0 and "
                "hidden_weight=0, or give `teacher`."
            )
        if bool(self.hidden_weight) != bool(self.teacher_width):
            raise ValueError(
                f"hidden_weight={self.hidden_weight:g} and teacher_width={self.teacher_width}: give both, or neither."
            )

    def roles(self) -> dict[str, Role]:
        head = LinearHead(HIDDEN, self.teacher_width) if self.hidden_weight else None
        policy = Role(trained=True, head=head)
        return {"policy": policy} | ({"teacher": Role(source=self.teacher)} if self.teacher else {})

    def check_models(self, cfgs: Mapping[str, ModelConfig]) -> None:
        if self.hidden_weight and cfgs["teacher"].token_width != self.teacher_width:
            raise ConfigError(
                f"config.algorithm.teacher_width={self.teacher_width}, and the hidden states of {self.teacher} have "
                f"{cfgs['teacher'].token_width} numbers. Give that."
            )

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        weights_BT = batch["loss_weights"]
        out = models["policy"](batch_inputs(batch))
        chosen_BT = jnp.take_along_axis(out.logits, batch["targets"][..., None], axis=-1)[..., 0]
        nll_BT = jax.nn.logsumexp(out.logits, axis=-1) - chosen_BT
        nll = WeightedSum.of(nll_BT, weights_BT)
        if (
            self.teacher is None and "teacher_ids" not in batch
        ):  # validation rows: no cache has their divergence
            return with_aux(nll, {"nll": nll}, out.aux)
        if self.teacher is None:
            student_BTV = jax.nn.log_softmax(out.logits / self.temperature)
            student_BTk = jnp.take_along_axis(student_BTV, batch["teacher_ids"], axis=-1)
            divergence_BT = losses.top_k_kl(student_BTk, batch["teacher_logprobs"].astype(jnp.float32))
        else:
            teacher = models["teacher"](batch_inputs(batch))
            divergence_BT = divergence(out, teacher, self.beta, self.temperature)
        metrics = {"divergence": WeightedSum.of(divergence_BT, weights_BT), "nll": nll}
        loss_BT = divergence_BT + self.nll_weight * nll_BT
        if self.hidden_weight:
            hidden_BT = losses.hidden_mse(out.heads[HIDDEN], jax.lax.stop_gradient(teacher.hidden))
            metrics["hidden"] = WeightedSum.of(hidden_BT, weights_BT)
            loss_BT += self.hidden_weight * hidden_BT
        return with_aux(WeightedSum.of(loss_BT, weights_BT), metrics, out.aux)


@dataclasses.dataclass(frozen=True)
class OnPolicyDistillation(Algorithm):
    """The divergence to a teacher on what the student itself wrote, so that it learns where its own answers lead.

    Agarwal et al. 2023 (GKD with lambda 1), arXiv:2306.13649. Batches are rollouts of `python -m rl`; their rewards
    have no part in the loss. No gradient flows through the sampling.
    """

    teacher: str = ""  # what `init_from` takes
    beta: float = 1.0  # as in Distillation: 1 is the reverse KL, KL(student || teacher)
    minibatches: int = 1  # updates from one set of rollouts
    temperature: float | None = None  # divides the logits of both; None: that of the rollouts

    batch_kind: ClassVar[str] = "trajectory"

    def __post_init__(self):
        check_at_least(1, minibatches=self.minibatches)
        if self.temperature is not None:
            check_above(0, temperature=self.temperature)
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta}; wanted 0 to 1.")

    def roles(self) -> dict[str, Role]:
        if not self.teacher:
            raise ConfigError("give config.algorithm.teacher: a model with the policy's tokenizer.")
        return {"policy": Role(trained=True), "teacher": Role(source=self.teacher)}

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        mask_BT, temperature = batch["loss_weights"], self.temperature or 1.0
        out = models["policy"](batch_inputs(batch))
        teacher = models["teacher"](batch_inputs(batch))
        divergence_BT = divergence(out, teacher, self.beta, temperature)
        options = ScoreOptions(temperature, entropy=True)
        scores = jax.lax.stop_gradient(scores_of_logits(out.logits, batch["targets"], options))
        sampled_BT = batch["sampler_logprobs"]
        metrics = {
            "divergence": WeightedSum.of(divergence_BT, mask_BT),
            "mismatch_kl": WeightedSum.of(losses.kl_k3(sampled_BT, scores.logprobs), mask_BT),
            "entropy": WeightedSum.of(cast(jax.Array, scores.entropy), mask_BT),
        }
        return with_aux(WeightedSum.of(divergence_BT, mask_BT), metrics, out.aux)


def divergence(student: Output, teacher: Output, beta: float, temperature: float) -> jax.Array:
    """[B, T] nats; logits beyond the smaller vocabulary are padding. No gradient through the teacher."""
    V = min(student.logits.shape[-1], teacher.logits.shape[-1])
    theirs_BTV = jax.lax.stop_gradient(teacher.logits[..., :V])
    return losses.jsd(student.logits[..., :V], theirs_BTV, beta, temperature)

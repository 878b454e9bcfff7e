"""Next-token prediction: pretraining and supervised fine-tuning differ in the dataset's mask only."""

# B rows, T tokens

from __future__ import annotations

import dataclasses
from typing import ClassVar, cast

import jax
import jax.numpy as jnp

from configs import ConfigError
from data import Tokenizer
from model import ModelConfig, Output, WeightedSum
from model.blocks.common import add_up
from model.logprobs import ScoreOptions, TokenScores, scores_of_logits
from model.readouts.mtp import look_ahead, same_segment
from train.algorithms.algorithm import Algorithm, Metrics, with_aux
from train.algorithms.corruption import fill_in_the_middle
from train.models import Batch, Model, Models, batch_inputs, row_keys


@dataclasses.dataclass(frozen=True)
class LanguageModelling(Algorithm):
    """Cross-entropy weighted by `loss_weights`, plus z_loss * log(Z)^2, plus mtp_weight times the mean MTP loss.

    Z-loss: Chowdhery et al. 2022, arXiv:2204.02311. The sum of each MTP module is divided by the weight of the
    next-token loss, as in DeepSeek-V3 (arXiv:2412.19437, section 2.2), so the loss does not depend on how the batch is
    split.
    """

    z_loss: float = 0.0  # coefficient of log(Z)^2; 1e-4 is usual
    mtp_weight: float = 0.3  # coefficient of the mean MTP loss; 0: MTP modules are not trained
    # share of a target's probability that is spread over the vocabulary; above 0 all logits are in memory
    label_smoothing: float = 0.0
    smoothed_ids: int | None = (
        None  # that many ids are in it; None: the tokenizer's, without the model's padding
    )
    # NEFTune: uniform noise of at most this / sqrt(document's tokens * width) on embeddings; 5 is usual for fine-tuning
    neftune_alpha: float = 0.0
    fim_rate: float = (
        0.0  # share of documents whose middle is moved to the end (fill in the middle); 0.5 is usual
    )
    fim_spm_rate: float = 0.5  # of these, the share with the suffix first
    fim_tokens: tuple[str, str, str] = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    fim_ids: tuple[int, int, int] | None = None  # of fim_tokens; None: the tokenizer's

    batch_kind: ClassVar[str] = "lm"

    def __post_init__(self):
        if (
            not 0 <= self.label_smoothing < 1
            or not 0 <= self.fim_rate <= 1
            or not 0 <= self.fim_spm_rate <= 1
        ):
            raise ValueError("label_smoothing, fim_rate and fim_spm_rate are shares: wanted 0 to 1.")

    def with_tokenizer(self, tokenizer: Tokenizer) -> LanguageModelling:
        if self.label_smoothing and self.smoothed_ids is None:
            return dataclasses.replace(self, smoothed_ids=tokenizer.vocab_size).with_tokenizer(tokenizer)
        if not self.fim_rate or self.fim_ids is not None:
            return self
        prefix, suffix, middle = (tokenizer.id_of(token) for token in self.fim_tokens)
        if prefix is None or suffix is None or middle is None or len({prefix, suffix, middle}) != 3:
            raise ConfigError(
                f"config.algorithm.fim_tokens={self.fim_tokens}: the tokenizer has not each of them as one token. Name "
                "its own, give fim_ids, or train a tokenizer with these special tokens."
            )
        return dataclasses.replace(self, fim_ids=(prefix, suffix, middle))

    def trains_mtp(self, cfg: ModelConfig) -> bool:
        return self.mtp_weight != 0 and cfg.mtp is not None

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        policy = models["policy"]
        if self.label_smoothing and self.trains_mtp(policy.cfg):
            raise ConfigError("label_smoothing has no form for multi-token prediction: set mtp_weight=0.")
        if self.fim_rate and self.fim_ids is not None and rng is not None:
            keys = row_keys(jax.random.fold_in(rng, 1), batch)
            batch = fill_in_the_middle(batch, keys, self.fim_ids, self.fim_rate, self.fim_spm_rate)
        out = self._output(policy, batch, rng)
        scores = cast(TokenScores, out.scores)
        weights_BT = batch["loss_weights"]
        nll = WeightedSum.of(-scores.logprobs, weights_BT)
        loss = WeightedSum(nll.total + self.z_loss * jnp.sum(weights_BT * scores.log_z**2), nll.weight)
        if self.label_smoothing:
            mean_BT = jnp.mean(out.logits[..., : self.smoothed_ids], axis=-1)
            uniform = WeightedSum.of(scores.log_z - mean_BT, weights_BT)
            smoothed = loss.total + self.label_smoothing * (uniform.total - nll.total)
            loss = WeightedSum(smoothed, loss.weight)
        metrics, aux = {"nll": nll}, out.aux
        if self.mtp_weight and out.mtp_scores:
            later, total = mtp_losses(out.mtp_scores, batch)
            loss = WeightedSum(loss.total + self.mtp_weight / len(out.mtp_scores) * total, loss.weight)
            metrics, aux = metrics | later, add_up(aux, out.mtp_aux)
        return with_aux(loss, metrics, aux)

    def _output(self, policy: Model, batch: Batch, rng: jax.Array | None) -> Output:
        """The policy's output, with scores."""
        inputs, options = batch_inputs(batch), ScoreOptions(likeliest=self.trains_mtp(policy.cfg))
        if self.neftune_alpha and rng is not None:
            noise = neftune_noise(batch, row_keys(rng, batch), policy.cfg.token_width, self.neftune_alpha)
            inputs = dataclasses.replace(inputs, embedding_noise=noise)
        if self.label_smoothing:
            out = policy(inputs)
            return dataclasses.replace(out, scores=scores_of_logits(out.logits, batch["targets"], options))
        return policy(inputs, targets=batch["targets"], score_options=options)


def neftune_noise(batch: Batch, keys: jax.Array, width: int, alpha: float) -> jax.Array:
    """[B, T, D]: uniform in +-alpha / sqrt(n D), n the tokens of the document. Jain et al. 2023, arXiv:2310.05914."""
    T = batch["tokens"].shape[1]
    lengths = lambda segments_T: jax.ops.segment_sum(jnp.ones(T), segments_T, T + 1)[segments_T]
    n_BT = jax.vmap(lengths)(batch["segment_ids"])
    unit = jax.vmap(lambda key: jax.random.uniform(key, (T, width), minval=-1.0, maxval=1.0))(keys)
    return unit * (alpha / jnp.sqrt(n_BT * width))[..., None]


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

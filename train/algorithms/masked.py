"""Masked tokens: the objective of encoders, which see both sides."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, cast

import jax

from configs import ConfigError
from data import Tokenizer
from model import WeightedSum
from model.logprobs import ScoreOptions, TokenScores
from train.algorithms.algorithm import Algorithm, Metrics, with_aux
from train.algorithms.corruption import mask_tokens
from train.models import Batch, Models, row_keys


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModelling(Algorithm):
    """BERT's objective on a model without causal attention. Devlin et al. 2018, arXiv:1810.04805."""

    rate: float = 0.15  # share of tokens that are hidden
    mask_token: str = "[MASK]"
    mask_id: int | None = None  # None: the tokenizer's

    batch_kind: ClassVar[str] = "lm"

    def __post_init__(self):
        if not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate}; wanted more than 0 and less than 1.")

    def with_tokenizer(self, tokenizer: Tokenizer) -> MaskedLanguageModelling:
        if self.mask_id is not None:
            return self
        mask_id = tokenizer.id_of(self.mask_token)
        if mask_id is None:
            raise ConfigError(
                f"config.algorithm.mask_token={self.mask_token!r} is no token of the tokenizer. Name its own, or give "
                "mask_id."
            )
        return dataclasses.replace(self, mask_id=mask_id)

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        policy = models["policy"]
        if policy.cfg.causal:
            raise ConfigError(
                "MaskedLanguageModelling needs a model that sees both sides: give config.model.kind=Saved one whose "
                "attention has causal=false, or take LanguageModelling."
            )
        keys = row_keys(jax.random.key(0) if rng is None else rng, batch)
        batch = mask_tokens(batch, keys, cast(int, self.mask_id), policy.cfg.vocab_size, self.rate)
        out = policy.scored(batch, ScoreOptions(likeliest=True))
        scores, weights_BT = cast(TokenScores, out.scores), batch["loss_weights"]
        nll = WeightedSum.of(-scores.logprobs, weights_BT)
        right = WeightedSum.of(scores.likeliest == batch["targets"], weights_BT)
        return with_aux(nll, {"nll": nll, "accuracy": right}, out.aux)

"""The vocabulary readout: logits, or scores of given tokens without storing logits."""

# B batch, T tokens, D model width, V vocabulary, N chosen positions

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, bias_param, fan_in_normal, weight_param
from model.config import ModelConfig
from model.kernels import backend
from model.kernels.cross_entropy.sharded import cross_entropy_on_mesh
from model.logprobs import ScoreOptions, TokenScores
from model.sharding import ShardingRules, constrain
from model.weights import Weight, dense, matmul


@dataclasses.dataclass(frozen=True)
class VocabularyHead:
    """logits = softcap * tanh(scale * (transform(hidden) . head + bias) / softcap)."""

    head_VD: Weight
    bias_V: jax.Array | None = None
    scale: float = 1.0
    softcap: float | None = None
    transform: Callable[[jax.Array], jax.Array] | None = None
    at_BN: jax.Array | None = None  # positions to read; None: all
    rules: ShardingRules | None = None

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32 ([B, N, V] at chosen positions)."""
        return self._logits(self._read(hidden_BTD))

    def scores(
        self, hidden_BTD: jax.Array, targets_BT: jax.Array, score_options: ScoreOptions = ScoreOptions()
    ) -> TokenScores:
        """The scores of targets [B, T] ([B, N] at chosen positions)."""
        hidden_BTD = self._read(hidden_BTD)
        options = {"scale": self.scale, "softcap": self.softcap, "score_options": score_options}
        options |= {"logits": self._logits}
        head_VD = dense(self.head_VD, hidden_BTD.dtype)
        return cross_entropy_on_mesh(hidden_BTD, head_VD, targets_BT, self.bias_V, self.rules, **options)

    def _read(self, hidden_BTD: jax.Array) -> jax.Array:
        if self.at_BN is not None:
            hidden_BTD = jnp.take_along_axis(hidden_BTD, self.at_BN[:, :, None], axis=1)
        return hidden_BTD if self.transform is None else self.transform(hidden_BTD)

    def _logits(self, hidden_BTD: jax.Array) -> jax.Array:
        if backend.for_cpu():
            # matrices, so that XLA computes the logits' gradient once for both of its products
            hidden_ND = hidden_BTD.reshape(math.prod(hidden_BTD.shape[:2]), hidden_BTD.shape[-1])
            logits_NV = matmul(hidden_ND, self.head_VD, "ND,VD->NV", jnp.float32)
            logits_BTV = logits_NV.reshape(*hidden_BTD.shape[:2], logits_NV.shape[-1])
        else:
            logits_BTV = matmul(hidden_BTD, self.head_VD, "BTD,VD->BTV", jnp.float32)
        if self.bias_V is not None:
            logits_BTV += self.bias_V
        logits_BTV *= self.scale
        if (cap := self.softcap) is not None:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        return constrain(logits_BTV, self.rules, "batch", "length", "act_vocab")


def vocabulary_head(
    module: nn.Module,
    cfg: ModelConfig,
    ctx: Context,
    embedding_VD: Weight | None,
    logits_at: jax.Array | None = None,
) -> VocabularyHead:
    """The head of a config; a tied head uses the embedding. Call it within a compact method."""
    head_VD, bias_V, transform = cast(Weight, embedding_VD), None, None
    if cfg.head_transform is not None:
        transform = cfg.head_transform.module(ctx, "head_transform", "the input of the logits")
    if not cfg.tied_head:
        shape, axes, init = (cfg.vocab_size, ctx.width), ("vocab", "embed"), fan_in_normal(ctx.width)
        role = "logits: one direction for each token of the vocabulary"
        head_VD = weight_param(module, ctx, "head", shape, axes, init, (1,), role)
    if cfg.head_bias:
        bias_V = bias_param(module, ctx, "head_bias", (cfg.vocab_size,), ("vocab",))
    return VocabularyHead(
        head_VD, bias_V, cfg.logit_scale, cfg.logit_softcap, transform, logits_at, ctx.rules
    )

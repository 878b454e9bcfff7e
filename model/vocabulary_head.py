"""From hidden states to what the model says of the vocabulary: logits, or scores of given tokens without them."""

# B batch, T tokens, D model width, V vocabulary, N chosen positions

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.cross_entropy.sharded import cross_entropy_on_mesh
from model.logprobs import ScoreOptions, TokenScores
from model.sharding import ShardingRules, constrain


@dataclasses.dataclass(frozen=True)
class VocabularyHead:
    """logits = softcap * tanh(scale * (transform(hidden) . head + bias) / softcap)."""

    head_VD: jax.Array
    bias_V: jax.Array | None = None
    scale: float = 1.0
    softcap: float | None = None
    transform: Callable[[jax.Array], jax.Array] | None = None
    at_BN: jax.Array | None = None  # positions that are read; None: all
    rules: ShardingRules | None = None

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32 ([B, N, V] at chosen positions)."""
        return self._logits(self._read(hidden_BTD))

    def scores(
        self, hidden_BTD: jax.Array, targets_BT: jax.Array, score_options: ScoreOptions = ScoreOptions()
    ) -> TokenScores:
        """Of targets [B, T] ([B, N] at chosen positions)."""
        hidden_BTD = self._read(hidden_BTD)
        options = {"scale": self.scale, "softcap": self.softcap, "score_options": score_options}
        options |= {"logits": self._logits}
        return cross_entropy_on_mesh(hidden_BTD, self.head_VD, targets_BT, self.bias_V, self.rules, **options)

    def _read(self, hidden_BTD: jax.Array) -> jax.Array:
        if self.at_BN is not None:
            hidden_BTD = jnp.take_along_axis(hidden_BTD, self.at_BN[:, :, None], axis=1)
        return hidden_BTD if self.transform is None else self.transform(hidden_BTD)

    def _logits(self, hidden_BTD: jax.Array) -> jax.Array:
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        if backend.for_cpu():
            # of two matrices, so XLA makes the gradient of the logits once for both its products
            flat = product("ND,VD->NV", hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), self.head_VD)
            logits_BTV = flat.reshape(*hidden_BTD.shape[:2], -1)
        else:
            logits_BTV = product("BTD,VD->BTV", hidden_BTD, self.head_VD)
        if self.bias_V is not None:
            logits_BTV += self.bias_V
        logits_BTV *= self.scale
        if (cap := self.softcap) is not None:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        return constrain(logits_BTV, self.rules, "batch", "length", "act_vocab")

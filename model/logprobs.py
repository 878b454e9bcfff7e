"""Log-probabilities of given tokens and entropy, from logits, in float32 nats.

`model.kernels.cross_entropy` computes the same without logits in memory.
"""

# B batch, T tokens, V vocabulary

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.kernels import backend, cpu
from model.kernels.derivatives import differentiable


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """How targets are scored, and the requested scores beside log-probabilities."""

    temperature: float = 1.0  # logits are divided by it, after any soft-cap
    entropy: bool = False
    likeliest: bool = False  # the token with the highest logit, the first one if several are equal
    choices: int | None = None  # larger tokens are never the likeliest; None: all may be

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: logits are divided by it. Wanted more than 0.")
        if self.choices is not None and self.choices < 1:
            raise ValueError(f"choices={self.choices}; wanted at least 1, or None.")

    def choices_of(self, vocab_size: int) -> int:
        return vocab_size if self.choices is None else self.choices


class TokenScores(NamedTuple):
    """Scores of each target, float32 nats; all but `likeliest` have gradients."""

    logprobs: jax.Array
    log_z: jax.Array  # log-sum-exp of the logits, for a z-loss
    entropy: jax.Array | None = None
    likeliest: jax.Array | None = None  # int32


def scores_of_logits(
    logits_BTV: jax.Array, targets_BT: jax.Array, score_options: ScoreOptions = ScoreOptions()
) -> TokenScores:
    """From logits [..., V] and targets [...]."""
    if score_options.temperature != 1:
        logits_BTV = logits_BTV / score_options.temperature
    logprobs_BT, log_z_BT = token_logprobs(logits_BTV, targets_BT)
    entropy_BT = entropy(logits_BTV) if score_options.entropy else None
    likeliest_BT = None
    if score_options.likeliest:
        likeliest_BT = jnp.argmax(logits_BTV[..., : score_options.choices], axis=-1).astype(jnp.int32)
    return TokenScores(logprobs_BT, log_z_BT, entropy_BT, likeliest_BT)


def token_logprobs(logits_BTV: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log p(token), the logits' logsumexp for a z-loss), both [B, T].

    Saves one array of the logits' shape for the backward pass.
    """
    if not backend.for_cpu():
        return _by_hand(logits_BTV, tokens_BT)
    # the shape of the head's product, so that XLA reuses its memory
    both_N = _by_hand(logits_BTV.reshape(tokens_BT.size, logits_BTV.shape[-1]), tokens_BT.reshape(-1))
    logprobs_BT, log_z_BT = (x_N.reshape(tokens_BT.shape) for x_N in both_N)
    return logprobs_BT, log_z_BT


def _forward(logits_BTV: jax.Array, tokens_BT: jax.Array):
    chosen_BT = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0].astype(jnp.float32)
    wide_BTV = logits_BTV.astype(jnp.float32)
    top_BT1 = cpu.row_max(lambda x: x, wide_BTV)
    # the same value, but so the chosen logits are read first
    top_BT1 = jnp.maximum(top_BT1, chosen_BT[..., None])
    top_BT1 = jnp.where(jnp.isfinite(top_BT1), top_BT1, 0)
    weights_BTV = jnp.exp(wide_BTV - top_BT1)  # reuses the memory of the logits, which are no longer needed
    total_BT1 = cpu.row_sum(weights_BTV)
    log_z_BT = (jnp.log(total_BT1) + top_BT1)[..., 0]
    like_logits = jnp.zeros((), logits_BTV.dtype)
    return (chosen_BT - log_z_BT, log_z_BT), (weights_BTV, total_BT1, tokens_BT, like_logits)


def _backward(saved, gradients: tuple[jax.Array, jax.Array]):
    weights_BTV, total_BT1, tokens_BT, like_logits = saved
    of_logprobs_BT1, of_log_z_BT1 = (g_BT[..., None] for g_BT in gradients)
    is_token_BTV = jnp.arange(weights_BTV.shape[-1]) == tokens_BT[..., None]
    d_BTV = weights_BTV * ((of_log_z_BT1 - of_logprobs_BT1) / total_BT1)
    return (d_BTV + jnp.where(is_token_BTV, of_logprobs_BT1, 0)).astype(like_logits.dtype), None


def _tangent(saved, tangents: tuple[jax.Array, None]):
    (weights_BTV, total_BT1, tokens_BT, _), (moved_BTV, _) = saved, tangents
    moved_BTV = moved_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(moved_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    log_z_BT = jnp.sum(weights_BTV * moved_BTV, axis=-1) / total_BT1[..., 0]
    return chosen_BT - log_z_BT, log_z_BT


_by_hand = differentiable(_forward, _tangent, _backward)


def entropy(logits_BTV: jax.Array) -> jax.Array:
    """Entropy of the next-token distribution, [B, T] nats."""
    logprobs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1)

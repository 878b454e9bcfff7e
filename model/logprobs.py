"""Log-probabilities of given tokens and entropy, from logits, in float32 nats."""

# B batch, T tokens, V vocabulary

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_logprobs(logits_BTV: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p(token) at each place, and the log-normaliser (logsumexp of the logits) for a z-loss; both [B, T]."""
    log_z_BT = jax.nn.logsumexp(logits_BTV.astype(jnp.float32), axis=-1)
    chosen_BT = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0].astype(jnp.float32)
    return chosen_BT - log_z_BT, log_z_BT


def entropy(logits_BTV: jax.Array) -> jax.Array:
    """Entropy of the next-token distribution, [B, T] nats."""
    logprobs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1)

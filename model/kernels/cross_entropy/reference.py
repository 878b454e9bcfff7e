"""Cross-entropy from all logits at once: the definition."""

# N tokens, V vocabulary, D model width

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.logprobs import ScoreOptions, TokenScores, scores_of_logits


def from_all_logits(
    hidden_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    bias_V: jax.Array | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    score_options: ScoreOptions = ScoreOptions(),
) -> TokenScores:
    """`cross_entropy` with all logits in memory; hidden states and targets may have any axes before the last."""
    logits_NV = jnp.einsum("...D,VD->...V", hidden_ND, head_VD, preferred_element_type=jnp.float32)
    logits_NV = (logits_NV if bias_V is None else logits_NV + bias_V) * scale
    if softcap is not None:
        logits_NV = softcap * jnp.tanh(logits_NV / softcap)
    return scores_of_logits(logits_NV, targets_N, score_options)

"""Policy-gradient objectives in the trainer's form: `objective(params, batch) -> (WeightedSum, metrics)`.

Beside the usual keys a batch has, all [B, T] float32: `sampler_logprobs` of the targets at the sampling temperature,
and `advantages`.
"""

# B rows, T tokens

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from model import ModelConfig, ShardingRules, WeightedSum
from model.function import Params
from model.logprobs import ScoreOptions, TokenScores
from train.objectives import Batch, Objective, scored, with_aux


def grpo(
    cfg: ModelConfig,
    *,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    rules: ShardingRules | None = None,
) -> Objective:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), summed over all tokens, divided by all tokens.

    rho = exp(log-probability now - the sampler's own). Token-level loss and clip-higher: Yu et al. 2025,
    arXiv:2503.14476. `mismatch_kl` is the k3 estimate of KL(sampler || trainer); on the first update after a rollout
    the parameters are the sampler's, so it measures how far the two programs disagree.
    """

    def objective(params: Params, batch: Batch):
        out = scored(cfg, params, batch, ScoreOptions(temperature, entropy=True), rules)
        scores = cast(TokenScores, out.scores)
        logprobs_BT = scores.logprobs  # taken at the sampling temperature
        weights_BT, advantages_BT = batch["loss_weights"], batch["advantages"]
        log_ratio_BT = jnp.where(weights_BT > 0, logprobs_BT - batch["sampler_logprobs"], 0.0)
        ratio_BT = jnp.exp(log_ratio_BT)
        clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
        gain_BT = jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
        metrics = {
            "mismatch_kl": WeightedSum.of(kl_k3(logprobs_BT, batch["sampler_logprobs"]), weights_BT),
            "clipped": WeightedSum.of(gain_BT < ratio_BT * advantages_BT, weights_BT),
            "entropy": WeightedSum.of(jax.lax.stop_gradient(cast(jax.Array, scores.entropy)), weights_BT),
        }
        return with_aux(WeightedSum.of(-gain_BT, weights_BT), metrics, out.aux)

    return objective


def kl_k3(logprobs: jax.Array, sampler_logprobs: jax.Array) -> jax.Array:
    """Per-token estimate of KL(sampler || policy) in nats from the sampler's tokens: r - 1 - log r, never negative.

    r = policy / sampler. Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = logprobs - sampler_logprobs
    return jnp.expm1(log_ratio) - log_ratio

"""Objectives: `objective(params, batch) -> (WeightedSum, dict[str, WeightedSum])`, sums not yet divided.

A batch is a dict of [B, T] arrays: tokens, targets, loss_weights, segment_ids, positions.
"""

# B rows, T tokens, N preference pairs (B = 2 N)

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp

from model import Inputs, ModelConfig, ShardingRules, WeightedSum, apply
from model.blocks.balance import document_mean
from model.blocks.common import add_up
from model.function import Output, Params
from model.logprobs import ScoreOptions, TokenScores
from model.readouts.mtp import look_ahead, same_segment

Batch = dict[str, jax.Array]
Objective = Callable[[Params, Batch], tuple[WeightedSum, dict[str, WeightedSum]]]


def batch_logprobs(cfg: ModelConfig, params: Params, batch: Batch, rules: ShardingRules | None = None):
    """(log p of the targets, log-normalizer, the blocks' aux) of a packed batch; the first two [B, T] float32 nats."""
    out = scored(cfg, params, batch, ScoreOptions(), rules)
    scores = cast(TokenScores, out.scores)
    return scores.logprobs, scores.log_z, out.aux


def scored(
    cfg: ModelConfig, params: Params, batch: Batch, options: ScoreOptions, rules: ShardingRules | None = None
) -> Output:
    """The output of a packed batch, with the scores of its targets instead of logits."""
    weights_BT = router_weights(batch) if "router_weights" not in batch else batch["router_weights"]
    inputs = Inputs.from_batch(batch, loss_weights=weights_BT)
    return apply(
        cfg, params, inputs, targets=batch["targets"], score_options=options, rules=rules, train=True
    )


def router_weights(batch: Batch) -> jax.Array:
    """[B, T] float32: the loss weight of each document, spread evenly over its tokens.

    They weight the routers' losses. In any part of a batch they sum to the objective's weights, so the loss does not
    depend on how the batch is split.
    """
    segment_ids_BT = batch["segment_ids"]
    weights_BT = document_mean(batch["loss_weights"][..., None], segment_ids_BT)[..., 0]
    return jnp.where(segment_ids_BT != 0, weights_BT, 0.0)


def with_aux(
    loss: WeightedSum, metrics: dict[str, WeightedSum], aux: dict[str, WeightedSum]
) -> tuple[WeightedSum, dict[str, WeightedSum]]:
    """The loss plus the losses of blocks (of routers), and the metrics with those of blocks.

    Means are added: the mean of `aux["loss"]` is scaled by the weight of the objective's loss.
    """
    metrics = metrics | {name: value for name, value in aux.items() if name != "loss"}
    if "loss" not in aux:
        return loss, metrics
    return WeightedSum(loss.total + aux["loss"].mean() * loss.weight, loss.weight), metrics


def language_modelling(
    cfg: ModelConfig, rules: ShardingRules | None = None, z_loss: float = 0.0, mtp_weight: float = 0.3
) -> Objective:
    """Cross-entropy weighted by `loss_weights`, plus z_loss * log(Z)^2, plus mtp_weight times the mean MTP loss.

    Pretraining and supervised fine-tuning differ in the dataset's mask only. Z-loss: Chowdhery et al. 2022,
    arXiv:2204.02311. The sum of each MTP module is divided by the weight of the next-token loss, as in DeepSeek-V3
    (arXiv:2412.19437, section 2.2), so the loss does not depend on how the batch is split.
    """
    options = ScoreOptions(likeliest=mtp_weight != 0 and cfg.mtp is not None)

    def objective(params: Params, batch: Batch):
        out = scored(cfg, params, batch, options, rules)
        scores = cast(TokenScores, out.scores)
        logprobs_BT, log_z_BT = scores.logprobs, scores.log_z
        weights_BT = batch["loss_weights"]
        nll = WeightedSum.of(-logprobs_BT, weights_BT)
        loss = WeightedSum(nll.total + z_loss * jnp.sum(weights_BT * log_z_BT**2), nll.weight)
        metrics, aux = {"nll": nll}, out.aux
        if mtp_weight and out.mtp_scores:
            later, total = mtp_losses(out.mtp_scores, batch)
            loss = WeightedSum(loss.total + mtp_weight / len(out.mtp_scores) * total, loss.weight)
            metrics, aux = metrics | later, add_up(aux, out.mtp_aux)
        return with_aux(loss, metrics, aux)

    return objective


def mtp_losses(
    scores_by_module: tuple[TokenScores, ...], batch: Batch
) -> tuple[dict[str, WeightedSum], jax.Array]:
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


def dpo(
    cfg: ModelConfig, rules: ShardingRules | None = None, beta: float = 0.1, label_smoothing: float = 0.0
) -> Objective:
    """Direct preference optimization (DPO); Rafailov et al. 2023, arXiv:2305.18290.

    Rows 2n and 2n + 1 are the chosen and the rejected completion of one prompt. The batch also has
    `reference_logprobs` [B, T], the frozen model's log-probabilities of the same targets (see `with_reference`).
    Label smoothing e gives conservative DPO: (1 - e) L(delta) + e L(-delta).
    """

    def objective(params: Params, batch: Batch):
        weights_BT = batch["loss_weights"]
        batch = batch | {"router_weights": _pair_weights(batch)}
        logprobs_BT, _, aux = batch_logprobs(cfg, params, batch, rules)
        ratio_B = jnp.sum((logprobs_BT - batch["reference_logprobs"]) * weights_BT, axis=1)
        chosen_N, rejected_N = ratio_B.reshape(-1, 2).T
        margin_N = beta * (chosen_N - rejected_N)
        loss_N = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin_N) - label_smoothing * jax.nn.log_sigmoid(
            -margin_N
        )
        real_N = _real_pairs(batch)
        metrics = {
            "accuracy": WeightedSum.of(margin_N > 0, real_N),
            "margin": WeightedSum.of(margin_N, real_N),
            "chosen_reward": WeightedSum.of(beta * chosen_N, real_N),
            "rejected_reward": WeightedSum.of(beta * rejected_N, real_N),
        }
        return with_aux(WeightedSum.of(loss_N, real_N), metrics, aux)

    return objective


def _real_pairs(batch: Batch) -> jax.Array:
    """[N] float32: 1 if both completions have tokens with a loss weight."""
    counted_B = jnp.sum(batch["loss_weights"], axis=1)
    return (counted_B.reshape(-1, 2).min(axis=1) > 0).astype(jnp.float32)


def _pair_weights(batch: Batch) -> jax.Array:
    """As `router_weights`, for pairs of weight 1: each completion's tokens sum to a half."""
    real_BT = (batch["segment_ids"] != 0).astype(jnp.float32)
    half_B = 0.5 * jnp.repeat(_real_pairs(batch), 2) / jnp.maximum(real_BT.sum(axis=1), 1)
    return real_BT * half_B[:, None]


def with_reference(
    cfg: ModelConfig, reference: Params, batch: Batch, rules: ShardingRules | None = None
) -> Batch:
    """The batch with `reference_logprobs` of the frozen model."""
    logprobs_BT, _, _ = batch_logprobs(cfg, reference, batch, rules)
    return batch | {"reference_logprobs": jax.lax.stop_gradient(logprobs_BT)}

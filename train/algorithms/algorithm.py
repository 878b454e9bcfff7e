"""What the trainer runs: an algorithm says which models it needs, and computes its loss from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from data import Tokenizer
from model import ModelConfig, ShardingRules, WeightedSum
from model.function import Params
from train.models import Batch, Models, Role, bind

Metrics = dict[str, WeightedSum]


class Algorithm(Protocol):
    """One training algorithm; its fields are the keys of `config.algorithm`.

    A loss and its metrics are sums with their weights. The learner adds them up over microbatches and devices and
    divides once, so a sum must not depend on which rows come together in a part of the batch. What does depend on other
    rows (a mean over the batch) belongs in `prepare`, which sees the whole batch.
    """

    batch_kind: ClassVar[str]  # of data's batches, or "trajectory"
    min_rows: ClassVar[int] = 1  # of a batch, where `prepare` compares a row with others

    def roles(self) -> dict[str, Role]:
        """The models by name. "policy" is trained, and is what a run's checkpoint holds as its model."""
        return {"policy": Role(trained=True)}

    def prepare(self, models: Models, batch: Batch) -> Batch:
        """The batch with more arrays [B, ...] for `loss`, computed without gradient."""
        return batch

    def loss(self, models: Models, batch: Batch, rng: jax.Array | None) -> tuple[WeightedSum, Metrics]:
        """The loss and metrics of a part of the batch.

        `rng` is the step's key (see `models.row_keys`), or None for a measurement without noise.
        """
        ...

    def with_tokenizer(self, tokenizer: Tokenizer) -> Algorithm:
        """The algorithm with what it needs of the run's tokenizer. Raises ConfigError for what the tokenizer lacks."""
        return self

    def check_models(self, cfgs: Mapping[str, ModelConfig]) -> None:
        """Raises ConfigError for models of the roles that do not fit each other."""

    def trains_mtp(self, cfg: ModelConfig) -> bool:
        """Whether the loss uses the model's modules for multi-token prediction."""
        return False


def objective_of(
    algorithm: Algorithm, cfg: ModelConfig, rules: ShardingRules | None = None, rng: jax.Array | None = None
):
    """`objective(params, batch) -> (loss, metrics)` of an algorithm with one model."""

    def objective(params: Params, batch: Batch) -> tuple[WeightedSum, Metrics]:
        models = bind({"policy": cfg}, {"policy": Role(trained=True)}, {"policy": params}, rules)
        rows = {"row": jnp.arange(len(batch["tokens"]))}
        return algorithm.loss(models, rows | batch, rng)

    return objective


def with_aux(
    loss: WeightedSum, metrics: Metrics, aux: Mapping[str, WeightedSum]
) -> tuple[WeightedSum, Metrics]:
    """The loss plus the losses of blocks (of routers), and the metrics with those of blocks.

    Means are added: the mean of `aux["loss"]` is scaled by the weight of the algorithm's loss.
    """
    metrics = metrics | {name: value for name, value in aux.items() if name != "loss"}
    if "loss" not in aux:
        return loss, metrics
    return WeightedSum(loss.total + aux["loss"].mean() * loss.weight, loss.weight), metrics


def pairs(x_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows 2n and 2n + 1, the chosen and the rejected completion of a pair: [B, ...] to two of [B / 2, ...]."""
    return x_B[0::2], x_B[1::2]


def completion_sums(logprobs_BT: jax.Array, batch: Batch) -> jax.Array:
    """[B] log-probabilities of whole completions."""
    return jnp.sum(jnp.where(batch["loss_weights"] > 0, logprobs_BT * batch["loss_weights"], 0.0), axis=1)


def completion_averages(logprobs_BT: jax.Array, batch: Batch) -> jax.Array:
    """[B] log-probabilities of completions, divided by their numbers of tokens."""
    return completion_sums(logprobs_BT, batch) / jnp.maximum(jnp.sum(batch["loss_weights"], axis=1), 1)


def real_rows(batch: Batch) -> jax.Array:
    """[B] float32: 1 for a row with tokens that count, 0 for a row that fills up a batch."""
    return (jnp.sum(batch["loss_weights"], axis=1) > 0).astype(jnp.float32)


def real_pairs(batch: Batch) -> jax.Array:
    """[B / 2] float32: 1 if both completions have tokens that count."""
    chosen, rejected = pairs(real_rows(batch))
    return chosen * rejected


def with_row_weights(batch: Batch, weights_B: jax.Array) -> Batch:
    """The batch with `router_weights`, so that routers' losses weigh a row as the loss does: evenly over its tokens."""
    real_BT = (batch["segment_ids"] != 0).astype(jnp.float32)
    share_B = weights_B / jnp.maximum(real_BT.sum(axis=1), 1)
    return batch | {"router_weights": real_BT * share_B[:, None]}

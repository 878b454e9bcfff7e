"""The models of a run: roles, and a role's model with its parameters bound."""

# B rows, T tokens

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from model import Inputs, ModelConfig, Output, ShardingRules, apply
from model.adapters import drop_adapters, join, split_trained
from model.blocks.balance import document_mean
from model.function import Params
from model.logprobs import ScoreOptions, TokenScores
from model.readouts.heads import Readout
from model.sharding import constrain

Batch = dict[str, jax.Array]
KeptDtype = Literal["float32", "bfloat16", "int8", "nf4"]


@dataclasses.dataclass(frozen=True)
class Role:
    """What a run does with one of its models: where it starts, whether it is trained, and how it is kept.

    Attributes:
      source: a path that `init_from` takes; None: the start of the policy.
      trained: it has gradients and an optimizer state. Other roles are frozen.
      without_adapters: the policy with its adapters switched off; it has no parameters of its own.
      shares_base: its own adapters over the policy's frozen parameters.
      head: a readout that the model has. If the source lacks it, it is new: zero, or a copy of `head_from`.
      head_from: name of a readout of the source, of the same shape.
      needs_head: a source without `head` is an error.
      dtype: of its parameters; None: `config.precision` decides.
      rules: sharding of its parameters and activations; None: those of the run.
      lr_scale: its learning rate is the run's, times this.
    """

    source: str | None = None
    trained: bool = False
    without_adapters: bool = False
    shares_base: bool = False
    head: Readout | None = None
    head_from: str | None = None
    needs_head: bool = False
    dtype: KeptDtype | None = None
    rules: ShardingRules | None = None
    lr_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Model:
    """A role's model: `model(inputs)` is `model.apply` with its config and parameters.

    Attributes:
      parts: `logprobs` and `read_head` run on this many parts of a batch in turn, so that memory holds one.
    """

    cfg: ModelConfig
    params: Params
    rules: ShardingRules | None = None
    train: bool = True  # as in `model.apply`
    parts: int = 1

    def __call__(self, inputs: Inputs | jax.Array, cache: Any = None, **options: Any) -> Output:
        return apply(
            self.cfg, self.params, inputs, cache, **({"rules": self.rules, "train": self.train} | options)
        )

    def scored(self, batch: Batch, options: ScoreOptions = ScoreOptions()) -> Output:
        """The output of a packed batch, with the scores of its targets instead of logits."""
        return self(batch_inputs(batch), targets=batch["targets"], score_options=options)

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> jax.Array:
        """[B, T] float32 nats, log-probabilities of the targets; no gradient."""
        options = ScoreOptions(temperature)
        score = lambda part: cast(TokenScores, self.scored(part, options).scores).logprobs
        return jax.lax.stop_gradient(in_parts(score, batch, self.parts, self.rules))

    def read_head(self, batch: Batch, name: str) -> jax.Array:
        """The output of a readout, [B, T] float32 for a scalar head; no gradient."""
        read = lambda part: self(batch_inputs(part), logits_at=no_logits(part)).heads[name]
        return jax.lax.stop_gradient(in_parts(read, batch, self.parts, self.rules))


Models = Mapping[str, Model]


def bind(
    cfgs: Mapping[str, ModelConfig],
    roles: Mapping[str, Role],
    params: Mapping[str, Params],
    rules: ShardingRules | None = None,
    parts: int = 1,
) -> dict[str, Model]:
    """Each role's `Model`; roles that are the policy without adapters share its parameters."""
    models = {}
    for name, role in roles.items():
        if role.without_adapters:
            cfg, own = drop_adapters(cfgs["policy"], params["policy"])
        elif role.shares_base:
            cfg, own = cfgs[name], join(params[name], split_trained(params["policy"])[1])
        else:
            cfg, own = cfgs[name], params[name]
        models[name] = Model(cfg, own, role.rules or rules, parts=parts)
    return models


def batch_inputs(batch: Batch) -> Inputs:
    """The model's inputs of a batch; `router_weights`, where there are any, weigh the routers' losses."""
    weights_BT = router_weights(batch) if "router_weights" not in batch else batch["router_weights"]
    return Inputs.from_batch(batch, loss_weights=weights_BT)


def router_weights(batch: Batch) -> jax.Array:
    """[B, T] float32: the loss weight of each document, spread evenly over its tokens.

    They weight the routers' losses. In any part of a batch they sum to the weights of the loss, so the loss does not
    depend on how the batch is split.
    """
    segment_ids_BT = batch["segment_ids"]
    weights_BT = document_mean(batch["loss_weights"][..., None], segment_ids_BT)[..., 0]
    return jnp.where(segment_ids_BT != 0, weights_BT, 0.0)


def no_logits(batch: Batch) -> jax.Array:
    """`logits_at` for a forward pass without use of its logits: one token a row."""
    return jnp.zeros((len(batch["tokens"]), 1), jnp.int32)


def split_rows(batch: Any, parts: int, rules: ShardingRules | None) -> Any:
    """A batch [B, ...] as `parts` equal parts of neighbouring rows, [parts, B / parts, ...]."""

    def split(x):
        x = x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
        return constrain(x, rules, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(split, batch)


def in_parts(function: Any, batch: Batch, parts: int, rules: ShardingRules | None = None) -> Any:
    """`function(batch)`, of rows that do not depend on each other, computed on one part of the rows after another."""
    if parts == 1:
        return function(batch)
    found = jax.lax.map(function, split_rows(batch, parts, rules))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def row_keys(rng: jax.Array, batch: Batch) -> jax.Array:
    """[B] keys, each from the row's index in the whole batch, so that noise does not depend on how it is split."""
    return jax.vmap(lambda row: jax.random.fold_in(rng, row))(batch["row"])

"""The train step: any objective, any optimizer, on the mesh that is set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from model import ShardingRules, WeightedSum
from model.adapters import join, split_trained
from model.function import Params
from model.kernels import cpu
from model.sharding import constrain
from train.objectives import Batch, Objective
from train.optimizer import global_norm

Metrics = dict[str, WeightedSum]


@flax.struct.dataclass
class TrainState:
    step: jax.Array  # int32, steps taken, the skipped ones too
    params: Params
    opt_state: optax.OptState
    skipped: jax.Array  # int32, steps whose loss or gradient was not finite
    rng: jax.Array  # uint32 [2], the data of a key; a step's own is this one with the step folded in


def new_state(params: Params, optimizer: optax.GradientTransformation, seed: int = 0) -> TrainState:
    opt_state, zero = optimizer.init(split_trained(params)[0]), lambda: jnp.zeros((), jnp.int32)
    # two zeros: a buffer that is donated can be one array of the state only
    return TrainState(zero(), params, opt_state, zero(), jax.random.key_data(jax.random.key(seed)))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    rules: ShardingRules | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step as a pure function; jit it with the state donated.

    A model with adapters trains them alone: other parameters have no gradient and no optimizer state. A step whose loss
    or gradient is not finite changes neither parameters nor optimizer, and counts in `skipped`. A step in which no
    token counts changes nothing either: momentum alone would move the parameters without any signal.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trained, rest = split_trained(state.params)
        trainable_loss = lambda trained, batch: objective(join(trained, rest), batch)
        grads, (loss, metrics) = accumulate(trainable_loss, trained, batch, microbatches, rules)
        # divided where they are read, so that no second copy of the gradient is in memory
        share = 1 / jnp.maximum(loss.weight, 1e-9)
        mean_grads = lambda: jax.tree.map(lambda g: g * share, grads)
        grad_norm = global_norm(mean_grads())
        finite = jnp.isfinite(loss.total) & jnp.isfinite(grad_norm)
        take_step = finite & (loss.weight > 0)
        trained, opt_state = _update(optimizer, take_step, mean_grads, trained, state.opt_state)
        bad = 1 - finite.astype(jnp.int32)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=join(trained, rest),
            opt_state=opt_state,
            skipped=state.skipped + bad,
        )
        extra = {"loss": loss, "grad_norm": WeightedSum.one(grad_norm), "skipped": WeightedSum.one(bad)}
        return state, metrics | extra

    return train_step


def _update(
    optimizer: optax.GradientTransformation,
    take_step: jax.Array,
    grads: Callable[[], Params],
    params: Params,
    opt_state: optax.OptState,
):
    """(new parameters, new optimizer state); the old ones unless `take_step`."""
    keep = functools.partial(jax.tree.map, functools.partial(jnp.where, take_step))

    def new_params(opt_state):
        updates, _ = optimizer.update(grads(), opt_state, params)
        return keep(optax.apply_updates(params, updates), params)

    new, (opt_state,) = cpu.compute_first(new_params, opt_state)
    return new, keep(optimizer.update(grads(), opt_state, params)[1], opt_state)


def accumulate(
    objective: Objective, params: Params, batch: Batch, microbatches: int, rules: ShardingRules | None = None
) -> tuple[Params, tuple[WeightedSum, Metrics]]:
    """The gradient of the summed loss, and the loss and metrics, added up over equal parts of the batch.

    Nothing is divided here: sums and weights add up, and the step divides once.
    """

    def total(params, part):
        loss, metrics = objective(params, part)
        return loss.total, (loss, metrics)

    grad = jax.grad(total, has_aux=True)
    if microbatches == 1:
        return grad(params, batch)

    def split(x):
        x = x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:])
        return constrain(x, rules, None, "batch", *[None] * (x.ndim - 2))

    parts = jax.tree.map(split, batch)
    first = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

    def body(carry, part):
        return jax.tree.map(jnp.add, carry, grad(params, part)), None

    return jax.lax.scan(body, zeros, parts)[0]

"""The train step: any objective, any optimizer, on the current mesh."""

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
    step: jax.Array  # int32, steps taken, including skipped ones
    params: Params
    opt_state: optax.OptState
    skipped: jax.Array  # int32, steps whose loss or gradient was not finite
    rng: jax.Array  # uint32 [2], key data; fold in `step` for a step's key


def new_state(params: Params, optimizer: optax.GradientTransformation, seed: int = 0) -> TrainState:
    opt_state, zero = optimizer.init(split_trained(params)[0]), lambda: jnp.zeros((), jnp.int32)
    # two zeros, because two arrays of a donated state cannot inverse_weight a buffer
    return TrainState(zero(), params, opt_state, zero(), jax.random.key_data(jax.random.key(seed)))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    rules: ShardingRules | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step as a pure function; jit it with the state donated.

    A model with adapters trains only them: other parameters have no gradient and no optimizer state. If the loss or the
    gradient is not finite, parameters and optimizer state stay as they are, and `skipped` counts the step. They also
    stay if no token has a loss weight: momentum would move the parameters without any signal.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trained, rest = split_trained(state.params)
        trainable_loss = lambda trained, batch: objective(join(trained, rest), batch)
        grads, (loss, metrics) = accumulate(trainable_loss, trained, batch, microbatches, rules)
        # divided at each use, so that memory holds no second copy of the gradients
        inverse_weight = 1 / jnp.maximum(loss.weight, 1e-9)
        mean_grads = lambda: jax.tree.map(lambda g: g * inverse_weight, grads)
        grad_norm = global_norm(mean_grads())
        finite = jnp.isfinite(loss.total) & jnp.isfinite(grad_norm)
        apply_update = finite & (loss.weight > 0)
        trained, opt_state = _update(optimizer, apply_update, mean_grads, trained, state.opt_state)
        nonfinite = 1 - finite.astype(jnp.int32)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=join(trained, rest),
            opt_state=opt_state,
            skipped=state.skipped + nonfinite,
        )
        extra = {"loss": loss, "grad_norm": WeightedSum.one(grad_norm), "skipped": WeightedSum.one(nonfinite)}
        return state, metrics | extra

    return train_step


def _update(
    optimizer: optax.GradientTransformation,
    apply_update: jax.Array,
    grads: Callable[[], Params],
    params: Params,
    opt_state: optax.OptState,
):
    """(new parameters, new optimizer state), or the old ones if `apply_update` is false."""
    keep = functools.partial(jax.tree.map, functools.partial(jnp.where, apply_update))

    def new_params(opt_state):
        updates, _ = optimizer.update(grads(), opt_state, params)
        return keep(optax.apply_updates(params, updates), params)

    new, (opt_state,) = cpu.compute_first(new_params, opt_state)
    return new, keep(optimizer.update(grads(), opt_state, params)[1], opt_state)


def accumulate(
    objective: Objective, params: Params, batch: Batch, microbatches: int, rules: ShardingRules | None = None
) -> tuple[Params, tuple[WeightedSum, Metrics]]:
    """The gradient of the summed loss, the loss and the metrics, summed over equal parts of the batch.

    Nothing is divided here; the step divides once.
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

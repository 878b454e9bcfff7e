"""The train step: any algorithm, any optimizer, on the current mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from model import ModelConfig, ShardingRules, WeightedSum
from model.adapters import join, split_trained
from model.function import Params
from train.algorithms.algorithm import Algorithm, Metrics
from train.models import Batch, Role, bind, split_rows
from train.optimizers.clip import global_norm
from train.rounding import Rounding, apply_updates

ByRole = Mapping[str, Any]
Optimizers = Mapping[str, optax.GradientTransformation]


@flax.struct.dataclass
class State:
    """What a checkpoint holds."""

    step: jax.Array  # int32, steps taken, including skipped ones
    params: dict[str, Params]  # of each trained role
    opt_state: dict[str, optax.OptState]  # of each trained role
    rng: jax.Array  # uint32 [2], key data; fold in `step` for a step's key
    # "skipped": int32, steps without a finite loss or gradient; "average": the policy's moving average
    extra: dict[str, Any]


def new_state(
    params: Mapping[str, Params], optimizers: Optimizers, seed: int = 0, average: bool = False
) -> State:
    """The state before the first step; `average`: with a moving average of the policy's trained parameters."""
    trained = {role: split_trained(params[role])[0] for role in optimizers}
    # moments are float32, whatever the parameters are
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    opt_state = {role: optimizer.init(wide(trained[role])) for role, optimizer in optimizers.items()}
    zero = lambda: jnp.zeros(
        (), jnp.int32
    )  # one for each use: two arrays of a donated state cannot share a buffer
    extra: dict[str, Any] = {"skipped": zero()}
    if average:
        extra["average"] = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trained["policy"])
    return State(
        zero(),
        {role: params[role] for role in optimizers},
        opt_state,
        jax.random.key_data(jax.random.key(seed)),
        extra,
    )


def make_train_step(
    algorithm: Algorithm,
    cfgs: Mapping[str, ModelConfig],
    optimizers: Optimizers,
    microbatches: int = 1,
    rules: ShardingRules | None = None,
    *,
    roles: Mapping[str, Role] | None = None,
    rounding: Rounding = "nearest",
    average_decay: float = 0.0,
) -> Callable[..., tuple[State, Metrics]]:
    """The step as a pure function (state, frozen, batch) -> (state, metrics); jit it with the state donated.

    `frozen` has the parameters of the roles that are not trained. A model with adapters trains only them: other
    parameters have no gradient and no optimizer state. If the loss or the gradient is not finite, parameters and
    optimizer state stay as they are, and "skipped" counts the step. They also stay if no token has a loss weight:
    momentum would move the parameters without any signal.

    Args:
      cfgs: of each role that has parameters.
      optimizers: of each trained role.
      roles: default: those of the algorithm.
      average_decay: above 0: the state's moving average of the policy keeps this share at each step.
    """
    roles = algorithm.roles() if roles is None else roles

    def train_step(state: State, frozen: ByRole, batch: Batch) -> tuple[State, Metrics]:
        rng, rounding_rng = jax.random.split(
            jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        )
        trained, rest = _split(state.params)
        batch = batch | {"row": jnp.arange(len(batch["tokens"]))}

        def loss_of(trained: ByRole, part: Batch):
            models = bind(cfgs, roles, _joined(trained, rest) | dict(frozen), rules)
            return algorithm.loss(models, part, rng)

        grads, (loss, metrics) = accumulate(loss_of, trained, batch, microbatches, rules)
        inverse_weight = 1 / jnp.maximum(loss.weight, 1e-9)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * inverse_weight, grads)
        norms = {role: global_norm(grads[role]) for role in optimizers}
        finite = jnp.isfinite(loss.total) & jnp.isfinite(sum(norms.values()))
        apply = finite & (loss.weight > 0)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(apply, n, o), new, old)
        params, opt_state = {}, {}
        for role, optimizer in optimizers.items():
            first = lambda params, role=role: _mean(loss_of, trained | {role: params}, batch, microbatches)
            updates, new = optax.with_extra_args_support(optimizer).update(
                grads[role], state.opt_state[role], trained[role], obj_fn=first
            )
            key = jax.random.fold_in(rounding_rng, len(params))
            params[role] = keep(apply_updates(trained[role], updates, rounding, key), trained[role])
            opt_state[role] = keep(new, state.opt_state[role])
        nonfinite = 1 - finite.astype(jnp.int32)
        extra = state.extra | {"skipped": state.extra["skipped"] + nonfinite}
        if average_decay:
            extra["average"] = keep(
                _averaged(extra["average"], params["policy"], average_decay), extra["average"]
            )
        state = dataclasses.replace(
            state, step=state.step + 1, params=_joined(params, rest), opt_state=opt_state, extra=extra
        )
        of_step = {"loss": loss, "skipped": WeightedSum.one(nonfinite)}
        of_step |= {_norm_name(role): WeightedSum.one(norm) for role, norm in norms.items()}
        return state, metrics | of_step

    return train_step


def accumulate(
    objective: Callable[[Any, Batch], tuple[WeightedSum, Metrics]],
    params: Any,
    batch: Batch,
    microbatches: int,
    rules: ShardingRules | None = None,
) -> tuple[Any, tuple[WeightedSum, Metrics]]:
    """The gradient of the summed loss, the loss and the metrics, summed over equal parts of the batch.

    Nothing is divided here; the step divides once.
    """

    def total(params, part):
        loss, metrics = objective(params, part)
        return loss.total, (loss, metrics)

    grad = jax.grad(total, has_aux=True)
    if microbatches == 1:
        return grad(params, batch)
    parts = split_rows(batch, microbatches, rules)
    first = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts))
    # bfloat16 gradients are summed in float32
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), first)

    def body(carry, part):
        return jax.tree.map(jnp.add, carry, grad(params, part)), None

    return jax.lax.scan(body, zeros, parts)[0]


def _split(params: ByRole) -> tuple[dict, dict]:
    """({role: trained parameters}, {role: the rest})."""
    both = {role: split_trained(tree) for role, tree in params.items()}
    return {role: trained for role, (trained, _) in both.items()}, {
        role: rest for role, (_, rest) in both.items()
    }


def _joined(trained: ByRole, rest: ByRole) -> dict[str, Params]:
    return {role: join(trained[role], rest[role]) for role in trained}


def _mean(objective, params, batch: Batch, microbatches: int) -> jax.Array:
    """The mean loss of the first part of the batch, for optimizers that differentiate it again."""
    rows = len(batch["tokens"]) // microbatches
    loss, _ = objective(params, jax.tree.map(lambda x: x[:rows], batch))
    return loss.total / jnp.maximum(loss.weight, 1e-9)


def _averaged(average: Params, params: Params, decay: float) -> Params:
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p.astype(jnp.float32), average, params)


def _norm_name(role: str) -> str:
    return "grad_norm" if role == "policy" else f"{role}_grad_norm"

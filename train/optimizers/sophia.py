"""Sophia: a momentum divided by the clipped diagonal of the Hessian. Liu et al. 2023, arXiv:2305.14342."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import hutchinson_estimator_diag_hessian

from model import ModelConfig
from train.optimizers.checks import Checked


class SophiaState(NamedTuple):
    count: jax.Array  # int32
    momentum: Any
    hessian: Any  # moving average of the diagonal
    estimator: Any


@dataclasses.dataclass(frozen=True)
class Sophia(Checked):
    """Sophia-H: every `interval` steps one Hessian-vector product on a part of the batch estimates the diagonal.

    Hutchinson's estimator differentiates the loss twice, so it runs on CPUs, and elsewhere where `config.run.kernels`
    name implementations that have second derivatives.
    """

    peak_lr: float = 4e-4
    b1: float = 0.965
    b2: float = 0.99
    gamma: float = 0.01  # a coordinate's step is clipped where the momentum exceeds gamma times the diagonal
    eps: float = 1e-12
    interval: int = 10  # steps between two estimates
    seed: int = 0  # of the estimator's signs
    weight_decay: float = 0.2
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping

    def direction(self, cfg: ModelConfig) -> optax.GradientTransformationExtraArgs:
        key = jax.random.key_data(jax.random.key(self.seed))
        estimator = optax.with_extra_args_support(hutchinson_estimator_diag_hessian(key))
        return self.with_estimator(estimator)

    def with_estimator(
        self, estimator: optax.GradientTransformationExtraArgs
    ) -> optax.GradientTransformationExtraArgs:
        """Algorithm 3 of the paper; `estimator.update` gives the diagonal in place of a gradient."""

        def init(params: Any) -> Any:
            zeros = lambda: jax.tree.map(jnp.zeros_like, params)
            return SophiaState(jnp.zeros((), jnp.int32), zeros(), zeros(), estimator.init(params))

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            def estimate():
                diagonal, new = estimator.update(updates, state.estimator, params, **extra)
                return optax.tree.update_moment(diagonal, state.hessian, self.b2, 1), new

            due = state.count % self.interval == 0
            hessian, new = jax.lax.cond(due, estimate, lambda: (state.hessian, state.estimator))
            momentum = optax.tree.update_moment(updates, state.momentum, self.b1, 1)
            step = lambda m, h: jnp.clip(m / jnp.maximum(self.gamma * h, self.eps), -1, 1)
            return jax.tree.map(step, momentum, hessian), SophiaState(state.count + 1, momentum, hessian, new)

        return optax.GradientTransformationExtraArgs(init, update)

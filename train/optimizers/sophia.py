"""Sophia: a momentum divided by the clipped diagonal of the Hessian. Liu et al. 2023, arXiv:2305.14342."""

from __future__ import annotations

import dataclasses

import jax
import optax
from optax.contrib import hutchinson_estimator_diag_hessian, sophia

from model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Sophia:
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
        estimator = hutchinson_estimator_diag_hessian(jax.random.key_data(jax.random.key(self.seed)))
        step = sophia(
            1.0,
            self.b1,
            self.b2,
            self.eps,
            weight_decay=0.0,
            gamma=self.gamma,
            update_interval=self.interval,
            hessian_diagonal_fn=estimator,
        )
        return optax.chain(step, optax.scale(-1.0))

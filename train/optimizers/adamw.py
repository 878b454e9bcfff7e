"""AdamW with decoupled weight decay. Loshchilov and Hutter 2017, arXiv:1711.05101."""

from __future__ import annotations

import dataclasses

import optax

from model import ModelConfig
from train.optimizers.checks import Checked


@dataclasses.dataclass(frozen=True)
class AdamW(Checked):
    """Adam with decoupled weight decay of matrices."""

    peak_lr: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping

    def direction(self, cfg: ModelConfig) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)

"""Lion, the sign of a momentum: half of Adam's state. Chen et al. 2023, arXiv:2302.06675."""

from __future__ import annotations

import dataclasses

import optax

from model import ModelConfig
from train.optimizers.checks import Checked


@dataclasses.dataclass(frozen=True)
class Lion(Checked):
    """The sign of a momentum; its learning rate is 3 to 10 times lower than AdamW's, its weight decay higher."""

    peak_lr: float = 2e-4
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.5
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping

    def direction(self, cfg: ModelConfig) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)

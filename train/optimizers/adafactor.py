"""Adafactor: second moments of matrices as one row and one column. Shazeer and Stern 2018, arXiv:1804.04235."""

from __future__ import annotations

import dataclasses

import optax

from model import ModelConfig
from train.optimizers.checks import Checked


@dataclasses.dataclass(frozen=True)
class Adafactor(Checked):
    """Adam's second moment, factored for the two largest axes of an array; without `b1` it has no first moment."""

    peak_lr: float = 1e-3
    b1: float = 0.0  # above 0: a first moment of the updates, in float32
    decay_exponent: float = 0.8  # the second moment's decay at step t is 1 - t^-decay_exponent
    min_factored: int = 128  # arrays with a smaller second largest axis are not factored
    update_clip: float = 1.0  # an array's update has at most this root mean square
    eps: float = 1e-30
    weight_decay: float = 0.0
    clip_norm: float = 0.0  # global gradient norm; 0: no clipping

    def direction(self, cfg: ModelConfig) -> optax.GradientTransformation:
        parts = [
            optax.scale_by_factored_rms(True, self.decay_exponent, 0, self.min_factored, self.eps),
            optax.clip_by_block_rms(self.update_clip),
        ]
        if self.b1:
            parts.append(optax.ema(self.b1, debias=False))
        return optax.chain(*parts)

"""Optimizers: each is a variant of `config.optimizer`, in one file, on optax."""

from __future__ import annotations

import optax

from model import ModelConfig
from train.optimizers.adafactor import Adafactor
from train.optimizers.adamw import AdamW
from train.optimizers.balance import balance_experts
from train.optimizers.clip import clip_by_global_norm, global_norm
from train.optimizers.decay import decay_mask
from train.optimizers.lion import Lion
from train.optimizers.muon import Muon
from train.optimizers.sophia import Sophia
from train.schedules import Schedule, learning_rate

Optimizer = AdamW | Muon | Lion | Adafactor | Sophia

__all__ = [
    "Adafactor",
    "AdamW",
    "Lion",
    "Muon",
    "Optimizer",
    "Sophia",
    "balance_experts",
    "clip_by_global_norm",
    "decay_mask",
    "global_norm",
    "make_optimizer",
]


def make_optimizer(
    spec: Optimizer, schedule: Schedule, steps: int, cfg: ModelConfig, lr_scale: float = 1.0
) -> optax.GradientTransformation:
    """Clipping by the global norm, the optimizer's direction, decoupled weight decay of matrices, the schedule."""
    parts = [clip_by_global_norm(spec.clip_norm)] if spec.clip_norm else []
    parts += [
        spec.direction(cfg),
        optax.add_decayed_weights(spec.weight_decay, decay_mask(cfg)),
        optax.scale_by_learning_rate(learning_rate(schedule, spec.peak_lr * lr_scale, steps)),
    ]
    return balance_experts(cfg, optax.chain(*parts))

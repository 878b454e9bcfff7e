"""Muon: the momentum of each matrix, orthogonalised by Newton-Schulz iterations. Jordan et al. 2024.

Embeddings, the head, norms and biases are trained by Adam. Matrices are those that the model declares, with their
input and output axes; stacked layers, heads' experts and the like are matrices of their own. Updates are scaled to the
root mean square of Adam's, so that both use one learning rate and weight decay: Liu et al. 2025, arXiv:2502.16982.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from model import ModelConfig
from model.function import Params
from model.parameters import ParamInfo
from train.optimizers.checks import Checked
from train.optimizers.decay import trained_info


@dataclasses.dataclass(frozen=True)
class Muon(Checked):
    """Muon for matrices of blocks, Adam for everything else."""

    peak_lr: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5  # of Newton-Schulz
    update_rms: float = 0.2  # root mean square of a matrix' update before the learning rate; Adam's is alike
    b1: float = 0.9  # Adam's
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping

    def direction(self, cfg: ModelConfig) -> optax.GradientTransformation:
        info = trained_info(cfg)
        axes = jax.tree.map(lambda leaf: matrix_axes(leaf) or optax.MaskedNode(), info)
        muon = optax.chain(
            scale_by_muon(
                ns_steps=self.iterations,
                beta=self.momentum,
                nesterov=self.nesterov,
                weight_dimension_numbers=axes,
            ),
            optax.stateless(lambda updates, _: jax.tree.map(self._scaled, updates, axes)),
        )
        labels = jax.tree.map(lambda leaf: "muon" if matrix_axes(leaf) else "adam", info)
        return optax.partition(
            {"muon": muon, "adam": optax.scale_by_adam(self.b1, self.b2, self.eps)}, labels
        )

    def _scaled(self, update: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
        """An orthogonal matrix [n, m] has a root mean square of 1 / sqrt(max(n, m))."""
        inputs, outputs = (math.prod(update.shape[i] for i in cast(tuple, group)) for group in axes)
        return update * (self.update_rms * math.sqrt(max(inputs, outputs)))


def matrix_axes(info: ParamInfo) -> MuonDimensionNumbers | None:
    """The axes of a matrix that Muon trains; None for embeddings, heads, norms, biases and scalars."""
    outputs = tuple(axis for axis in range(info.lead, len(info.shape)) if axis not in info.input_axes)
    if not info.input_axes or not outputs or "vocab" in info.axes:
        return None
    return MuonDimensionNumbers(info.input_axes, outputs)


def matrices(cfg: ModelConfig) -> Params:
    """True for each trained parameter that Muon takes as a matrix."""
    return jax.tree.map(lambda info: matrix_axes(info) is not None, trained_info(cfg))

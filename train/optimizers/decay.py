"""Which parameters have weight decay."""

from __future__ import annotations

import jax

from model import ModelConfig
from model.adapters import split_trained
from model.function import Params
from model.parameters import param_info


def decay_mask(cfg: ModelConfig) -> Params:
    """True for each trained parameter with weight decay: matrices, not norms, biases and scalars."""
    return jax.tree.map(lambda info: info.decays, trained_info(cfg))


def trained_info(cfg: ModelConfig) -> Params:
    """The `ParamInfo` of each trained parameter."""
    return split_trained(param_info(cfg))[0]

"""Makes a small byte model, trained like any other, the patcher of a byte-latent model.

Pagnoni et al. 2024, arXiv:2412.09871, section 2.3.
"""

from __future__ import annotations

import dataclasses

from model.blocks.patches import EntropyPatcher
from model.config import ModelConfig
from model.families.common import difference
from model.function import Params, param_shapes
from model.layout import relayout


def with_patcher(
    cfg: ModelConfig, params: Params, patcher_cfg: ModelConfig, patcher_params: Params, **options
) -> tuple[ModelConfig, Params]:
    """(the byte-latent model with this patcher, its parameters).

    Args:
      patcher_cfg: a model of the same bytes with only blocks, final norm and head.
      options: `threshold` and `rule` of `EntropyPatcher`; default: those of the old patcher, if it has them.

    Raises:
      ValueError: names the part that a patcher cannot have.
    """
    if cfg.byte_latent is None:
        raise ValueError("a patcher needs a byte-latent model, and this one has no byte_latent.")
    if why := difference(patcher_cfg, _plain(cfg, patcher_cfg)):
        raise ValueError(f"a patcher of this model {why}.")
    fields = patcher_cfg.width, patcher_cfg.blocks, patcher_cfg.final_norm, patcher_cfg.tied_head
    old = cfg.byte_latent.patcher
    if isinstance(old, EntropyPatcher):
        options = {"threshold": old.threshold, "rule": old.rule} | options
    patcher = EntropyPatcher(*fields, **options)
    new = cfg.replace(byte_latent=dataclasses.replace(cfg.byte_latent, patcher=patcher))
    _, patcher_params = relayout(patcher_cfg, patcher_params, scan=cfg.scan)
    params = params | {"patcher": patcher_params}
    return new, {name: params[name] for name in param_shapes(new)}


def _plain(cfg: ModelConfig, patcher_cfg: ModelConfig) -> ModelConfig:
    """The nearest model that a patcher supports."""
    return ModelConfig(
        cfg.vocab_size,
        patcher_cfg.width,
        patcher_cfg.blocks,
        patcher_cfg.final_norm,
        patcher_cfg.tied_head,
        max_length=patcher_cfg.max_length,
    )

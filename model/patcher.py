"""A small model of bytes, trained as any other, becomes the patcher of a byte-latent model.

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
    """The byte-latent model with that patcher in the place of its own, and its parameters.

    Args:
      patcher_cfg: of the same bytes; blocks, final norm and head are all that it may have.
      options: further fields of `EntropyPatcher`: `threshold` and `rule`; default: those of the patcher that was there,
        if it went by entropy too.

    Raises:
      ValueError: names what is in the way.
    """
    if cfg.byte_latent is None:
        raise ValueError(
            "a patcher was given to a model that is not byte-latent (its config has no byte_latent)."
        )
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
    """The nearest model that a patcher can be."""
    return ModelConfig(
        cfg.vocab_size,
        patcher_cfg.width,
        patcher_cfg.blocks,
        patcher_cfg.final_norm,
        patcher_cfg.tied_head,
        max_length=patcher_cfg.max_length,
    )

"""Two layouts of the same parameters: one group a block (unrolled), or equal neighbours stacked (scanned).

Also `without_mtp`, for formats that have no place for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from model.config import STACKS, ModelConfig
from model.formats.lazy import LAZY, Stacked
from model.function import Params
from model.readouts.mtp import mtp_blocks


def relayout(cfg: ModelConfig, params: Params, *, scan: bool) -> tuple[ModelConfig, Params]:
    """The same model scanned or unrolled: its config with that `scan`, and the parameters in its layout."""
    if cfg.scan == scan:
        return cfg, params
    target = cfg.replace(scan=scan)
    names = {name for stack in STACKS for name, _, _ in cfg.runs(stack)}
    groups = {key: value for key, value in params.items() if key not in names}
    for stack in STACKS:
        for name, _, numbers in target.runs(stack) if scan else cfg.runs(stack):
            unrolled = [f"{stack}block_{i}" for i in numbers]
            if scan:
                groups[name] = jax.tree.map(lambda *xs: _stack(xs), *(params[key] for key in unrolled))
            else:
                groups |= {
                    key: jax.tree.map(lambda x, j=j: x[j], params[name]) for j, key in enumerate(unrolled)
                }
    return target, groups


def without_mtp(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model, unrolled, without what says the tokens after the next one; every other output stays as it is."""
    cfg, params = relayout(cfg, params, scan=False)
    modules = mtp_blocks(cfg.mtp)
    return cfg.replace(mtp=None), {key: value for key, value in params.items() if key not in modules}


def _stack(arrays):
    if isinstance(arrays[0], LAZY):
        return Stacked(arrays)
    return np.stack(arrays) if isinstance(arrays[0], np.ndarray) else jnp.stack(arrays)

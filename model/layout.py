"""Two layouts of the same parameters: one group a block (unrolled), or equal neighbours stacked (scanned).

Also `without_mtp`, for formats that do not support it.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.formats.lazy import LAZY, Stacked
from model.function import Params
from model.readouts.mtp import mtp_blocks


def relayout(cfg: ModelConfig, params: Params, *, scan: bool) -> tuple[ModelConfig, Params]:
    """The same model scanned or unrolled: its config with that `scan`, and the parameters in its layout."""
    if cfg.scan == scan:
        return cfg, params
    target = cfg.replace(scan=scan)
    new = dict(params)
    for stack in cfg.stacks:
        part = cast(Params, stack.part_of(new))
        names = {run.name for run in stack.runs(cfg.scan)}
        rest = {key: value for key, value in part.items() if key not in names}
        runs = [(run, stack.runs(False)[run.layers.start : run.layers.stop]) for run in stack.runs(True)]
        if scan:
            blocks = {
                run.name: jax.tree.map(lambda *xs: _stack(xs), *(part[each.name] for each in unrolled))
                for run, unrolled in runs
            }
        else:
            blocks = {
                each.name: jax.tree.map(lambda x, j=j: x[j], part[run.name])
                for run, unrolled in runs
                for j, each in enumerate(unrolled)
            }
        new = rest | blocks if not stack.name else new | {stack.name: rest | blocks}
    return target, new


def without_mtp(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model, unrolled, without MTP modules; all other outputs are the same."""
    cfg, params = relayout(cfg, params, scan=False)
    modules = mtp_blocks(cfg.mtp)
    return cfg.replace(mtp=None), {key: value for key, value in params.items() if key not in modules}


def _stack(arrays):
    if isinstance(arrays[0], LAZY):
        return Stacked(arrays)
    return np.stack(arrays) if isinstance(arrays[0], np.ndarray) else jnp.stack(arrays)

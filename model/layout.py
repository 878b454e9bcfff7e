"""Two layouts of the same parameters: one group a block (unrolled), or equal neighbours stacked (scanned)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.function import Params
from model.lazy import Lazy, Stacked


def relayout(cfg: ModelConfig, params: Params, *, scan: bool) -> tuple[ModelConfig, Params]:
    """The same model scanned or unrolled: its config with that `scan`, and the parameters in its layout."""
    if cfg.scan == scan:
        return cfg, params
    target = cfg.replace(scan=scan)
    names = {name for name, _, _ in cfg.runs()}
    rest = {key: value for key, value in params.items() if key not in names}
    if scan:
        groups = {
            name: jax.tree.map(lambda *xs: _stack(xs), *(params[f"block_{i}"] for i in numbers))
            for name, _, numbers in target.runs()
        }
    else:
        groups = {
            f"block_{i}": jax.tree.map(lambda x, j=j: x[j], params[name])
            for name, _, numbers in cfg.runs()
            for j, i in enumerate(numbers)
        }
    return target, rest | groups


def _stack(arrays):
    if isinstance(arrays[0], Lazy | Stacked):
        return Stacked(arrays)
    return np.stack(arrays) if isinstance(arrays[0], np.ndarray) else jnp.stack(arrays)

"""Rematerialization: which activations of a block are saved for the backward pass, and which are recomputed.

Chen et al. 2016, arXiv:1604.06174; saving only matrix products: Korthikanti et al. 2022, arXiv:2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import Offloadable

from model.kernels.names import ATTENTION

_named = jax.checkpoint_policies.save_only_these_names(ATTENTION)
_products = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _named
)


def _offloaded(primitive: Any, *args: Any, **params: Any) -> Any:
    """As `_products`, in host memory; copies overlap the forward pass and come back before use."""
    kept = _products(primitive, *args, **params)
    return Offloadable("device", "pinned_host") if kept else kept


# name -> the policy that selects a block's saved activations; None: all
POLICIES: dict[str, Callable | None] = {
    "none": None,
    "products": _products,
    "offload": _offloaded,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def check_remat(remat: str) -> None:
    """Raises ValueError for a name that POLICIES lacks."""
    if remat not in POLICIES:
        raise ValueError(f"remat={remat!r} is not one of {', '.join(POLICIES)}.")


def rematerialised(module: type[nn.Module], remat: str, scan: bool) -> type[nn.Module]:
    """The module class with the policy of this name."""
    policy = POLICIES[remat]
    return module if policy is None else nn.remat(module, prevent_cse=not scan, policy=policy)

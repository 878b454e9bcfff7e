"""The decoding cache: pages of keys and values, a page table and the length of each row.

One form serves both uses. The engine hands pages out from a free list (Kwon et al. 2023, arXiv:2309.06180); a plain
dense cache is the same thing with one long page a row.
"""

# B rows, P pages a row, N pages in all, Z slots a page

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model.config import ModelConfig


@flax.struct.dataclass
class Cache:
    """Goes into `apply` and comes out anew; position p of row b lives in page `page_table[b, p // Z]`, slot p % Z."""

    layers: dict[str, Any]  # parameter group name -> the mixer's own state
    page_table: jax.Array  # [B, P] int32; entries past a row's length may be anything
    length: jax.Array  # [B] int32, tokens already in the cache


def init_pages(cfg: ModelConfig, num_pages: int, page_size: int, dtype: str | None = None) -> dict[str, Any]:
    """The empty state of every block, `dtype` (default: that of the computation)."""
    of_cache = jnp.dtype(dtype or cfg.dtype)
    layers = {}
    for name, block, numbers in cfg.runs():
        state = block.mixer.init_cache(num_pages, page_size, of_cache)
        if cfg.scan:
            state = jax.tree.map(lambda x, n=len(numbers): jnp.zeros((n, *x.shape), x.dtype), state)
        layers[name] = state
    return layers


def init_cache(cfg: ModelConfig, batch_size: int, max_length: int, dtype: str | None = None) -> Cache:
    """An empty dense cache for `batch_size` rows of at most `max_length` tokens."""
    return Cache(
        layers=init_pages(cfg, batch_size, max_length, dtype),
        page_table=jnp.arange(batch_size, dtype=jnp.int32)[:, None],
        length=jnp.zeros((batch_size,), jnp.int32),
    )


def cache_axes(cfg: ModelConfig) -> dict[str, Any]:
    """Logical axis names of `Cache.layers`, a tuple at each leaf."""
    lead = ("layers",) if cfg.scan else ()
    return {
        name: {key: lead + axes for key, axes in block.mixer.cache_axes().items()}
        for name, block, _ in cfg.runs()
    }


def page_size_of(layers: dict[str, Any], scan: bool) -> tuple[int, int]:
    """(number of pages, slots a page) of a cache's layers."""
    leaf = jax.tree.leaves(layers)[0]
    return leaf.shape[1:3] if scan else leaf.shape[:2]

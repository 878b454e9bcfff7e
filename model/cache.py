"""The decoding cache: pages of keys and values, a page table, recurrent states, and the length of each row.

The engine hands pages out from a free list (Kwon et al. 2023, arXiv:2309.06180). A dense cache is the same structure
with one long page a row. The state of a recurrent mixer has the same size for rows of any length.
"""

# B rows, P pages a row, N pages in all, Z slots a page, R rows of recurrent state

from __future__ import annotations

import functools
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp

from model.blocks.block import Block
from model.config import ModelConfig
from model.kernels import backend
from model.kernels.paged_attention.pages import SCALE, check_cache_dtype, is_quantized
from model.stacks import Stack

_KERNEL_PAGE = 128  # slots a page of a dense cache on TPUs


@flax.struct.dataclass
class Cache:
    """The decoding state: `apply` takes one and returns a new one.

    Position p of row b is in page `page_table[b, p // Z]`, slot p % Z.
    """

    layers: dict[str, Any]  # nested like the blocks' parameters: stack, run -> the state of its mixer
    page_table: jax.Array  # [B, P] int32; entries past a row's length may be anything
    length: jax.Array  # [B] int32, tokens already in the cache
    # [B] int32, the index of each row's recurrent state; None: row b has state b
    rows: jax.Array | None = None


def init_pages(
    cfg: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: str | None = None,
    num_rows: int = 1,
    encoder_length: int | None = None,
) -> dict[str, Any]:
    """The empty state of every block.

    Args:
      dtype: of keys and values; default: `cfg.dtype`. "int8" and "float8_e4m3fn" store a scale for each head of each
        token; see model.kernels.paged_attention.pages. Recurrent states then have `cfg.dtype`.
      num_rows: rows of recurrent state and of an encoder's keys and values.
      encoder_length: the most encoder tokens of a row; default: `cfg.max_length`.

    Raises:
      ValueError: the model is an encoder, which cannot generate.
    """
    if not cfg.causal:
        raise ValueError(
            "this model is an encoder: its tokens see those after them, so there is no cache and no text to continue. "
            "Use apply on whole texts, or model.embed."
        )
    check_cache_dtype(dtype or cfg.dtype)
    page_dtype = jnp.dtype(dtype or cfg.dtype)
    state_dtype = jnp.dtype(cfg.dtype) if is_quantized(page_dtype) else page_dtype
    layers = {}
    for stack in _decoding(cfg):
        part = {}
        for name, block, numbers in stack.runs(cfg.scan):
            sizes = num_pages, page_size, num_rows
            state = block.init_cache(*sizes, state_dtype)
            if page_dtype != state_dtype:
                state = _with_pages(block.cache_axes(), state, block.init_cache(*sizes, page_dtype))
            if block.cross is not None:
                state |= block.cross.init_cache(num_rows, encoder_length or cfg.max_length, state_dtype)
            if cfg.scan:
                state = jax.tree.map(lambda x, n=len(numbers): jnp.zeros((n, *x.shape), x.dtype), state)
            part[name] = state
        layers |= stack.as_part(part)
    if cfg.byte_latent is not None:
        layers["bytes"] = cfg.byte_latent.init_cache(num_pages, page_size, num_rows, state_dtype)
    return layers


def init_cache(
    cfg: ModelConfig,
    batch_size: int,
    max_length: int,
    dtype: str | None = None,
    encoder_length: int | None = None,
) -> Cache:
    """An empty dense cache for `batch_size` rows of at most `max_length` tokens; see `init_pages`.

    Each row is one page; for the TPU kernel, pages of 128 slots.
    """
    page_size = max_length if backend.current().name == "plain" else _KERNEL_PAGE
    num_pages = batch_size * -(-max_length // page_size)
    return Cache(
        layers=init_pages(cfg, num_pages, page_size, dtype, batch_size, encoder_length),
        page_table=jnp.arange(num_pages, dtype=jnp.int32).reshape(batch_size, -1),
        length=jnp.zeros((batch_size,), jnp.int32),
    )


def _with_pages(axes: dict[str, tuple], state: dict[str, Any], quantized: dict[str, Any]) -> dict[str, Any]:
    """`state`, with the pages and scales of `quantized`."""
    is_page = lambda key: key.endswith(SCALE) or "slots" in axes[key]
    return {key: value if is_page(key) else state[key] for key, value in quantized.items()}


def cache_axes(cfg: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """Logical axis names of `Cache.layers`, a tuple at each leaf; `dtype`: see `init_pages`."""
    lead = ("layers",) if cfg.scan else ()
    found = {}
    for stack in _decoding(cfg):
        part = {}
        for name, block, _ in stack.runs(cfg.scan):
            block_axes = block.cache_axes() | (block.cross.cache_axes() if block.cross else {})
            if is_quantized(dtype or cfg.dtype):
                block_axes |= _scale_axes(block)
            part[name] = {key: lead + axes for key, axes in block_axes.items()}
        found |= stack.as_part(part)
    if cfg.byte_latent is not None:
        found["bytes"] = cfg.byte_latent.cache_axes()
    return found


def _scale_axes(block: Block) -> dict[str, tuple]:
    axes = block.cache_axes()
    state = jax.eval_shape(lambda: block.init_cache(1, 1, 1, jnp.dtype("int8")))
    heads = {key: axes[key.removesuffix(SCALE)][2] for key in state if key.endswith(SCALE)}
    return {key: ("pages", name, "slots") for key, name in heads.items()}


def _decoding(cfg: ModelConfig) -> list[Stack]:
    """The stacks with a decoding state. Patches have as many pages as bytes, and fill fewer slots."""
    return [stack for stack in cfg.stacks if stack.name != "encoder"]


def page_size_of(cfg: ModelConfig, layers: dict[str, Any]) -> int | None:
    """Slots a page of `Cache.layers`; None for a model without pages."""
    for path, names in jax.tree_util.tree_leaves_with_path(cache_axes(cfg), is_leaf=_is_axes):
        if "slots" in names:
            array = functools.reduce(lambda tree, entry: tree[entry.key], path, cast(Any, layers))
            return array.shape[names.index("slots")]
    return None


def has_recurrent_state(cfg: ModelConfig) -> bool:
    """Whether a block has a state for each row (recurrent, or an encoder's keys and values) that pages cannot share."""
    return any("rows" in axes for axes in jax.tree.leaves(cache_axes(cfg), is_leaf=_is_axes))


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)

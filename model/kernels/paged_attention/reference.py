"""Paged attention in plain jnp, the definition: the whole of each token's row is gathered."""

# T tokens of all rows, R rows, H query heads, K key/value heads, C channels of a key, E channels of a value
# N pages, Z slots a page, P pages a row, S = P * Z slots a row

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.kernels.attention import Mask, Scores
from model.kernels.attention.reference import attention
from model.kernels.paged_attention import pages
from model.kernels.paged_attention.kv_layout import KVLayout
from model.kernels.paged_attention.rows import Rows, row_of_token


def in_plain(
    q_THC: jax.Array,
    stored: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_RP: jax.Array,
    rows: Rows,
    kv_layout: KVLayout,
    mask: Mask,
    scores: Scores,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(outputs [T, H, E], the cache with the new tokens).

    Args:
      stored: the new tokens, see `pages.as_stored`; None: the cache holds them already.
    """
    at = places(rows, q_THC.shape[0])
    if stored is not None:
        cache = write(stored, cache, page_table_RP, at)
    read = functools.partial(
        pages.read, cache, page_table_BP=page_table_RP, heads=kv_layout.heads, dtype=q_THC.dtype
    )
    parts = {name: read(name) for name in kv_layout.names}
    k_RSKC = kv_layout.key_of(parts)
    mask_TS = _mask(mask, rows, at, jnp.arange(k_RSKC.shape[1])) & at.real_T[:, None]
    of_rows = k_RSKC[at.row_T], parts[kv_layout.values][at.row_T]
    out = attention(q_THC[:, None], *of_rows, mask_TS[:, None], scores)
    return jnp.where(at.real_T[:, None, None], out[:, 0], 0), cache


def _mask(mask: Mask, rows: Rows, at: Places, slot_S: jax.Array) -> jax.Array:
    """bool [T, S]. `mask.prefix` is [R]; `mask.tree_BTT` is of the new tokens of each row."""
    position_T1 = at.position_T[:, None]
    mask_TS = mask.allows(position_T1, slot_S)
    if not mask.listed():
        return mask_TS
    start_T1 = rows.start_R[at.row_T][:, None]
    if mask.prefix is not None:
        prefix_T1 = mask.prefix[at.row_T][:, None]
        mask_TS = mask_TS | ((position_T1 < prefix_T1) & (slot_S < prefix_T1))
    if mask.tree_BTT is not None:
        last = mask.tree_BTT.shape[1] - 1
        tree_TT = mask.tree_BTT[at.row_T, jnp.clip(at.position_T - start_T1[:, 0], 0, last)]
        of_slots_TS = jnp.take_along_axis(tree_TT, jnp.clip(slot_S - start_T1, 0, last), axis=1)
        mask_TS = jnp.where(slot_S < start_T1, mask_TS, of_slots_TS)
    return mask_TS & (slot_S < start_T1 + rows.count_R[at.row_T][:, None])


class Places(NamedTuple):
    """Where each token is."""

    row_T: jax.Array
    position_T: jax.Array
    real_T: jax.Array  # whether it is of a row


def places(rows: Rows, T: int) -> Places:
    row_T = row_of_token(rows, T)
    since_T = jnp.arange(T) - rows.first_R[row_T]
    return Places(row_T, rows.start_R[row_T] + since_T, (since_T >= 0) & (since_T < rows.count_R[row_T]))


def write(stored, cache, page_table_RP, at: Places) -> dict[str, jax.Array]:
    Z, P = (
        next(x.shape[1] for name, x in cache.items() if not name.endswith(pages.SCALE)),
        page_table_RP.shape[1],
    )
    page_T = page_table_RP[at.row_T, jnp.clip(at.position_T // Z, 0, P - 1)]
    page_T = jnp.where(at.real_T & (at.position_T < P * Z), page_T, 2**30)
    slot_T, written = at.position_T % Z, {}
    for name, x in stored.items():
        there = (page_T, slice(None), slot_T) if name.endswith(pages.SCALE) else (page_T, slot_T)
        written[name] = cache[name].at[there].set(x, mode="drop")
    return cache | written

"""Paged attention by its TPU kernel: the arguments of the kernel."""

# T tokens of all rows, J matrices of queries a work item, M rows of one
# H query heads, C channels of a key, E channels of a value, L lanes (128)

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.attention import Mask, Scores
from model.kernels.backend import Backend
from model.kernels.paged_attention.kv_layout import KVLayout
from model.kernels.paged_attention.rows import Rows
from model.kernels.paged_attention.tpu_kernel import attend
from model.kernels.paged_attention.tpu_plan import (
    BLOCK_SIZES,
    LANES,
    MAX_TABLE,
    BlockSizes,
    PagedCall,
    block_pages,
    fresh_of,
    groups,
    parts_of,
    tokens_together,
    work_items,
)


def by_kernel(
    q_THC: jax.Array,
    stored: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_RP: jax.Array,
    rows: Rows,
    kv_layout: KVLayout,
    mask: Mask,
    scores: Scores,
    longest: int,
    chosen: Backend,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """See `reference.in_plain`.

    Args:
      longest: no row has more new tokens.
    """
    call = _call(q_THC, stored, cache, page_table_RP, kv_layout, mask, scores, longest, chosen)
    scalars = work_items(call, rows, q_THC.shape[0], longest)._replace(table=page_table_RP.reshape(-1))
    if stored is None:  # what the pages hold is all old
        scalars = scalars._replace(row_start=rows.start_R + rows.count_R)
    fresh, new = {}, stored or {}
    for part in call.parts if stored else ():
        base_R, token_UW = groups(rows, q_THC.shape[0], longest, part.group)
        fresh[part.name] = fresh_of(part, new[part.name], token_UW)
        scalars = scalars._replace(**{"row_page" if part.scales else "row_group": base_R})
    sinks_JML = None
    if scores.sinks_H is not None:
        sinks_JG = scores.sinks_H.astype(jnp.float32).reshape(-1, call.matrix_heads)
        sinks_JM = jnp.tile(sinks_JG, (1, call.tokens))
        sinks_JML = jnp.broadcast_to(sinks_JM[..., None], (*sinks_JM.shape, LANES))
    return attend(call, scalars, q_THC, sinks_JML, fresh, cache)


def _call(
    q_THC,
    stored,
    cache,
    page_table_RP,
    kv_layout: KVLayout,
    mask: Mask,
    scores: Scores,
    longest: int,
    chosen: Backend,
) -> PagedCall:
    H, C = q_THC.shape[1:]
    K, (N, Z, _) = kv_layout.heads, cache[kv_layout.names[0]].shape
    if page_table_RP.size > MAX_TABLE:
        raise ValueError(
            f"a page table of {page_table_RP.shape} entries does not fit a TPU's scalar memory ({MAX_TABLE} at most). "
            f"Give pages of more than {Z} slots, or fewer rows."
        )
    sizes = chosen.of_chip(BLOCK_SIZES, BlockSizes())
    parts = parts_of(cache, kv_layout.names, chosen.interpret)
    E = cache[kv_layout.values].shape[2] // K
    tokens, together = tokens_together(H, K, C, E, longest, mask.chunk)
    return PagedCall(
        keys=kv_layout.keys,
        values=kv_layout.values,
        parts=parts,
        num_pages=N,
        page_size=Z,
        pages_a_row=page_table_RP.shape[1],
        block_pages=block_pages(parts, cache, Z, page_table_RP.shape[1], tokens * together * (H // K), sizes),
        heads=K,
        group=H // K,
        together=together,
        tokens=tokens,
        max_new=None if stored is None else longest,
        mask=mask,
        scale=scores.scale_of(C),
        softcap=scores.softcap,
        cores=sizes.cores,
        interpret=chosen.interpret,
    )

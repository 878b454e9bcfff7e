"""Paged attention by its kernel: what it is given, and what is made of what it gives."""

# T tokens of all rows, J matrices of queries an item, M rows of one
# H query heads, C channels of a key, E channels of a value, L lanes (128)

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.attention.reference import Scores, Sight
from model.kernels.backend import Backend
from model.kernels.paged_attention import Kept
from model.kernels.paged_attention.tpu_kernel import attend
from model.kernels.paged_attention.tpu_plan import (
    LANES,
    MAX_TABLE,
    SIZES,
    Plan,
    Rows,
    Sizes,
    block_pages,
    fresh_of,
    groups,
    items_of,
    parts_of,
    tokens_together,
)


def by_kernel(
    q_THC: jax.Array,
    stored: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_RP: jax.Array,
    rows: Rows,
    kept: Kept,
    sight: Sight,
    scores: Scores,
    longest: int,
    chosen: Backend,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """See `paged_attention.in_plain`.

    Args:
      longest: no row has more new tokens.
    """
    plan = _plan(q_THC, stored, cache, page_table_RP, kept, sight, scores, longest, chosen)
    scalars = items_of(plan, rows, q_THC.shape[0], longest)._replace(table=page_table_RP.reshape(-1))
    if stored is None:  # what the pages hold is all old
        scalars = scalars._replace(row_start=rows.start_R + rows.count_R)
    fresh, new = {}, stored or {}
    for part in plan.parts if stored else ():
        base_R, token_UW = groups(rows, q_THC.shape[0], longest, part.group)
        fresh[part.name] = fresh_of(part, new[part.name], token_UW)
        scalars = scalars._replace(**{"row_page" if part.scales else "row_group": base_R})
    sinks_JML = None
    if scores.sinks_H is not None:
        sinks_JG = scores.sinks_H.astype(jnp.float32).reshape(-1, plan.matrix_heads)
        sinks_JM = jnp.tile(sinks_JG, (1, plan.tokens))
        sinks_JML = jnp.broadcast_to(sinks_JM[..., None], (*sinks_JM.shape, LANES))
    return attend(plan, scalars, q_THC, sinks_JML, fresh, cache)


def _plan(
    q_THC,
    stored,
    cache,
    page_table_RP,
    kept: Kept,
    sight: Sight,
    scores: Scores,
    longest: int,
    chosen: Backend,
) -> Plan:
    H, C = q_THC.shape[1:]
    K, (N, Z, _) = kept.heads, cache[kept.names[0]].shape
    if scores.bias is not None or not sight.causal:
        raise ValueError(
            "paged attention by a kernel has no biases of the scores, and no queries that see ahead."
        )
    if page_table_RP.size > MAX_TABLE:
        raise ValueError(
            f"a page table of {page_table_RP.shape} entries does not fit a TPU's scalar memory ({MAX_TABLE} at most). "
            f"Give pages of more than {Z} slots, or fewer rows."
        )
    sizes = SIZES[chosen.chip] if chosen.chip else Sizes()
    parts = parts_of(cache, kept.names, chosen.interpret)
    E = cache[kept.values].shape[2] // K
    tokens, together = tokens_together(H, K, C, E, longest, sight.chunk)
    return Plan(
        keys=kept.keys,
        values=kept.values,
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
        sight=sight,
        scale=scores.scale_of(C),
        softcap=scores.softcap,
        cores=sizes.cores,
        interpret=chosen.interpret,
    )

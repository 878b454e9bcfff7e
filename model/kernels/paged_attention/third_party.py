"""JAX's ragged paged attention behind our arguments, to compare with.

It only reads, and its pages hold keys and values beside each other, head by head: all pages are copied for each
call, so it is a second opinion on a chip, not a way to serve. What ours has and it has not: the write of new tokens in
the same kernel, pages of int8 and fp8 with a scale a token, latent keys, sinks, chunks, heads that fill no vector.
"""

# T tokens of all rows, R rows, H query heads, K key/value heads, C channels; N pages, Z slots a page

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.attention import Mask, Scores
from model.kernels.paged_attention.kv_layout import KVLayout
from model.kernels.paged_attention.reference import places, write
from model.kernels.paged_attention.rows import Rows

LANES = 128
BLOCK_SLOTS, BLOCK_QUERIES = 512, 32  # of a step
VMEM_BYTES = 32 << 20


def ragged(
    q_THC: jax.Array,
    stored: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_RP: jax.Array,
    rows: Rows,
    kv_layout: KVLayout,
    mask: Mask,
    scores: Scores,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """See `reference.in_plain`."""
    at = places(rows, q_THC.shape[0])
    if stored is not None:
        cache = write(stored, cache, page_table_RP, at)
    out_THC = _attend(q_THC, cache, page_table_RP, rows, kv_layout.heads, mask, scores)
    return jnp.where(at.real_T[:, None, None], out_THC, 0), cache


def _attend(
    q_THC: jax.Array,
    cache: dict[str, jax.Array],
    page_table_RP: jax.Array,
    rows: Rows,
    heads: int,
    mask: Mask,
    scores: Scores,
) -> jax.Array:
    """[T, H, C] of pages that hold the new tokens already; outputs for tokens of no row may be anything."""
    # here, since Pallas takes long to import
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    k_NZKC, v_NZKC = (cache[name].reshape(*cache[name].shape[:2], heads, -1) for name in "kv")
    both_NZXC = jnp.stack([k_NZKC, v_NZKC], axis=3).reshape(*k_NZKC.shape[:2], 2 * heads, -1)
    # its rows are consecutive: places between two of ours are read as the first one's last tokens
    offsets_R1 = jnp.append(rows.first_R, rows.first_R[-1] + rows.count_R[-1]).astype(jnp.int32)
    lengths_R = (rows.start_R + jnp.diff(offsets_R1)).astype(jnp.int32)
    return kernel.ragged_paged_attention(
        *(q_THC, both_NZXC, lengths_R, page_table_RP.astype(jnp.int32), offsets_R1),
        jnp.asarray([len(lengths_R)], jnp.int32),
        sm_scale=scores.scale_of(q_THC.shape[-1]),
        sliding_window=mask.span(),
        soft_cap=scores.softcap,
        num_kv_pages_per_block=max(1, min(BLOCK_SLOTS // k_NZKC.shape[1], page_table_RP.shape[1])),
        num_queries_per_block=BLOCK_QUERIES,
        vmem_limit_bytes=VMEM_BYTES,
    )

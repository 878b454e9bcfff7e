"""JAX's splash attention for TPUs, with our arguments.

Only our kernel supports rows with tokens split by a mesh, keys and queries at a traced offset, skipping blocks by the
segments of a packed row, and log-sum-exps with gradients.
"""

# B batch, T tokens, H query heads, K key/value heads, C width of a query and a key, E width of a value

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp

from model.kernels.attention.mask import Mask, chunk_segment_ids
from model.kernels.attention.reference import Scores
from model.kernels.backend import Backend
from model.sharding import ShardingRules

LANES = 128
SPLASH_BLOCK = 512  # queries and keys of a step, as in our kernel


def splash(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    mask: Mask,
    scores: Scores,
    rules: ShardingRules | None,
    chosen: Backend,
) -> jax.Array:
    """`self_attention` by jax.experimental.pallas.ops.tpu.splash_attention."""
    from model.kernels.attention.sharded import whole_rows_on_mesh

    part = functools.partial(_splash_part, mask, scores, chosen.interpret)
    ids_BT = chunk_segment_ids(positions_BT, segment_ids_BT, mask.chunk)
    return whole_rows_on_mesh(part, rules, q_BTHC, k_BTKC, v_BTKE, ids_BT, scores.sinks_H)


def _splash_part(mask: Mask, scores: Scores, interpret: bool, q_BTHC, k_BTKC, v_BTKE, ids_BT, sinks_H):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    B, T, H, C = q_BTHC.shape
    padded = -(-T // LANES) * LANES
    block = next(size for size in (SPLASH_BLOCK, 384, 256, LANES) if padded % size == 0)
    sizes = dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
        + ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
        block,
    )
    attend = kernel.make_splash_mha(
        _splash_mask(mask, padded, H),
        block_sizes=kernel.BlockSizes(**sizes),
        attn_logits_soft_cap=scores.softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    pad = lambda x, **how: jnp.pad(x, [(0, 0), (0, padded - T), *[(0, 0)] * (x.ndim - 2)], **how)
    if ids_BT is None and padded > T and not mask.causal:
        ids_BT = jnp.zeros((B, T), jnp.int32)
    ids = None
    if ids_BT is not None:
        ids_BT = pad(ids_BT, constant_values=-1)
        ids = kernel.SegmentIds(ids_BT, ids_BT)
    scaled_BTHC = (q_BTHC * scores.scale_of(C)).astype(q_BTHC.dtype)
    arrays = *(pad(x).swapaxes(1, 2) for x in (scaled_BTHC, k_BTKC, v_BTKE)), ids
    run = jax.vmap(lambda arrays: cast(jax.Array, attend(*arrays, sinks_H)))
    return run(arrays).swapaxes(1, 2)[:, :T]


def _splash_mask(mask: Mask, length: int, heads: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    if mask.window is not None:
        before = mask.window - 1
        of_head = masks.LocalMask(shape, (before, 0 if mask.causal else before), 0)
    else:
        of_head = masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
    return masks.MultiHeadMask([of_head] * heads)

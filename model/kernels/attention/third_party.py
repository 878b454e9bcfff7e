"""Other people's attention behind our arguments: JAX's splash kernel for TPUs, cudnn and tokamax for GPUs.

What ours has and splash has not: rows whose tokens a mesh splits, keys and queries at an offset that is traced, blocks
skipped by the segments of a packed row, log-sum-exps with gradients.
"""

# B batch, T tokens, H query heads, K key/value heads, C width of a query and a key, E width of a value

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.attention.reference import Scores, Sight, stretch_ids
from model.sharding import ShardingRules

LANES = 128
SPLASH_BLOCK = 512  # queries and keys of a step: what ours takes


def splits_length(rules: ShardingRules) -> bool:
    """Whether the mesh that is set splits the tokens of a row."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return any(sizes.get(axis, 1) > 1 for axis in rules.length)


def splash(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    sight: Sight,
    scores: Scores,
    rules: ShardingRules | None,
    chosen: backend.Backend,
) -> jax.Array:
    """`self_attention` by jax.experimental.pallas.ops.tpu.splash_attention."""
    from model.kernels.attention.sharded import on_mesh

    part = functools.partial(_splash_part, sight, scores, chosen.interpret)
    ids_BT = stretch_ids(positions_BT, segment_ids_BT, sight.chunk)
    return on_mesh(part, rules, q_BTHC, k_BTKC, v_BTKE, ids_BT, scores.sinks_H)


def _splash_part(sight: Sight, scores: Scores, interpret: bool, q_BTHC, k_BTKC, v_BTKE, ids_BT, sinks_H):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, H, C = q_BTHC.shape
    padded = -(-T // LANES) * LANES
    block = next(size for size in (SPLASH_BLOCK, 384, 256, LANES) if padded % size == 0)
    before = None if sight.window is None else sight.window - 1
    ahead = 0 if sight.causal else before
    if before is None:
        mask = masks.CausalMask((padded, padded)) if sight.causal else masks.FullMask((padded, padded))
    else:
        mask = masks.LocalMask((padded, padded), (before, ahead), 0)
    sizes = dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
        + ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
        block,
    )
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * H),
        block_sizes=kernel.BlockSizes(**sizes),
        attn_logits_soft_cap=scores.softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    pad = lambda x, **how: jnp.pad(x, [(0, 0), (0, padded - T), *[(0, 0)] * (x.ndim - 2)], **how)
    if ids_BT is None and padded > T and not sight.causal:
        ids_BT = jnp.zeros((B, T), jnp.int32)
    ids = None
    if ids_BT is not None:
        ids_BT = pad(ids_BT, constant_values=-1)
        ids = kernel.SegmentIds(ids_BT, ids_BT)
    scaled_BTHC = (q_BTHC * scores.scale_of(C)).astype(q_BTHC.dtype)
    arrays = *(pad(x).swapaxes(1, 2) for x in (scaled_BTHC, k_BTKC, v_BTKE)), ids
    run = jax.vmap(lambda arrays: cast(jax.Array, attend(*arrays, sinks_H)))
    return run(arrays).swapaxes(1, 2)[:, :T]


def cudnn(q_BTHC, k_BTKC, v_BTKE, positions_BT, segment_ids_BT, sight, scores, rules, chosen) -> jax.Array:
    """`self_attention` by jax.nn.dot_product_attention. Where rows are packed it is given a mask of [B, 1, T, T]."""
    attend = functools.partial(
        jax.nn.dot_product_attention, implementation="xla" if chosen.interpret else "cudnn"
    )
    return attend(
        q_BTHC, k_BTKC, v_BTKE, **_said(positions_BT, segment_ids_BT, sight, scores, q_BTHC.shape[-1])
    )


def tokamax(q_BTHC, k_BTKC, v_BTKE, positions_BT, segment_ids_BT, sight, scores, rules, chosen) -> jax.Array:
    """`self_attention` by tokamax, which picks among its kernels for the device."""
    said = _said(positions_BT, segment_ids_BT, sight, scores, q_BTHC.shape[-1])
    how = {"implementation": "xla"} if chosen.interpret else {}
    return (
        backend.tokamax()
        .dot_product_attention(q_BTHC, k_BTKC, v_BTKE, **said, logits_soft_cap=scores.softcap, **how)
        .astype(q_BTHC.dtype)
    )


def _said(positions_BT, segment_ids_BT, sight: Sight, scores: Scores, width: int) -> dict:
    """Our arguments in the words of jax.nn.dot_product_attention."""
    ids_BT = stretch_ids(positions_BT, segment_ids_BT, sight.chunk)
    before = None if sight.window is None else sight.window - 1
    return {
        "mask": None if ids_BT is None else (ids_BT[:, None, :, None] == ids_BT[:, None, None, :]),
        "is_causal": sight.causal,
        "scale": scores.scale_of(width),
        "local_window_size": None if before is None else (before, 0 if sight.causal else before),
    }

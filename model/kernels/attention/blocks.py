"""Self-attention in plain jnp: each block of queries reads only the keys that some of them see.

Hand-written derivatives recompute the weights instead of saving them, as in Dao et al. 2022, arXiv:2205.14135.
"""

# B batch, T queries, S keys, H query heads, K key/value heads, G query heads of one key/value head, N = G T of a block
# C width of a query and a key, E width of a value

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.kernels import cpu, order
from model.kernels.attention.mask import Mask
from model.kernels.attention.reference import (
    Scores,
    attend,
    less,
    queries_heads_first,
    to_add,
    tokens_first,
)
from model.kernels.derivatives import differentiable
from model.kernels.names import ATTENTION

MAX_QUERY_BLOCKS = 16  # a row is cut into at most this many blocks of queries
MIN_QUERY_BLOCK = 128  # and into none shorter than this


def in_query_blocks(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    mask: Mask = Mask(),
    scores: Scores = Scores(),
) -> jax.Array:
    """See `self_attention`, [B, T, H, E]."""
    q_BTHC, scores = _scaled(q_BTHC, scores)
    inputs = mask, scores.sinks_H, q_BTHC, k_BTKC, v_BTKE, positions_BT, segment_ids_BT
    if scores.bias is not None:  # a bias may have parameters
        return _forward(scores, *inputs)[0]
    derivatives = (functools.partial(f, scores) for f in (_forward, _tangent, _backward))
    return differentiable(*derivatives)(*inputs)


def _scaled(q_BTHC: jax.Array, scores: Scores) -> tuple[jax.Array, Scores]:
    """Queries times the scores' scale, if this adds no rounding: it saves a pass over all scores."""
    scale = scores.scale_of(q_BTHC.shape[-1])
    if q_BTHC.dtype != jnp.float32 and math.frexp(scale)[0] != 0.5:
        return q_BTHC, scores
    return q_BTHC * jnp.asarray(scale, q_BTHC.dtype), dataclasses.replace(scores, scale=1.0)


def _blocks(T: int, mask: Mask) -> list[tuple[slice, slice]]:
    """Blocks of queries, and of the keys that some of them see."""
    block, span = max(MIN_QUERY_BLOCK, -(-T // MAX_QUERY_BLOCKS)), mask.span()
    blocks = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        first = 0 if span is None else max(0, start - span + 1)
        last = stop if mask.causal and not mask.listed() else T if span is None else min(T, stop + span - 1)
        blocks.append((slice(start, stop), slice(first, last)))
    return blocks


def _forward(
    scores: Scores, mask: Mask, sinks_H, q_BTHC, k_BTKC, v_BTKE, positions_BT, segment_ids_BT
) -> tuple[jax.Array, Any]:
    """(outputs [B, T, H, E], saved values for derivatives)."""
    scores = dataclasses.replace(scores, sinks_H=sinks_H)
    blocks = _blocks(q_BTHC.shape[1], mask)
    # values have one axis for heads and width, queries two for G and T: on CPUs, merging or splitting axes is slow
    v_BTN = v_BTKE.reshape(*v_BTKE.shape[:2], -1)
    laid_out = cpu.materialize(functools.partial(_laid_out, blocks))(q_BTHC, k_BTKC, v_BTN)
    qs_BKGTC, k_BKSC, v_BKSE = laid_out
    qs_BKNC = [x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in qs_BKGTC]
    inputs = qs_BKNC, k_BKSC, v_BKSE, positions_BT, segment_ids_BT
    outs, normalisers = [], []
    for (at_T, at_S), q_BKGTC in zip(blocks, qs_BKGTC, strict=True):
        mask_BTS = mask.within(at_T, at_S, positions_BT, segment_ids_BT)
        mask_BTS = mask_BTS if scores.bias is not None else to_add(mask_BTS)
        queries, keys = (jnp.arange(at.start, at.stop) for at in (at_T, at_S))
        distance_BTS = (keys[None] - queries[:, None])[None]
        seen = k_BKSC[:, :, at_S], v_BKSE[:, :, at_S]
        out_BKGTE, *normaliser = attend(q_BKGTC, *seen, mask_BTS, scores, distance_BTS)
        outs.append(tokens_first(out_BKGTE))
        normalisers.append(tuple(checkpoint_name(x_BKGT1, ATTENTION) for x_BKGT1 in normaliser))
    # one array for both passes
    out_BTHE = checkpoint_name(cpu.materialize(functools.partial(jnp.concatenate, axis=1))(outs), ATTENTION)
    return out_BTHE, (mask, sinks_H, inputs, out_BTHE, normalisers)


def _laid_out(blocks: list[tuple[slice, slice]], q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTN: jax.Array):
    """The layouts of products: queries of each block [B, K, G, T, C], keys and values [B, K, S, C or E].

    Args:
      v_BTN: heads and widths in one axis.
    """
    K = k_BTKC.shape[2]
    of_blocks = [queries_heads_first(q_BTHC[:, at_T], K) for at_T, _ in blocks]
    v_BTKE = v_BTN.reshape(*k_BTKC.shape[:3], -1)
    return of_blocks, k_BTKC.swapaxes(1, 2), v_BTKE.swapaxes(1, 2)


def _backward(scores: Scores, saved: Any, d_out_BTHE: jax.Array):
    """Scores with keys before queries, so no weight is transposed."""
    mask, sinks_H, (qs_BKNC, k_BKSC, v_BKSE, positions_BT, segment_ids_BT), out_BTHE, normalisers = saved
    laid_out = functools.partial(queries_heads_first, K=k_BKSC.shape[1])
    d_out_BTHE = d_out_BTHE.astype(jnp.float32)
    delta_BTH1 = cpu.row_dot(d_out_BTHE, out_BTHE)
    known_BK11 = laid_out(delta_BTH1)[:, :, 0, :1]
    dqs_BTHC, d_sinks_KG = [], jnp.zeros(())
    dk_BKSC, dv_BKSE = (jnp.zeros(x.shape, jnp.float32) for x in (k_BKSC, v_BKSE))
    blocks = _blocks(d_out_BTHE.shape[1], mask)
    for (at_T, at_S), q_BKNC, (top_BKGT1, total_BKGT1) in zip(blocks, qs_BKNC, normalisers, strict=True):
        mask_BST = mask.within(at_T, at_S, positions_BT, segment_ids_BT).swapaxes(1, 2)
        d_out_BKGTE, delta_BKGT1 = (laid_out(x[:, at_T]) / total_BKGT1 for x in (d_out_BTHE, delta_BTH1))
        # the weights of one block at a time, and not before they are needed
        k_part, v_part = (order.order_after(known_BK11, x[:, :, at_S]) for x in (k_BKSC, v_BKSE))
        dq_BTHC, dk_part, dv_part = _block_gradients(
            scores, (k_part, v_part, mask_BST), q_BKNC, d_out_BKGTE, top_BKGT1, delta_BKGT1
        )
        dqs_BTHC.append(dq_BTHC)
        known_BK11 = laid_out(dq_BTHC[:, :1, :, :1])[:, :, 0]
        dk_BKSC, dv_BKSE = dk_BKSC.at[:, :, at_S].add(dk_part), dv_BKSE.at[:, :, at_S].add(dv_part)
        if sinks_H is not None:
            sinks_KG1 = sinks_H.astype(jnp.float32).reshape(*top_BKGT1.shape[1:3], 1)
            d_sinks_KG -= jnp.sum(jnp.exp(sinks_KG1 - top_BKGT1[..., 0]) * delta_BKGT1[..., 0], axis=(0, 3))
    d_q_BTHC = jnp.concatenate(dqs_BTHC, axis=1).astype(qs_BKNC[0].dtype)
    d_k_BTKC, d_v_BTKE = (d.swapaxes(1, 2).astype(x.dtype) for d, x in ((dk_BKSC, k_BKSC), (dv_BKSE, v_BKSE)))
    d_sinks_H = None if sinks_H is None else d_sinks_KG.reshape(-1).astype(sinks_H.dtype)
    return None, d_sinks_H, d_q_BTHC, d_k_BTKC, d_v_BTKE, None, None


def _tangent(scores: Scores, saved: Any, tangents: tuple) -> jax.Array:
    mask, sinks_H, (qs_BKNC, k_BKSC, v_BKSE, positions_BT, segment_ids_BT), out_BTHE, normalisers = saved
    _, moved_sinks_H, moved_q_BTHC, moved_k_BTKC, moved_v_BTKE, _, _ = tangents
    moved_k_BKSC, moved_v_BKSE = moved_k_BTKC.swapaxes(1, 2), moved_v_BTKE.swapaxes(1, 2)
    sinks, outs = None if sinks_H is None else (sinks_H, moved_sinks_H), []
    blocks = _blocks(out_BTHE.shape[1], mask)
    for (at_T, at_S), q_BKNC, normaliser in zip(blocks, qs_BKNC, normalisers, strict=True):
        mask_BTS = mask.within(at_T, at_S, positions_BT, segment_ids_BT)
        moved_q_BKGTC = queries_heads_first(moved_q_BTHC[:, at_T], k_BKSC.shape[1])
        q_BKGTC = q_BKNC.reshape(moved_q_BKGTC.shape)
        keys, values = (
            (x[:, :, at_S], d[:, :, at_S]) for x, d in ((k_BKSC, moved_k_BKSC), (v_BKSE, moved_v_BKSE))
        )
        moved = _block_tangent(scores, mask_BTS, (q_BKGTC, moved_q_BKGTC), keys, values, normaliser, sinks)
        outs.append(tokens_first(moved))
    return jnp.concatenate(outs, axis=1).astype(out_BTHE.dtype)


Moving = tuple[jax.Array, jax.Array]  # a value and its tangent


def _block_tangent(
    scores: Scores,
    mask_BTS: jax.Array,
    queries: Moving,
    keys: Moving,
    values: Moving,
    normaliser: Moving,
    sinks: Moving | None,
) -> jax.Array:
    """[B, K, G, T, E] float32. With weights w = exp(score - top) / total, d log total is the sum of w d score over
    keys, and d out that of w (d value + (d score - d log total) value)."""
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    product = functools.partial(einsum, "BKGTC,BKSC->BKGTS")
    (q, moved_q), (k, moved_k), (top_BKGT1, total_BKGT1) = queries, keys, normaliser
    scale = scores.scale_of(q.shape[-1])
    scores_BKGTS, moved_BKGTS = product(q, k) * scale, (product(moved_q, k) + product(q, moved_k)) * scale
    if scores.softcap is not None:
        scores_BKGTS = scores.softcap * jnp.tanh(scores_BKGTS / scores.softcap)
        moved_BKGTS *= 1 - (scores_BKGTS / scores.softcap) ** 2
    weights_BKGTS = jnp.exp(less(scores_BKGTS, to_add(mask_BTS[:, None, None]), top_BKGT1)) / total_BKGT1
    moved_total_BKGT1 = jnp.sum(weights_BKGTS * moved_BKGTS, axis=-1, keepdims=True)
    if sinks is not None:
        sinks_KG11, moved_KG11 = (x.astype(jnp.float32).reshape(*q.shape[1:3], 1, 1) for x in sinks)
        moved_total_BKGT1 += jnp.exp(sinks_KG11 - top_BKGT1) / total_BKGT1 * moved_KG11
    weigh = functools.partial(einsum, "BKGTS,BKSE->BKGTE")
    return weigh(weights_BKGTS * (moved_BKGTS - moved_total_BKGT1), values[0]) + weigh(
        weights_BKGTS, values[1]
    )


def _block_gradients(
    scores: Scores,
    keys: tuple[jax.Array, jax.Array, jax.Array],
    q_BKNC: jax.Array,
    d_out_BKGTE: jax.Array,
    top_BKGT1: jax.Array,
    delta_BKGT1: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a block's queries [B, T, H, C] and of its (keys, values, mask), float32; `d_out` and `delta` are divided by
    the sum of weights already. Each query sees at least itself, so what is masked has a weight of exactly 0."""
    k_BKSC, v_BKSE, mask_BST = keys
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # G and T as one dimension in products: XLA would transpose queries in memory to merge them
    split = lambda x_N: x_N.reshape(*x_N.shape[:-1], *d_out_BKGTE.shape[2:4])
    row = lambda x_BKGT1: x_BKGT1[..., 0][:, :, None]
    d_out_BKNE = d_out_BKGTE.astype(v_BKSE.dtype).reshape(*q_BKNC.shape[:3], -1)
    raw_BKSGT = split(einsum("BKSC,BKNC->BKSN", k_BKSC, q_BKNC)) * scores.scale_of(q_BKNC.shape[-1])
    capped_BKSGT = (
        raw_BKSGT if scores.softcap is None else scores.softcap * jnp.tanh(raw_BKSGT / scores.softcap)
    )
    weights_BKSGT = jnp.exp(less(capped_BKSGT, to_add(mask_BST[:, None, :, None]), row(top_BKGT1)))
    weights_BKSN = weights_BKSGT.astype(v_BKSE.dtype).reshape(*weights_BKSGT.shape[:3], -1)
    dv_BKSE = einsum("BKSN,BKNE->BKSE", weights_BKSN, d_out_BKNE)
    d_weights_BKSGT = split(einsum("BKSE,BKNE->BKSN", v_BKSE, d_out_BKNE)) - row(delta_BKGT1)
    d_scores_BKSGT = weights_BKSGT * d_weights_BKSGT
    if scores.softcap is not None:
        d_scores_BKSGT *= 1 - (capped_BKSGT / scores.softcap) ** 2
    d_scores_BKSGT = (d_scores_BKSGT * scores.scale_of(q_BKNC.shape[-1])).astype(q_BKNC.dtype)
    d_scores_BKSN = d_scores_BKSGT.reshape(weights_BKSN.shape)
    dk_BKSC = einsum("BKSN,BKNC->BKSC", d_scores_BKSN, q_BKNC)
    dq_BKCN = einsum("BKSC,BKSN->BKCN", k_BKSC, d_scores_BKSN)
    return tokens_first(split(dq_BKCN).transpose(0, 1, 3, 4, 2)), dk_BKSC, dv_BKSE

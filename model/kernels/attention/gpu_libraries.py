"""Attention by the libraries' kernels for GPUs: cudnn through jax.nn, and tokamax."""

# B batch, T tokens, H query heads, K key/value heads, C width of a query and a key, E width of a value

from __future__ import annotations

import functools

import jax

from model.kernels import libraries
from model.kernels.attention.mask import Mask, chunk_segment_ids
from model.kernels.attention.reference import Scores


def cudnn(q_BTHC, k_BTKC, v_BTKE, positions_BT, segment_ids_BT, mask, scores, rules, chosen) -> jax.Array:
    """`self_attention` by jax.nn.dot_product_attention. Packed rows need a mask of [B, 1, T, T]."""
    attend = functools.partial(
        jax.nn.dot_product_attention, implementation="xla" if chosen.interpret else "cudnn"
    )
    arguments = _arguments(positions_BT, segment_ids_BT, mask, scores, q_BTHC.shape[-1])
    return attend(q_BTHC, k_BTKC, v_BTKE, **arguments)


def tokamax(q_BTHC, k_BTKC, v_BTKE, positions_BT, segment_ids_BT, mask, scores, rules, chosen) -> jax.Array:
    """`self_attention` by tokamax, which picks among its kernels for the device."""
    arguments = _arguments(positions_BT, segment_ids_BT, mask, scores, q_BTHC.shape[-1])
    how = {"implementation": "xla"} if chosen.interpret else {}
    attend = libraries.tokamax().dot_product_attention
    out_BTHE = attend(q_BTHC, k_BTKC, v_BTKE, **arguments, logits_soft_cap=scores.softcap, **how)
    return out_BTHE.astype(q_BTHC.dtype)


def _arguments(positions_BT, segment_ids_BT, mask: Mask, scores: Scores, width: int) -> dict:
    """Those of jax.nn.dot_product_attention."""
    ids_BT = chunk_segment_ids(positions_BT, segment_ids_BT, mask.chunk)
    before = None if mask.window is None else mask.window - 1
    return {
        "mask": None if ids_BT is None else (ids_BT[:, None, :, None] == ids_BT[:, None, None, :]),
        "is_causal": mask.causal,
        "scale": scores.scale_of(width),
        "local_window_size": None if before is None else (before, 0 if mask.causal else before),
    }

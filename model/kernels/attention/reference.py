"""Grouped-query attention in plain jnp, the definition that every implementation must equal.

Ainslie et al. 2023, arXiv:2305.13245. Softmax runs in float32. Sinks: Xiao et al.
2023, arXiv:2309.17453, as one learned logit a head; soft-capping: Gemma 2, arXiv:2408.00118.
"""

# B batch, T queries, S keys, H query heads, K key/value heads, G query heads of one key/value head
# C width of a query and a key, E width of a value

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from model.kernels import backend, cpu
from model.kernels.attention.mask import Mask

_MASKED = -1e30  # finite, so that a query without keys gives an average instead of NaN


@flax.struct.dataclass
class Scores:
    """How the product of a query and a key becomes a score."""

    scale: float | None = flax.struct.field(pytree_node=False, default=None)  # None: C ** -0.5
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)  # scores stay within +-softcap
    sinks_H: jax.Array | None = None  # a score that takes a share of the weights and adds no value
    # (key's position - query's position) [..., T, S] -> bias of the scores [..., H, T, S]
    bias: Callable[[jax.Array], jax.Array] | None = flax.struct.field(pytree_node=False, default=None)

    def scale_of(self, width: int) -> float:
        return width**-0.5 if self.scale is None else self.scale


def attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKE: jax.Array,
    mask_BTS: jax.Array,
    scores: Scores = Scores(),
    distance_BTS: jax.Array | None = None,
) -> jax.Array:
    """Attention with an explicit mask (True: visible).

    Args:
      distance_BTS: int32, key's position minus query's; needed if `scores.bias` is set.

    Returns:
      [B, T, H, E] in the dtype of `q`.
    """
    q_BKGTC, k_BKSC, v_BKSE = heads_first(q_BTHC, k_BSKC, v_BSKE)
    return tokens_first(attend(q_BKGTC, k_BKSC, v_BKSE, mask_BTS, scores, distance_BTS)[0])


def self_attention_weights(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    mask: Mask = Mask(),
    scores: Scores = Scores(),
) -> jax.Array:
    """The attention weights of `self_attention`, [B, H, T, S] float32, for inspection."""
    B, T, H = q_BTHC.shape[:3]
    mask_BTS = mask.within(slice(0, T), slice(0, T), positions_BT, segment_ids_BT)
    distance_1TT = (jnp.arange(T)[None] - jnp.arange(T)[:, None])[None]
    q_BKGTC, k_BKSC, _ = heads_first(q_BTHC, k_BTKC, k_BTKC)
    weights_BKGTS, _, total_BKGT1 = _weights(q_BKGTC, k_BKSC, mask_BTS, scores, distance_1TT)
    return (weights_BKGTS / total_BKGT1).reshape(B, H, T, T)


def attend(
    q_BKGTC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSE: jax.Array,
    mask_BTS: jax.Array,
    scores: Scores,
    distance_BTS: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(outputs, the maximum of each query's scores, the sum of its weights)."""
    weights_BKGTS, top_BKGT1, total_BKGT1 = _weights(q_BKGTC, k_BKSC, mask_BTS, scores, distance_BTS)
    out_BKGTE = jnp.einsum(
        "BKGTS,BKSE->BKGTE", weights_BKGTS.astype(v_BKSE.dtype), v_BKSE, preferred_element_type=jnp.float32
    )
    # dividing last takes E divisions instead of S
    out_BKGTE = (out_BKGTE / total_BKGT1).astype(q_BKGTC.dtype)
    return out_BKGTE, top_BKGT1, total_BKGT1


def _weights(
    q_BKGTC: jax.Array,
    k_BKSC: jax.Array,
    mask_BTS: jax.Array,
    scores: Scores,
    distance_BTS: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(unnormalized weights, the scores' maximum, the normalizer of the weights), float32."""
    B, K, G, T, C = q_BKGTC.shape
    scores_BKGTS = jnp.einsum("BKGTC,BKSC->BKGTS", q_BKGTC, k_BKSC, preferred_element_type=jnp.float32)
    scores_BKGTS *= scores.scale_of(C)
    if scores.softcap is not None:
        scores_BKGTS = scores.softcap * jnp.tanh(scores_BKGTS / scores.softcap)
    if scores.bias is not None:
        if distance_BTS is None:
            raise ValueError("a bias of the scores needs the distances of queries and keys; none were given.")
        bias_BHTS = scores.bias(distance_BTS)
        scores_BKGTS += bias_BHTS.reshape(bias_BHTS.shape[0], K, G, *bias_BHTS.shape[2:])
    mask_B11TS = mask_BTS[:, None, None]
    top_BKGT1 = cpu.row_max(lambda scores, mask: less(scores, mask, 0), scores_BKGTS, mask_B11TS)
    if scores.sinks_H is not None:
        sinks_KG11 = scores.sinks_H.astype(jnp.float32).reshape(K, G, 1, 1)
        top_BKGT1 = jnp.maximum(top_BKGT1, sinks_KG11)
    top_BKGT1 = jax.lax.stop_gradient(top_BKGT1)
    weights_BKGTS = jnp.exp(less(scores_BKGTS, mask_B11TS, top_BKGT1))
    total_BKGT1 = cpu.row_sum(weights_BKGTS)
    if scores.sinks_H is not None:
        total_BKGT1 += jnp.exp(sinks_KG11 - top_BKGT1)
    return weights_BKGTS, top_BKGT1, total_BKGT1


def less(scores: jax.Array, mask: jax.Array, top: jax.Array | float) -> jax.Array:
    """Masked scores minus `top`, for a bool mask or one from `to_add`.

    `top` is subtracted from the latter first, so that XLA stores no masked scores for their maximum and exponentials.
    """
    return jnp.where(mask, scores, _MASKED) - top if mask.dtype == bool else scores + (mask - top)


def to_add(mask: jax.Array) -> jax.Array:
    """On a CPU the mask as 0 and `_MASKED`, because adding is faster there than selecting.

    It does not hide NaN, and scores of a query without visible keys have gradients.
    """
    return jnp.where(mask, 0.0, _MASKED) if backend.for_cpu() else mask


def heads_first(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKE: jax.Array):
    q_BKGTC = queries_heads_first(q_BTHC, k_BSKC.shape[2])
    return q_BKGTC, k_BSKC.transpose(0, 2, 1, 3), v_BSKE.transpose(0, 2, 1, 3)


def queries_heads_first(x_BTHC: jax.Array, K: int) -> jax.Array:
    B, T, H, C = x_BTHC.shape
    return x_BTHC.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)


def tokens_first(out_BKGTE: jax.Array) -> jax.Array:
    B, K, G, T, E = out_BKGTE.shape
    return out_BKGTE.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, E)

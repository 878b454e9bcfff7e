"""Grouped-query attention in plain jnp: the reference that every faster form must equal.

Ainslie et al. 2023, arXiv:2305.13245. Softmax runs in float32 whatever the dtype of the inputs.
"""

# B batch, T queries, S keys, K key/value heads, G query heads of one key/value head, C head width

from __future__ import annotations

import jax
import jax.numpy as jnp

MAX_QUERY_BLOCKS = 16  # a causal row is cut into at most this many blocks of queries
MIN_QUERY_BLOCK = 64  # and into none shorter than this

_MASKED = -1e30  # finite, so that a row with no key at all gives an average instead of NaN


def attention(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Attention with an explicit mask (True: may look).

    Returns:
      [B, T, H, C] in the dtype of `q`.
    """
    q_BKGTC, k_BKSC, v_BKSC = _heads_first(q_BTHC, k_BSKC, v_BSKC)
    return _tokens_first(_attend(q_BKGTC, k_BKSC, v_BKSC, mask_BTS))


def causal_attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    segment_ids_BT: jax.Array | None,
    window: int | None = None,
) -> jax.Array:
    """Causal attention within segments; each block of queries is given only the keys that some of it can see.

    Args:
      segment_ids_BT: int32; a token sees only tokens of its own segment. None: each row is one document.
      window: a token sees itself and the `window - 1` tokens before it. None: all before it.
    """
    T = q_BTHC.shape[1]
    block = max(MIN_QUERY_BLOCK, -(-T // MAX_QUERY_BLOCKS))
    q_BKGTC, k_BKSC, v_BKSC = _heads_first(q_BTHC, k_BTKC, v_BTKC)
    outputs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        first = 0 if window is None else max(0, start - window + 1)
        mask_BTS = sees(jnp.arange(start, stop)[:, None], jnp.arange(first, stop)[None], window)[None]
        if segment_ids_BT is not None:
            mask_BTS = mask_BTS & (segment_ids_BT[:, start:stop, None] == segment_ids_BT[:, None, first:stop])
        outputs.append(
            _attend(
                q_BKGTC[:, :, :, start:stop], k_BKSC[:, :, first:stop], v_BKSC[:, :, first:stop], mask_BTS
            )
        )
    return _tokens_first(outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3))


def sees(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """Whether a query at one position may look at a key at another: not ahead, and not beyond the window."""
    return key <= query if window is None else (key <= query) & (query - key < window)


def _attend(q_BKGTC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    scores_BKGTS = jnp.einsum("BKGTC,BKSC->BKGTS", q_BKGTC, k_BKSC, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS * q_BKGTC.shape[-1] ** -0.5, _MASKED)
    weights_BKGTS = jnp.exp(scores_BKGTS - jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True)))
    total_BKGT1 = weights_BKGTS.sum(axis=-1, keepdims=True)
    out_BKGTC = jnp.einsum(
        "BKGTS,BKSC->BKGTC", weights_BKGTS.astype(v_BKSC.dtype), v_BKSC, preferred_element_type=jnp.float32
    )
    return (out_BKGTC / total_BKGT1).astype(q_BKGTC.dtype)  # divided last: over C numbers instead of S


def _heads_first(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array):
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BKGTC = q_BTHC.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)
    return q_BKGTC, k_BSKC.transpose(0, 2, 1, 3), v_BSKC.transpose(0, 2, 1, 3)


def _tokens_first(out_BKGTC: jax.Array) -> jax.Array:
    B, K, G, T, C = out_BKGTC.shape
    return out_BKGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, C)

"""Grouped-query attention in plain jnp: the reference that every faster form must equal.

Ainslie et al. 2023, arXiv:2305.13245. Softmax runs in float32 whatever the dtype of the inputs.
"""

# B batch, T queries, S keys, K key/value heads, G query heads of one key/value head, C head width

from __future__ import annotations

import jax
import jax.numpy as jnp

QUERY_BLOCK = 128  # queries that share one slice of keys; a causal block skips the keys after it

_MASKED = -1e30  # finite, so that a row with no key at all gives an average instead of NaN


def attention(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Attention with an explicit mask (True: may look).

    Returns:
      [B, T, H, C] in the dtype of `q`.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores_BKGTS = jnp.einsum("BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS * C**-0.5, _MASKED)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKC.dtype)
    out_BTKGC = jnp.einsum("BKGTS,BSKC->BTKGC", probs_BKGTS, v_BSKC)
    return out_BTKGC.reshape(B, T, H, C)


def causal_attention(
    q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Causal attention within segments; each block of queries is given only the keys up to its own end.

    Args:
      segment_ids_BT: int32; a token sees only tokens of its own segment. None: each row is one document.
    """
    T = q_BTHC.shape[1]
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        mask_BTS = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None])[None]
        if segment_ids_BT is not None:
            mask_BTS = mask_BTS & (segment_ids_BT[:, start:stop, None] == segment_ids_BT[:, None, :stop])
        blocks.append(attention(q_BTHC[:, start:stop], k_BTKC[:, :stop], v_BTKC[:, :stop], mask_BTS))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)

"""RWKV-7's state in chunks, in plain jnp: a decay for each channel and a general change of rank one.

Peng et al. 2025, arXiv:2503.14456. The delta rule reads and writes with the same vector. Here a token reads the state
with one vector and writes with another, so the chunk's triangular system is solved for the read values.
"""

# B batch, T tokens, Q tokens of a chunk, H heads, K key width, V value width

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.delta_rule.reference import (
    CHUNK,
    decayed_products,
    fitting_chunk,
    heads_first,
    solve_unit_lower,
)
from model.kernels.recurrence.chunks import same_document, scan_chunks


def rwkv7(
    r_BTHK: jax.Array,
    log_decay_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    a_BTHK: jax.Array,
    b_BTHK: jax.Array,
    first_BT: jax.Array,
    state_BHKV: jax.Array,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """state_t = exp(log_decay_t) state_(t-1) + b_t (a_t^T state_(t-1)) + k_t v_t^T;  o_t = r_t^T state_t.

    Args:
      log_decay_BTHK: not above 0. A token with log_decay, k and b 0 does not change the state.
      first_BT: bool; a document starts here, so the state before the token is zero.
      chunk: a power of two.

    Returns:
      o [B, T, H, V] and the last state [B, H, K, V], float32.
    """

    def step(state_BHKV, inputs):
        return _chunk(state_BHKV, *inputs)

    inputs = (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, first_BT)
    state_BHKV, o_BTHV = scan_chunks(
        step, state_BHKV.astype(jnp.float32), inputs, fitting_chunk(r_BTHK.shape[1], chunk)
    )
    return o_BTHV, state_BHKV


def _chunk(state_BHKV, r_BQHK, log_decay_BQHK, k_BQHK, v_BQHV, a_BQHK, b_BQHK, first_BQ):
    r_BHQK, log_decay_BHQK, k_BHQK, v_BHQV, a_BHQK, b_BHQK = (
        heads_first(x) for x in (r_BQHK, log_decay_BQHK, k_BQHK, v_BQHV, a_BQHK, b_BQHK)
    )
    pairs_BQQ, from_before_BQ, to_after_BQ = same_document(first_BQ)
    seen_BHQ1, to_after_BHQ1 = from_before_BQ[:, None, :, None], to_after_BQ[:, None, :, None]
    total_BHQK = jnp.cumsum(log_decay_BHQK, axis=2)
    before_BHQK = jnp.pad(total_BHQK[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))  # without the token itself

    def earlier(keys_BHQK):
        return decayed_products(a_BHQK, keys_BHQK, before_BHQK, total_BHQK, pairs_BQQ, strict=True)

    def so_far(keys_BHQK):
        return decayed_products(r_BHQK, keys_BHQK, total_BHQK, total_BHQK, pairs_BQQ)

    known_BHQV = (a_BHQK * jnp.exp(before_BHQK) * seen_BHQ1) @ state_BHKV + earlier(k_BHQK) @ v_BHQV
    read_BHQV = solve_unit_lower(-earlier(b_BHQK), known_BHQV)
    decay_in_BHQK = jnp.exp(total_BHQK) * seen_BHQ1
    o_BHQV = (r_BHQK * decay_in_BHQK) @ state_BHKV + so_far(b_BHQK) @ read_BHQV + so_far(k_BHQK) @ v_BHQV

    decay_out_BHQK = jnp.exp(total_BHQK[:, :, -1:] - total_BHQK) * to_after_BHQ1
    added_BHKV = jnp.einsum("BHQK,BHQV->BHKV", b_BHQK * decay_out_BHQK, read_BHQV)
    added_BHKV += jnp.einsum("BHQK,BHQV->BHKV", k_BHQK * decay_out_BHQK, v_BHQV)
    return state_BHKV * decay_in_BHQK[:, :, -1, :, None] + added_BHKV, o_BHQV.swapaxes(1, 2)

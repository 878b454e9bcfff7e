"""State-space duality in plain jnp, in chunks: the definition.

Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060. Retention (arXiv:2307.08621) is the case of a fixed decay.
"""

# B batch, T and S tokens, Q tokens of a chunk, H heads in G groups of R, P value width, N key (state) width

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.recurrence.chunks import same_document, scan_chunks

CHUNK = 128


def in_chunks(
    v_BTHP: jax.Array,
    log_decay_BTH: jax.Array,
    k_BTGN: jax.Array,
    q_BTGN: jax.Array,
    first_BT: jax.Array,
    state_BHPN: jax.Array,
    chunk: int = CHUNK,
    scale_BTH: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `ssd`."""
    if scale_BTH is not None:
        v_BTHP = v_BTHP.astype(jnp.float32) * scale_BTH[..., None]

    def step(state_BHPN, inputs):
        return _chunk(state_BHPN, *inputs)

    inputs = (v_BTHP, log_decay_BTH, k_BTGN, q_BTGN, first_BT)
    state_BHPN, y_BTHP = scan_chunks(
        step, state_BHPN.astype(jnp.float32), inputs, min(chunk, v_BTHP.shape[1])
    )
    return y_BTHP, state_BHPN


def _chunk(state_BHPN, v_BQHP, log_decay_BQH, k_BQGN, q_BQGN, first_BQ):
    B, Q, H, P = v_BQHP.shape
    G = k_BQGN.shape[2]
    v_BQGRP = v_BQHP.astype(jnp.float32).reshape(B, Q, G, H // G, P)
    k_BQGN, q_BQGN = k_BQGN.astype(jnp.float32), q_BQGN.astype(jnp.float32)
    state_BGRPN = state_BHPN.reshape(B, G, H // G, P, -1)
    pairs_BQQ, from_before_BQ, to_after_BQ = same_document(first_BQ)
    total_BQH = jnp.cumsum(log_decay_BQH.astype(jnp.float32), axis=1)
    grouped = lambda x_BQH: x_BQH.reshape(B, Q, G, H // G)

    # Every exponent is of decays between two tokens, so none is above 0; the others are masked before exp.
    between_BTSH = total_BQH[:, :, None] - total_BQH[:, None]
    decay_BTSH = jnp.exp(jnp.where(pairs_BQQ[..., None], between_BTSH, -jnp.inf))
    scores_BTSG = jnp.einsum("BTGN,BSGN->BTSG", q_BQGN, k_BQGN)
    weights_BTSGR = scores_BTSG[..., None] * decay_BTSH.reshape(B, Q, Q, G, H // G)
    within_BQGRP = jnp.einsum("BTSGR,BSGRP->BTGRP", weights_BTSGR, v_BQGRP)

    decay_in_BQH = jnp.exp(total_BQH) * from_before_BQ[..., None]
    before_BQGRP = jnp.einsum("BQGN,BGRPN->BQGRP", q_BQGN, state_BGRPN)
    y_BQGRP = within_BQGRP + before_BQGRP * grouped(decay_in_BQH)[..., None]

    decay_out_BQH = jnp.exp(total_BQH[:, -1:] - total_BQH) * to_after_BQ[..., None]
    added_BGRPN = jnp.einsum("BQGRP,BQGN->BGRPN", v_BQGRP * grouped(decay_out_BQH)[..., None], k_BQGN)
    carried_BGR = grouped(decay_in_BQH)[:, -1]
    state_BGRPN = state_BGRPN * carried_BGR[..., None, None] + added_BGRPN
    return state_BGRPN.reshape(state_BHPN.shape), y_BQGRP.reshape(B, Q, H, P)

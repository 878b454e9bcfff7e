"""Elementwise linear recurrences in plain jnp, by an associative scan within chunks.

`linear_scan` is the recurrence itself (RG-LRU, arXiv:2402.19427); `selective_scan` is Mamba's, arXiv:2312.00752.
Its states are computed and read chunk by chunk, because all of them together would not fit in memory.
"""

# B batch, T tokens, Q tokens of a chunk, F channels (any further axes), N state width

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.recurrence.chunks import scan_chunks

LINEAR_CHUNK = 256
SELECTIVE_CHUNK = 32


def linear_scan(
    x_BTF: jax.Array,
    log_decay_BTF: jax.Array,
    first_BT: jax.Array,
    state_BF: jax.Array,
    chunk: int = LINEAR_CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """state_t = exp(log_decay_t) state_(t-1) + x_t.

    Args:
      log_decay_BTF: not above 0. A token with log_decay 0 and x 0 does not change the state.
      first_BT: bool; a document starts here, so the state before the token is zero.

    Returns:
      The states after every token [B, T, F] and after the last [B, F], float32.
    """

    def step(state_BF, inputs):
        states_BQF = _states(state_BF, *inputs)
        return states_BQF[:, -1], states_BQF

    inputs = (x_BTF, log_decay_BTF, first_BT)
    state_BF, states_BTF = scan_chunks(step, state_BF.astype(jnp.float32), inputs, min(chunk, x_BTF.shape[1]))
    return states_BTF, state_BF


def selective_scan(
    x_BTF: jax.Array,
    dt_BTF: jax.Array,
    A_FN: jax.Array,
    k_BTN: jax.Array,
    q_BTN: jax.Array,
    first_BT: jax.Array,
    state_BFN: jax.Array,
    chunk: int = SELECTIVE_CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """state_t = exp(dt_t A) state_(t-1) + dt_t x_t k_t^T;  y_t = state_t q_t.

    Args:
      dt_BTF: not below 0; 0 does not change the state.
      A_FN: not above 0.
      k_BTN, q_BTN: "B" and "C" of the paper.
      first_BT: bool; a document starts here, so the state before the token is zero.

    Returns:
      y [B, T, F] and the last state [B, F, N], float32.
    """

    def step(state_BFN, inputs):
        x_BQF, dt_BQF, k_BQN, q_BQN, first_BQ = inputs
        added_BQFN = (dt_BQF * x_BQF)[..., None] * k_BQN[:, :, None]
        states_BQFN = _states(state_BFN, added_BQFN, dt_BQF[..., None] * A_FN, first_BQ)
        return states_BQFN[:, -1], jnp.einsum("BQFN,BQN->BQF", states_BQFN, q_BQN)

    inputs = (*(x.astype(jnp.float32) for x in (x_BTF, dt_BTF, k_BTN, q_BTN)), first_BT)
    state_BFN, y_BTF = scan_chunks(step, state_BFN.astype(jnp.float32), inputs, min(chunk, x_BTF.shape[1]))
    return y_BTF, state_BFN


def _states(state_BF, x_BQF, log_decay_BQF, first_BQ) -> jax.Array:
    """The state after each token of a chunk; a document's first token has decay 0."""
    first_BQF = first_BQ.reshape(first_BQ.shape + (1,) * (x_BQF.ndim - 2))
    decay_BQF = jnp.where(first_BQF, 0.0, jnp.exp(log_decay_BQF.astype(jnp.float32)))

    def after(earlier, later):
        decay_1, x_1 = earlier
        decay_2, x_2 = later
        return decay_1 * decay_2, decay_2 * x_1 + x_2

    decay_BQF, x_BQF = jax.lax.associative_scan(after, (decay_BQF, x_BQF.astype(jnp.float32)), axis=1)
    return decay_BQF * state_BF[:, None] + x_BQF

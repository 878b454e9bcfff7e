"""State-space duality: a linear recurrence of matrices with one decay a head, computed in chunks.

Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060. Retention (arXiv:2307.08621) is the case of a fixed decay.
`SSD` has the implementations; see model.kernels.choice.
"""

# B batch, T tokens, H heads in G groups, P value width, N key (state) width

from __future__ import annotations

import jax

from model.kernels import backend
from model.kernels.choice import Implementation, Operation
from model.kernels.recurrence.chunks import Request, too_short
from model.kernels.ssd.reference import CHUNK, in_chunks
from model.sharding import ShardingRules


def ssd(
    v_BTHP: jax.Array,
    log_decay_BTH: jax.Array,
    k_BTGN: jax.Array,
    q_BTGN: jax.Array,
    first_BT: jax.Array,
    state_BHPN: jax.Array,
    chunk: int = CHUNK,
    rules: ShardingRules | None = None,
    scale_BTH: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """state_t = exp(log_decay_t) state_(t-1) + scale_t v_t k_t^T;  y_t = state_t q_t.

    Args:
      log_decay_BTH: not above 0. A token with log_decay 0 and v 0 does not change the state.
      k_BTGN, q_BTGN: shared by the H // G heads of a group ("B" and "C" of the paper).
      first_BT: bool; a document starts here, so the state before the token is zero.
      chunk: tokens of a chunk of the plain implementation.
      rules: how a mesh splits rows and heads; only the kernel needs it.
      scale_BTH: such as Mamba's time steps; None: 1. The kernel scales values when it reads them, which saves memory.

    Returns:
      y [B, T, H, P] and the last state [B, H, P, N], float32.
    """
    inputs = v_BTHP, log_decay_BTH, k_BTGN, q_BTGN, first_BT, state_BHPN
    request = Request(backend.current(), v_BTHP.shape[1])
    return SSD.choose(request).run(*inputs, chunk, scale_BTH, rules)


def _plain(*arguments) -> tuple[jax.Array, jax.Array]:
    return in_chunks(*arguments[:-1])


def _by_kernel(v_BTHP, log_decay_BTH, k_BTGN, q_BTGN, first_BT, state_BHPN, chunk, scale_BTH, rules):
    from model.kernels.ssd.sharded import ssd_on_mesh  # imports Pallas, which is slow

    return ssd_on_mesh(v_BTHP, log_decay_BTH, k_BTGN, q_BTGN, first_BT, state_BHPN, scale_BTH, rules)


SSD = Operation(
    "ssd",
    {
        "plain": Implementation(("plain", "gpu", "tpu"), _plain),
        "kernel": Implementation(("tpu",), _by_kernel, too_short),
    },
    preferred={"plain": ("plain",), "gpu": ("plain",), "tpu": ("kernel", "plain")},
)

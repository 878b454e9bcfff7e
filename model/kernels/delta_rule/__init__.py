"""The delta rule in chunks: a state of key-value pairs; a new value replaces the old one of its key.

Yang et al. 2024, arXiv:2406.06484. Decay by head: Gated DeltaNet, arXiv:2412.06464; by channel of the key: Kimi Linear,
arXiv:2510.26692. `DELTA_RULE` has the implementations; see model.kernels.choice.
"""

# B batch, T tokens, H heads, K key width, V value width; C channels of the decay: K, or 1 for one decay a head

from __future__ import annotations

import jax

from model.kernels import backend
from model.kernels.choice import Implementation, Operation
from model.kernels.delta_rule.reference import CHUNK, in_chunks
from model.kernels.recurrence.chunks import Request, too_short
from model.sharding import ShardingRules


def delta_rule(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_BTHC: jax.Array,
    beta_BTH: jax.Array,
    first_BT: jax.Array,
    state_BHKV: jax.Array,
    chunk: int = CHUNK,
    rules: ShardingRules | None = None,
) -> tuple[jax.Array, jax.Array]:
    """old = exp(log_decay_t) state_(t-1);  state_t = old + k_t beta_t (v_t - k_t^T old);  o_t = q_t^T state_t.

    Args:
      log_decay_BTHC: not above 0; C is 1 (one decay a head) or K. A token with log_decay 0 and beta 0 does not
        change the state.
      first_BT: bool; a document starts here, so the state before the token is zero.
      chunk: tokens of a chunk of the plain implementation, a power of two.
      rules: how a mesh splits rows and heads; only the kernel needs it.

    Returns:
      o [B, T, H, V] and the last state [B, H, K, V], float32.
    """
    inputs = q_BTHK, k_BTHK, v_BTHV, log_decay_BTHC, beta_BTH, first_BT, state_BHKV
    request = Request(backend.current(), q_BTHK.shape[1], log_decay_BTHC.shape[3] > 1)
    return DELTA_RULE.choose(request).run(*inputs, chunk, rules)


def _plain(*arguments) -> tuple[jax.Array, jax.Array]:
    return in_chunks(*arguments[:-1])


def _by_kernel(q_BTHK, k_BTHK, v_BTHV, log_decay_BTHC, beta_BTH, first_BT, state_BHKV, chunk, rules):
    from model.kernels.delta_rule.sharded import delta_on_mesh  # imports Pallas, which is slow

    decays_and_state = log_decay_BTHC[..., 0], beta_BTH, first_BT, state_BHKV
    return delta_on_mesh(q_BTHK, k_BTHK, v_BTHV, *decays_and_state, rules)


def _kernel_refusal(request: Request) -> str | None:
    return too_short(request) or ("it has one decay a head" if request.decays_by_channel else None)


DELTA_RULE = Operation(
    "delta_rule",
    {
        "plain": Implementation(("plain", "gpu", "tpu"), _plain),
        "kernel": Implementation(("tpu",), _by_kernel, _kernel_refusal),
    },
    preferred={"plain": ("plain",), "gpu": ("plain",), "tpu": ("kernel", "plain")},
)

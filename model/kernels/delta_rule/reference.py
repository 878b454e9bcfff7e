"""The delta rule in plain jnp, in chunks: the definition.

Within a chunk the corrections of all tokens solve one triangular system (the WY form; Yang et al. 2024,
arXiv:2406.06484). Decay by head: Gated DeltaNet, arXiv:2412.06464; by channel of the key: Kimi Linear,
arXiv:2510.26692.
"""

# B batch, T and S tokens, Q tokens of a chunk, H heads, K key width, V value width
# C channels of the decay: K, or 1 for one decay a head; N blocks of U tokens within a chunk

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.derivatives import differentiable
from model.kernels.recurrence.chunks import same_document, scan_chunks

CHUNK = 64
BLOCK = 16  # block of tokens with decays by channel for each pair
LOOPED = 32  # size of the blocks that are inverted directly: the products grow with its cube


def in_chunks(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_BTHC: jax.Array,
    beta_BTH: jax.Array,
    first_BT: jax.Array,
    state_BHKV: jax.Array,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """See `delta_rule`."""

    def step(state_BHKV, inputs):
        return _delta_chunk(state_BHKV, *inputs)

    inputs = (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHC, beta_BTH[..., None], first_BT)
    state_BHKV, o_BTHV = scan_chunks(
        step, state_BHKV.astype(jnp.float32), inputs, fitting_chunk(q_BTHK.shape[1], chunk)
    )
    return o_BTHV, state_BHKV


def fitting_chunk(length: int, chunk: int) -> int:
    """The smallest power of two of at least `length` tokens, at most `chunk`."""
    return min(chunk, 1 << (length - 1).bit_length())


def _delta_chunk(state_BHKV, q_BQHK, k_BQHK, v_BQHV, log_decay_BQHC, beta_BQH1, first_BQ):
    q_BHQK, k_BHQK, v_BHQV, log_decay_BHQC, beta_BHQ1 = (
        heads_first(x) for x in (q_BQHK, k_BQHK, v_BQHV, log_decay_BQHC, beta_BQH1)
    )
    pairs_BQQ, from_before_BQ, to_after_BQ = same_document(first_BQ)
    total_BHQC = jnp.cumsum(log_decay_BHQC, axis=2)
    decay_in_BHQC = jnp.exp(total_BHQC) * from_before_BQ[:, None, :, None]
    decay_out_BHQC = jnp.exp(total_BHQC[:, :, -1:] - total_BHQC) * to_after_BQ[:, None, :, None]

    known_BHQV = (k_BHQK * decay_in_BHQC) @ state_BHKV
    overlap_BHQQ = beta_BHQ1 * decayed_products(
        k_BHQK, k_BHQK, total_BHQC, total_BHQC, pairs_BQQ, strict=True
    )
    written_BHQV = solve_unit_lower(overlap_BHQQ, beta_BHQ1 * (v_BHQV - known_BHQV))
    scores_BHQQ = decayed_products(q_BHQK, k_BHQK, total_BHQC, total_BHQC, pairs_BQQ)
    o_BHQV = (q_BHQK * decay_in_BHQC) @ state_BHKV + scores_BHQQ @ written_BHQV

    added_BHKV = jnp.einsum("BHQK,BHQV->BHKV", k_BHQK * decay_out_BHQC, written_BHQV)
    return state_BHKV * decay_in_BHQC[:, :, -1, :, None] + added_BHKV, o_BHQV.swapaxes(1, 2)


def heads_first(x_BQHK: jax.Array) -> jax.Array:
    return x_BQHK.astype(jnp.float32).swapaxes(1, 2)


def decayed_products(
    q_BHQK: jax.Array,
    k_BHQK: jax.Array,
    q_total_BHQC: jax.Array,
    k_total_BHQC: jax.Array,
    pairs_BQQ: jax.Array,
    strict: bool = False,
) -> jax.Array:
    """[B, H, Q, Q]: sum over c of q_tc k_sc exp(q_total_tc - k_total_sc) for the `pairs` (t, s), else 0.

    Totals decrease with the tokens, and q_total_t <= k_total_s for s <= t (s < t if `strict`), so no exponent is above
    0. With a decay for each channel, a token's exponent towards an earlier block is split at the end of the previous
    block; within a block, each pair has its own exponent.
    """
    B, H, Q, C = q_total_BHQC.shape
    causal_QQ = jnp.tril(jnp.ones((Q, Q), bool), -1 if strict else 0)
    pairs_BHQQ = (pairs_BQQ & causal_QQ)[:, None]
    if C == 1:
        between_BHQQ = q_total_BHQC - k_total_BHQC.swapaxes(2, 3)
        scores_BHQQ = jnp.einsum("BHTK,BHSK->BHTS", q_BHQK, k_BHQK)
        return scores_BHQQ * jnp.exp(jnp.where(pairs_BHQQ, between_BHQQ, -jnp.inf))

    U = min(BLOCK, Q)
    N = Q // U
    q_BHNUK, k_BHNUK, q_total_BHNUK, k_total_BHNUK = (
        x.reshape(B, H, N, U, C) for x in (q_BHQK, k_BHQK, q_total_BHQC, k_total_BHQC)
    )
    cut_BHN1K = jnp.pad(k_total_BHNUK[:, :, :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
    earlier_NQ1 = (jnp.arange(Q) < jnp.arange(0, Q, U)[:, None])[..., None]
    to_cut_BHNQK = jnp.where(earlier_NQ1, cut_BHN1K - k_total_BHQC[:, :, None], -jnp.inf)
    products_BHNUQ = jnp.einsum(
        "BHNUK,BHNQK->BHNUQ",
        q_BHNUK * jnp.exp(q_total_BHNUK - cut_BHN1K),
        k_BHQK[:, :, None] * jnp.exp(to_cut_BHNQK),
    )
    between_BHNUUK = q_total_BHNUK[..., :, None, :] - k_total_BHNUK[..., None, :, :]
    decay_BHNUUK = jnp.exp(jnp.where(causal_QQ[:U, :U, None], between_BHNUUK, -jnp.inf))
    decayed_BHNUUK = k_BHNUK[..., None, :, :] * decay_BHNUUK
    within_BHNUU = jnp.einsum("BHNTK,BHNTSK->BHNTS", q_BHNUK, decayed_BHNUUK)
    within_BHNUNU = jnp.einsum("BHNTS,NM->BHNTMS", within_BHNUU, jnp.eye(N))
    return jnp.where(pairs_BHQQ, products_BHNUQ.reshape(B, H, Q, Q) + within_BHNUNU.reshape(B, H, Q, Q), 0)


def solve_unit_lower(strict_BHQQ: jax.Array, y_BHQV: jax.Array) -> jax.Array:
    """Solves (1 + strict) x = y for x, with a strictly lower triangular matrix; its size is a power of two.

    The inverse is built from inverses of diagonal blocks of doubling size: as stable as forward substitution, with only
    matrix products. Derivatives use the inverse, not the steps that built it.
    """
    return differentiable(_solve, _solve_tangent, _solve_gradients)(strict_BHQQ, y_BHQV)


def _solve(strict_BHQQ: jax.Array, y_BHQV: jax.Array):
    inverse_BHQQ = _inverse_unit_lower(strict_BHQQ)
    x_BHQV = _product(inverse_BHQQ, y_BHQV)
    return x_BHQV, (inverse_BHQQ, x_BHQV)


def _solve_tangent(saved, tangents: tuple[jax.Array, jax.Array]) -> jax.Array:
    (inverse_BHQQ, x_BHQV), (strict_BHQQ, y_BHQV) = saved, tangents
    return _product(inverse_BHQQ, y_BHQV - _product(jnp.tril(strict_BHQQ, -1), x_BHQV))


def _solve_gradients(saved, dx_BHQV: jax.Array):
    inverse_BHQQ, x_BHQV = saved
    dy_BHQV = _product(inverse_BHQQ.mT, dx_BHQV)
    return -jnp.tril(_product(dy_BHQV, x_BHQV.mT), -1), dy_BHQV


def _inverse_unit_lower(strict_BHQQ: jax.Array) -> jax.Array:
    """Inverses of blocks of twice the size: X - X C X, from the blocks' inverses X and the corners C between them."""
    Q = strict_BHQQ.shape[-1]
    if Q <= LOOPED:
        return _small_inverse(strict_BHQQ)
    half = Q // 2
    blocks = jnp.stack([strict_BHQQ[..., :half, :half], strict_BHQQ[..., half:, half:]])
    top, bottom = _inverse_unit_lower(blocks)
    corner = -_product(bottom, _product(strict_BHQQ[..., half:, :half], top))
    top = jnp.concatenate([top, jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, bottom], axis=-1)], axis=-2)


def _small_inverse(strict_BHQQ: jax.Array) -> jax.Array:
    """The same as a loop, with the whole matrix in each step: it compiles in a quarter of the time."""
    Q = strict_BHQQ.shape[-1]
    apart_QQ = jnp.arange(Q)[:, None] ^ jnp.arange(Q)

    def double(level, x_BHQQ):
        size = 1 << level
        corners_BHQQ = jnp.where(apart_QQ & -size == size, strict_BHQQ, 0)  # in one block of twice the size
        return x_BHQQ - _product(x_BHQQ, _product(corners_BHQQ, x_BHQQ))

    start_BHQQ = jnp.broadcast_to(jnp.eye(Q, dtype=strict_BHQQ.dtype), strict_BHQQ.shape)
    return jax.lax.fori_loop(0, Q.bit_length() - 1, double, start_BHQQ)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product with full precision: a TPU would round to bfloat16, and the inverse amplifies such errors."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

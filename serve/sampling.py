"""Choosing the next token on the device. Each row has its own parameters and its own noise.

A row's noise comes from its seed and the token's position alone, so its tokens do not depend on its neighbours, on
the batch it ran in or on how often it was interrupted.
"""

# R rows, V vocabulary, N blocks of M tokens each, N * M >= V

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from serve.request import MAX_LOGPROBS


@flax.struct.dataclass
class RowSampling:
    """Sampling parameters, one of each a row, on the host or on the device; see `SamplingParams`."""

    temperature: Any  # [R] float32
    top_k: Any  # [R] int32
    top_p: Any  # [R] float32
    min_p: Any  # [R] float32
    typical_p: Any  # [R] float32
    seed: Any  # [R, 2] uint32, high and low word
    alternatives: Any  # [R] int32, top log-probabilities wanted; 0 for none


@flax.struct.dataclass
class Sampled:
    token: jax.Array  # [R] int32
    logprob: jax.Array  # [R] float32, at the sampling temperature; NaN when the logits are not finite
    model_logprob: jax.Array  # [R] float32, at temperature 1
    processed_logprob: jax.Array  # [R] float32, under the distribution that the token was drawn from
    kept_mass: jax.Array  # [R] float32, the share of the distribution that the filters kept
    top_token: jax.Array  # [R, 20] int32
    top_logprob: jax.Array  # [R, 20] float32


def sample(
    logits_RV: jax.Array,
    rows: RowSampling,
    position_R: jax.Array,
    vocab_size: int,
    edited_RV: jax.Array | None = None,
) -> Sampled:
    """One token a row.

    Args:
      logits_RV: float32.
      position_R: where the new token will stand, counted from the first token of the prompt.
      vocab_size: ids from here on (padding of the embedding) are never chosen.
      edited_RV: the logits to choose from (serve.logits); None: `logits_RV`.
    """
    V = logits_RV.shape[1]
    greedy_R = rows.temperature == 0
    temperature_R1 = jnp.where(greedy_R, 1.0, rows.temperature)[:, None]
    scaled_RV = logits_RV / temperature_R1
    full_RV = scaled_RV if edited_RV is None else edited_RV / temperature_R1
    full_RV = jnp.where(jnp.arange(V) < vocab_size, full_RV, -jnp.inf)
    filtered_R = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0) | (rows.typical_p < 1)
    # Each `cond` saves work that no row asked for, without another program to compile.
    choice_RV = jax.lax.cond(jnp.any(filtered_R & ~greedy_R), _filter, lambda x, _: x, full_RV, rows)
    greedy_token_R = jnp.argmax(choice_RV, axis=-1).astype(jnp.int32)
    drawn_R = jax.lax.cond(
        jnp.any(~greedy_R), _draw, lambda *_: greedy_token_R, choice_RV, rows.seed, position_R
    )
    token_R = jnp.where(greedy_R, greedy_token_R, drawn_R)
    model_log_z_R = jax.nn.logsumexp(logits_RV, axis=-1)
    full_log_z_R, kept_log_z_R = jax.nn.logsumexp(full_RV, axis=-1), jax.nn.logsumexp(choice_RV, axis=-1)
    # A greedy row keeps its token alone.
    kept_log_z_R = jnp.where(greedy_R, _at(choice_RV, token_R), kept_log_z_R)
    count = min(MAX_LOGPROBS, V)
    top = jax.lax.cond(
        jnp.any(rows.alternatives > 0),
        lambda: tuple(jax.lax.top_k(logits_RV, count)),
        lambda: (jnp.zeros((len(logits_RV), count)), jnp.zeros((len(logits_RV), count), jnp.int32)),
    )
    return Sampled(
        token_R,
        _at(scaled_RV, token_R) - jax.nn.logsumexp(scaled_RV, axis=-1),
        _at(logits_RV, token_R) - model_log_z_R,
        _at(choice_RV, token_R) - kept_log_z_R,
        jnp.exp(kept_log_z_R - full_log_z_R),
        top[1],
        top[0] - model_log_z_R[:, None],
    )


def _at(x_RV: jax.Array, token_R: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_RV, token_R[:, None], axis=1)[:, 0]


def _filter(choice_RV: jax.Array, rows: RowSampling) -> jax.Array:
    """-inf for what top-k, top-p and min-p exclude."""
    order_RV = _ordered_bits(choice_RV)
    k_R = jnp.where(rows.top_k > 0, rows.top_k, choice_RV.shape[1])
    kept_RV = order_RV >= _threshold(order_RV, jnp.ones_like(choice_RV), k_R)[:, None]
    probs_RV = jax.nn.softmax(jnp.where(kept_RV, choice_RV, -jnp.inf), axis=-1)
    nucleus_RV = order_RV >= _threshold(order_RV, probs_RV, rows.top_p)[:, None]
    kept_RV &= nucleus_RV | (rows.top_p >= 1)[:, None]
    kept_RV &= choice_RV >= choice_RV.max(axis=-1, keepdims=True) + jnp.log(rows.min_p)[:, None]
    choice_RV = jnp.where(kept_RV, choice_RV, -jnp.inf)
    return jax.lax.cond(jnp.any(rows.typical_p < 1), _typical, lambda x, _: x, choice_RV, rows)


def _typical(choice_RV: jax.Array, rows: RowSampling) -> jax.Array:
    """-inf beyond the smallest set, of the tokens with surprise closest to the entropy, that has mass typical_p."""
    logprobs_RV = jax.nn.log_softmax(choice_RV, axis=-1)
    probs_RV = jnp.exp(logprobs_RV)
    entropy_R1 = -jnp.sum(jnp.where(probs_RV > 0, probs_RV * logprobs_RV, 0), axis=-1, keepdims=True)
    order_RV = _ordered_bits(-jnp.abs(logprobs_RV + entropy_R1))
    kept_RV = order_RV >= _threshold(order_RV, probs_RV, rows.typical_p)[:, None]
    return jnp.where(kept_RV | (rows.typical_p >= 1)[:, None], choice_RV, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 they come from do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order_RV: jax.Array, weight_RV: jax.Array, target_R: jax.Array) -> jax.Array:
    """The largest t with sum(weight where order >= t) >= target; found bit by bit, which sorts nothing."""

    def set_bit(i, t_R):
        higher_R = t_R | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        weight_R = jnp.sum(jnp.where(order_RV >= higher_R[:, None], weight_RV, 0), axis=-1)
        return jnp.where(weight_R >= target_R, higher_R, t_R)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(len(order_RV), jnp.uint32))


def _draw(choice_RV: jax.Array, seed_R2: jax.Array, position_R: jax.Array) -> jax.Array:
    """A token of each row from softmax(choice), by Gumbel's trick in two stages: first a block, then a token in it.

    That is the same distribution with 2 sqrt(V) random numbers a row instead of V.
    """
    R, V = choice_RV.shape
    M = math.isqrt(V - 1) + 1
    N = -(-V // M)
    blocks_RNM = jnp.pad(choice_RV, ((0, 0), (0, N * M - V)), constant_values=-jnp.inf).reshape(R, N, M)

    def noise(seed_2, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed_2, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (N + M,))

    noise_RL = jax.vmap(noise)(seed_R2, position_R)
    block_R = jnp.argmax(jax.nn.logsumexp(blocks_RNM, axis=-1) + noise_RL[:, :N], axis=-1)
    inside_RM = jnp.take_along_axis(blocks_RNM, block_R[:, None, None], axis=1)[:, 0]
    return (block_R * M + jnp.argmax(inside_RM + noise_RL[:, N:], axis=-1)).astype(jnp.int32)

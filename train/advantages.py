"""Advantages of sampled tokens, on the device; those of groups of answers are in rl/advantages.py."""

# B rows, T tokens

from __future__ import annotations

import jax
import jax.numpy as jnp


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float = 1.0, lam: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation over the policy's tokens. Schulman et al. 2015, arXiv:1506.02438.

    delta_t = r_t + gamma V_next - V_t, A_t = delta_t + gamma lam A_next; "next" is the next token of the policy in the
    row (tokens of a user or a tool between two turns are skipped), and 0 after the last.

    Args:
      rewards, values: [B, T] float32; values of the states in which the tokens are chosen.
      mask: [B, T], 1 where the policy chose the token.

    Returns:
      (advantages, returns = advantages + values), [B, T] float32, 0 outside the mask.
    """

    def step(carry, now):
        next_value, next_advantage = carry
        reward, value, chosen = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(chosen, value, next_value), jnp.where(chosen, advantage, next_advantage)
        return carry, jnp.where(chosen, advantage, 0.0)

    chosen = mask > 0
    zeros = jnp.zeros(rewards.shape[0], jnp.float32)
    _, advantages = jax.lax.scan(step, (zeros, zeros), (rewards.T, values.T, chosen.T), reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(chosen, advantages + values, 0.0)


def whiten(x: jax.Array, mask: jax.Array, eps: float = 1e-8) -> jax.Array:
    """(x - mean) / standard deviation over the mask; 0 outside."""
    count = jnp.maximum(jnp.sum(mask), 1)
    centred = x - jnp.sum(x * mask) / count
    # the mean's rounding, which division by a tiny deviation would magnify
    centred -= jnp.sum(centred * mask) / count
    variance = jnp.sum(centred**2 * mask) / count
    return jnp.where(mask > 0, centred * jax.lax.rsqrt(variance + eps), 0.0)

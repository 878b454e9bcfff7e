"""Clipping by the norm of the whole gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from model.kernels import cpu


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """As `optax.clip_by_global_norm`, with this module's `global_norm`."""

    def update(updates, state, params=None):
        norm = global_norm(updates)
        # one factor, so that memory holds no divided copy of the gradients
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def global_norm(tree: Any) -> jax.Array:
    """The square root of the sum of all squares, float32."""
    squares = (cpu.sum_of_squares(x.astype(jnp.float32)) for x in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))

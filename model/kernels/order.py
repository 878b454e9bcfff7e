"""Orders computations to save memory, also with XLA for CPUs, which drops optimization barriers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.derivatives import differentiable, tangent_of


def recompute(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function`, (x, *constants) to [*rows, any width], with only its arguments saved for the backward pass.

    For values that are cheap to compute and large to save, such as an activation, also before a product with a
    constant, which would save its factor.

    Args:
      function: takes a tree x of floating arrays [*rows, any width], which the backward pass reads only after the
        gradient is known, and constants.
    """

    def backward(given, d):
        def gradients(column: int = 0):
            x, *constants = given
            x = jax.tree.map(functools.partial(order_after, d[..., column:]), x)
            return jax.vjp(function, x, *constants)[1](d)

        if not backend.for_cpu():
            return gradients()
        # each by itself: XLA would store what they share, which is slower than to compute it again
        leaves, tree = jax.tree.flatten(given)
        columns = [min(i, d.shape[-1] - 1) for i in range(len(leaves))]
        return tree.unflatten([jax.tree.leaves(gradients(column))[i] for i, column in enumerate(columns)])

    return differentiable(lambda *given: (function(*given), given), tangent_of(function), backward)


def order_after(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, which nothing reads before `gradient` is known; both are floating.

    Otherwise a compiler would save the values of the forward pass for the backward pass, or compute them long before
    their use. On CPUs, a row of `x` is NaN if the row of `gradient` starts with NaN.

    Args:
      gradient: [*rows, any width] with rows that broadcast to those of `x`, or one number.
    """
    if backend.for_cpu():
        return jnp.where(jnp.isnan(gradient[..., :1] if gradient.ndim else gradient), jnp.nan, x)
    return jax.lax.optimization_barrier((gradient, x))[1]

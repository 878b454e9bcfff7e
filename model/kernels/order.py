"""When values are computed, where that saves memory; in a way that XLA for CPUs, which drops barriers, heeds too."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.derivatives import differentiable, tangent_of


def recompute(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function`, (x, *constants) to [*rows, any width]; its backward pass keeps only the arguments.

    For values that are cheap to compute and large to keep, as an activation, also where a product with a constant
    follows, which would keep its factor.

    Args:
      function: of a tree x of floating arrays [*rows, any width], which the backward pass does not read before the
        gradient is known, and of others.
    """

    def backward(given, d):
        def gradients(column: int = 0):
            x, *constants = given
            x = jax.tree.map(functools.partial(order_after, d[..., column:]), x)
            return jax.vjp(function, x, *constants)[1](d)

        if not backend.for_cpu():
            return gradients()
        # each by itself: XLA would make one pass more to keep what they share, which is sooner computed than read
        leaves, tree = jax.tree.flatten(given)
        columns = [min(i, d.shape[-1] - 1) for i in range(len(leaves))]
        return tree.unflatten([jax.tree.leaves(gradients(column))[i] for i, column in enumerate(columns)])

    return differentiable(lambda *given: (function(*given), given), tangent_of(function), backward)


def order_after(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, from which nothing is computed before `gradient` is known; both floating.

    Otherwise a compiler would see that the backward pass computes the same as the forward pass and keep that, or
    compute it far ahead of its use. On CPU rows of `x` are NaN where those of `gradient` begin with NaN.

    Args:
      gradient: [*rows, any width], whose rows broadcast to those of `x`; or one number.
    """
    if backend.for_cpu():
        return jnp.where(jnp.isnan(gradient[..., :1] if gradient.ndim else gradient), jnp.nan, x)
    return jax.lax.optimization_barrier((gradient, x))[1]

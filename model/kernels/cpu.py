"""Hints for XLA's compiler for CPUs: which values to store in memory, and how to sum in whole vectors.

On other platforms each function is the plain operation of its name.
"""

# N, W axes of a sum

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from model.kernels import backend, order
from model.kernels.derivatives import differentiable

_LEFT_TO_XLA = 32  # arrays of this size are left to XLA


def row_max(of: Callable[..., jax.Array], *arrays_W: jax.Array) -> jax.Array:
    """The maximum of the elementwise `of(*arrays)`, [..., W] to [..., 1]. On a CPU it may ignore some NaN."""
    larger = lambda x, y: jnp.where(x > y, x, y)  # one instruction; a maximum with NaN takes three
    return _folded(larger, of, *arrays_W).max(axis=-1, keepdims=True)


def row_sum(x_W: jax.Array) -> jax.Array:
    """The sum, [..., W] to [..., 1]."""
    return _folded(jnp.add, lambda x: x, x_W).sum(axis=-1, keepdims=True)


def row_dot(x_W: jax.Array, y_W: jax.Array, axes: int = 1) -> jax.Array:
    """The sum of products of two arrays [..., W] over the last `axes` axes, [..., 1]."""
    return _folded(jnp.add, jnp.multiply, x_W, y_W).sum(axis=tuple(range(-axes, 0)), keepdims=True)


def for_rows(x: jax.Array, rows: tuple[int, ...]) -> jax.Array:
    """`x` for each row, [*rows, *x.shape]; the gradient is summed over whole rows."""
    spread = lambda x: jnp.broadcast_to(x, (*rows, *x.shape))
    summed = lambda d: _sum_of_rows(d.reshape(-1, *d.shape[len(rows) :]))
    return differentiable(
        lambda x: (spread(x), ()), lambda _, moved: spread(*moved), lambda _, d: (summed(d),)
    )(x)


def sum_of_squares(x: jax.Array) -> jax.Array:
    """The sum of squares of all numbers."""
    return _sum_of_squares(x, in_parts=backend.for_one_cpu() and x.ndim > 1)


# traced once for each shape
@functools.partial(jax.jit, static_argnames="in_parts")
def _sum_of_squares(x: jax.Array, in_parts: bool) -> jax.Array:
    if not in_parts:
        return jnp.sum(x * x)
    x_NW = x.reshape(-1, x.shape[-1])
    parts = jnp.split(x_NW, 16) if len(x_NW) % 16 == 0 else [x_NW]
    return _sum_of_rows(functools.reduce(jnp.add, (part * part for part in parts))).sum()


def _folded(combine: Callable, of: Callable, *arrays_W: jax.Array) -> jax.Array:
    """On a CPU the sum is a few vectors wide, and the values of `of` are not stored."""
    x_W = functools.reduce(combine, (of(*parts) for parts in zip(*map(_parts, arrays_W), strict=True)))
    while len(parts := _parts(x_W)) > 1:
        x_W = functools.reduce(combine, parts)
    return x_W


def _parts(x_W: jax.Array) -> list[jax.Array]:
    width = x_W.shape[-1]
    count = min(16, width // _LEFT_TO_XLA)
    return (
        jnp.split(x_W, count, axis=-1)
        if backend.for_one_cpu() and count > 1 and width % count == 0
        else [x_W]
    )


def _sum_of_rows(x_N: jax.Array) -> jax.Array:
    """The sum of rows, [N, ...] to [...]; on a CPU in sixteen parts."""
    while backend.for_one_cpu() and len(x_N) > _LEFT_TO_XLA and len(x_N) % 16 == 0:
        x_N = functools.reduce(jnp.add, jnp.split(x_N, 16))
    return x_N.sum(0)


def zeros_after(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros for an array that a loop fills from x [..., n]; NaN if x starts with one.

    Without x, XLA for CPUs would allocate all such arrays at the start of a program.
    """
    if not backend.for_cpu():
        return jnp.zeros(shape, dtype)
    return jnp.broadcast_to(order.order_after(x[(0,) * x.ndim], jnp.zeros((), dtype)), shape)


def materialize(function: Callable) -> Callable:
    """`function` with its result stored once; XLA for CPUs would compute and store it for each layout that is read."""
    if not backend.for_cpu():
        return function

    def inside(*args):
        with set_xla_metadata(inlineable=None):
            return function(*args)

    return set_xla_metadata(inlineable="false")(jax.jit(inside))


def compute_first(function: Callable, *args: Any) -> tuple[Any, tuple]:
    """(function(*args), args). On a CPU, uses of the returned args come after the function's result.

    Then a state can be updated in place, because all readers of the old one have finished. XLA for CPUs would otherwise
    copy the old state; other compilers find the order by themselves.
    """
    return materialize(lambda *args: (function(*args), args))(*args)

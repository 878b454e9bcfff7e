"""Functions with hand-written derivatives in both modes: forward (`jax.jvp`) and reverse (`jax.vjp`).

A function with `jax.custom_vjp` has a hand-written backward pass, for speed and memory, but no derivative in forward
mode. `differentiable` gives both: a `jax.custom_jvp` with a linear primitive as its tangent, and a given function as
the transpose of this primitive in reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def differentiable(
    forward: Callable, tangent: Callable, backward: Callable, function: Callable | None = None
) -> Callable:
    """The function args -> forward(*args)[0].

    Args:
      forward: args to (outputs, saved); the derivatives read only `saved`.
      tangent: (saved, tangents of args) to tangents of the outputs, linear in the tangents. A tangent is None if its
        argument is not floating, and zeros if it does not vary.
      backward: (saved, cotangents of the outputs) to cotangents of args, the transpose of `tangent`. None: an argument
        without a cotangent.
      function: args to outputs. It is needed if `forward` calls the differentiable function itself, which it must if
        JAX cannot differentiate the computation: higher derivatives go through `forward`.
    """

    @jax.custom_jvp
    def run(*args):
        return forward(*args)[0] if function is None else function(*args)

    def both(primals, tangents):
        outputs, saved = forward(*primals)
        return outputs, _moved(tangent, backward, saved, tangents, outputs)

    run.defjvp(both, symbolic_zeros=True)
    return run


def tangent_of(function: Callable) -> Callable:
    """The `tangent` by `jax.jvp`, for a `forward` that saves its arguments."""

    def tangent(args: tuple, tangents: tuple):
        leaves, tree = jax.tree.flatten(args)
        given = _leaves_like(args, tangents)
        floating = [i for i, x in enumerate(leaves) if _is_floating(x)]

        def of_floats(*values):
            whole = dict(zip(floating, values, strict=True))
            return function(*tree.unflatten(whole.get(i, x) for i, x in enumerate(leaves)))

        _, out = jax.jvp(of_floats, [leaves[i] for i in floating], [given[i] for i in floating])
        return jax.tree.map(lambda x: None if x.dtype == jax.dtypes.float0 else x, out)

    return tangent


def _moved(tangent: Callable, backward: Callable, saved: Any, tangents: tuple, outputs: Any) -> Any:
    """tangent(saved, tangents), as one primitive of the nonzero tangents."""
    given, args_tree = jax.tree.flatten(tangents)
    saved_leaves, saved_tree = jax.tree.flatten(saved)
    out_leaves, out_tree = jax.tree.flatten(outputs)
    varying = [i for i, t in enumerate(given) if not isinstance(t, SymbolicZero)]
    floating = [i for i, y in enumerate(out_leaves) if _is_floating(y)]
    num_saved, like = len(saved_leaves), [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in given]
    out_like = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in out_leaves]

    def run(*leaves):
        here = dict(zip(varying, leaves[num_saved:], strict=True))
        whole = args_tree.unflatten(here.get(i, _zeros(x)) for i, x in enumerate(like))
        out = tangent(saved_tree.unflatten(leaves[:num_saved]), whole)
        found = _leaves_like((outputs_like,), (out,))
        return [found[i].astype(out_like[i].dtype) for i in floating]

    def transpose(*leaves):
        here = dict(zip(floating, leaves[num_saved:], strict=True))
        cotangents = out_tree.unflatten(here.get(i) for i in range(len(out_like)))
        found = _leaves_like(args_like, backward(saved_tree.unflatten(leaves[:num_saved]), cotangents))
        return [_zeros(like[i]) if found[i] is None else found[i] for i in varying]

    args_like, outputs_like = args_tree.unflatten(like), out_tree.unflatten(out_like)
    moved = _linear.bind(
        *saved_leaves,
        *(given[i] for i in varying),
        run=run,
        transpose=transpose,
        num_saved=num_saved,
        avals=tuple(jax.typeof(out_leaves[i]) for i in floating),
    )
    here = dict(zip(floating, moved, strict=True))
    return out_tree.unflatten(
        here.get(i, np.zeros(y.shape, jax.dtypes.float0)) for i, y in enumerate(out_like)
    )


def _leaves_like(args: tuple, others: tuple) -> list:
    """A leaf of `others`, or None, for each leaf of `args`; None in `others` is for a whole argument."""
    found = []
    for arg, other in zip(args, others, strict=True):
        tree = jax.tree.structure(arg)
        found += [None] * tree.num_leaves if other is None else tree.flatten_up_to(other)
    return found


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array | None:
    return jnp.zeros(like.shape, like.dtype) if _is_floating(like) else None


# run(*saved, *tangents) is linear in the tangents, with the transpose transpose(*saved, *cotangents). Reverse mode
# never traces `run`, so its output avals are given.
_linear = Primitive("linear_by_hand")
_linear.multiple_results = True


@_linear.def_impl
def _run(*leaves, run: Callable, transpose: Callable, num_saved: int, avals: tuple):
    return run(*leaves)


@_linear.def_abstract_eval
def _shapes(*leaves, run: Callable, transpose: Callable, num_saved: int, avals: tuple):
    return avals


def _jvp(leaves, tangents, *, run: Callable, transpose: Callable, num_saved: int, avals: tuple):
    """The primitive's derivative: itself in its tangents, and `jax.jvp` of `run` in the saved values."""
    params = {"run": run, "transpose": transpose, "num_saved": num_saved, "avals": avals}
    out, moved = _linear.bind(*leaves, **params), None
    if any(type(t) is not ad.Zero for t in tangents[num_saved:]):
        along = (ad.instantiate_zeros(t) for t in tangents[num_saved:])
        moved = _linear.bind(*leaves[:num_saved], *along, **params)
    varying = [i for i, t in enumerate(tangents[:num_saved]) if type(t) is not ad.Zero]
    if varying:

        def of_saved(*values):
            whole = dict(zip(varying, values, strict=True))
            return run(*(whole.get(i, x) for i, x in enumerate(leaves)))

        _, more = jax.jvp(of_saved, [leaves[i] for i in varying], [tangents[i] for i in varying])
        moved = more if moved is None else [x + y for x, y in zip(moved, more, strict=True)]
    return out, moved


def _transpose(cotangents, *leaves, run: Callable, transpose: Callable, num_saved: int, avals: tuple):
    given = [ad.instantiate_zeros(c) for c in cotangents]
    found = transpose(*leaves[:num_saved], *given)
    return [None] * num_saved + [
        c if ad.is_undefined_primal(x) else None for c, x in zip(found, leaves[num_saved:], strict=True)
    ]


def _batched(leaves, axes, *, run: Callable, transpose: Callable, num_saved: int, avals: tuple):
    size = next(x.shape[axis] for x, axis in zip(leaves, axes) if axis is not None)
    saved_axes = axes[:num_saved]
    along = [batching.bdim_at_front(x, axis, size) for x, axis in zip(leaves[num_saved:], axes[num_saved:])]
    out = _linear.bind(
        *leaves[:num_saved],
        *along,
        run=lambda *xs: jax.vmap(run, (*saved_axes, *[0] * (len(xs) - num_saved)))(*xs),
        transpose=lambda *xs: jax.vmap(transpose, (*saved_axes, *[0] * (len(xs) - num_saved)))(*xs),
        num_saved=num_saved,
        avals=tuple(aval.update(shape=(size, *aval.shape)) for aval in avals),
    )
    return out, [0] * len(out)


ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batched
mlir.register_lowering(_linear, mlir.lower_fun(_run, multiple_results=True))

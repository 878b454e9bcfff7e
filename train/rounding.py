"""Parameters kept in fewer bits than their updates: stochastic rounding, and float32 masters in the optimizer state."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from model.function import Params

Rounding = Literal["nearest", "stochastic"]


def apply_updates(params: Params, updates: Any, rounding: Rounding, rng: jax.Array) -> Params:
    """params + updates, summed in float32 and rounded to the parameters' dtype."""
    leaves, tree = jax.tree.flatten(params)
    rounded = []
    for i, (p, u) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True)):
        total = p.astype(jnp.float32) + u.astype(jnp.float32)
        stochastic = rounding == "stochastic"
        key = jax.random.fold_in(rng, i)
        rounded.append(stochastic_round(total, p.dtype, key) if stochastic else total.astype(p.dtype))
    return jax.tree.unflatten(tree, rounded)


def stochastic_round(x: jax.Array, dtype: Any, rng: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down with probabilities that make the expectation x.

    A float32 keeps its sign, its exponent and the upper 7 bits of its fraction; random 16 bits are added to the lower
    half first, and a carry rounds up. Other dtypes are rounded to nearest. Infinities and NaN stay what they are.
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(rng, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    found = jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), found, x.astype(jnp.bfloat16))


class MastersState(NamedTuple):
    masters: Params  # float32
    inner: optax.OptState


def with_masters(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer on float32 copies of the parameters; the parameters are the copies, rounded."""
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Any:
        masters = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        return MastersState(masters, inner.init(masters))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        updates, new = inner.update(grads, state.inner, state.masters, **extra)
        masters = jax.tree.map(lambda m, u: m + u.astype(jnp.float32), state.masters, updates)
        # what brings a parameter to its master: rounding the sum again gives the rounded master
        moves = jax.tree.map(lambda m, p: m - p.astype(jnp.float32), masters, params)
        return moves, MastersState(masters, new)

    return optax.GradientTransformationExtraArgs(init, update)

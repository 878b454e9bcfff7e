"""`WeightedSum`: losses and metrics are a sum and its weight until the trainer or the log divides."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class WeightedSum:
    """`total / weight` is the mean; sums from packed rows, microbatches and devices add up before the division."""

    total: jax.Array  # sum of value * weight, float32 scalar
    weight: jax.Array  # sum of weight, float32 scalar

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> WeightedSum:
        """Weighted sum of `values` with `weights` of the same (or broadcastable) shape, in float32."""
        values, weights = jnp.broadcast_arrays(values.astype(jnp.float32), jnp.asarray(weights, jnp.float32))
        # what has no weight may be anything, infinite too
        return cls(jnp.sum(jnp.where(weights == 0, 0.0, values) * weights), jnp.sum(weights))

    @classmethod
    def one(cls, value: jax.Array) -> WeightedSum:
        """A value with weight 1 for each batch."""
        return cls(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))

    def mean(self) -> jax.Array:
        return self.total / jnp.maximum(self.weight, 1e-9)

    def __add__(self, other: WeightedSum) -> WeightedSum:
        return WeightedSum(self.total + other.total, self.weight + other.weight)

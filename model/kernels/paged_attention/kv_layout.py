"""The arrays of pages that hold a layer's keys and values."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class KVLayout:
    """The names of the arrays that are concatenated to a key, and the name of the values."""

    heads: int  # key/value heads
    keys: tuple[str, ...] = ("k",)
    values: str = "v"  # may be one of the keys

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.keys, self.values)))

    def key_of(self, parts: dict[str, jax.Array]) -> jax.Array:
        """The concatenated key."""
        first, *more = (parts[name] for name in self.keys)
        return jnp.concatenate([first, *more], -1) if more else first

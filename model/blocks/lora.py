"""Low-rank adapters of linear maps: LoRA, rank-stabilized LoRA, DoRA.

Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732; Liu et al. 2024, arXiv:2402.09353.
"""

# N adapters, R rank

from __future__ import annotations

import dataclasses
import fnmatch
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LoRA:
    """`slots` adapters for each linear map of the blocks that matches `targets`; each row chooses one, or none.

    A target is a map's name ("q") or its path within the block ("mixer/q"), with the wildcards `*` and `?`. Routers,
    the gates of RG-LRU, embeddings and heads have no adapters.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("*",)
    slots: int = 1
    rank_stabilized: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    decomposed: bool = False  # DoRA: adapts each output's direction and learns its length

    def __post_init__(self):
        if self.rank < 1 or self.slots < 1 or not self.targets:
            raise ValueError(
                f"LoRA needs at least a rank, a slot and a target; given rank={self.rank}, slots={self.slots}, "
                f"targets={self.targets}."
            )

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def adapts(self, path: tuple[str, ...]) -> bool:
        """Whether a linear map has adapters, by its path within the block: ("mixer", "q")."""
        names = path[-1], "/".join(path)
        return any(fnmatch.fnmatchcase(name, target) for target in self.targets for name in names)


class LowRank(NamedTuple):
    """The adapter of one linear map for each row, with a leading batch axis, or one for all rows, without."""

    a: jax.Array  # [(B,) *inputs, R]
    b: jax.Array  # [(B,) R, *outputs], scaled
    gain: jax.Array | None  # [(B,) *outputs], DoRA's factor of the output of map and adapter


def select(
    a_NIR: jax.Array, b_NRO: jax.Array, gain_NO: jax.Array | None, scale: float, chosen_B: jax.Array | None
) -> LowRank:
    """The adapter of each row; `chosen_B` is int32, below 0: no adapter; None: the first for all rows."""
    b_NRO = b_NRO * jnp.asarray(scale, b_NRO.dtype)
    if chosen_B is None:
        return LowRank(a_NIR[0], b_NRO[0], None if gain_NO is None else gain_NO[0])
    with_none = lambda x, none: jnp.concatenate([x, jnp.full((1, *x.shape[1:]), none, x.dtype)])
    slot_B = jnp.where(chosen_B < 0, a_NIR.shape[0], chosen_B)
    pick = lambda x, none: jnp.take(with_none(x, none), slot_B, axis=0, mode="clip")
    return LowRank(pick(a_NIR, 0), pick(b_NRO, 0), None if gain_NO is None else pick(gain_NO, 1))


def gains(
    magnitude_NO: jax.Array, weight_IO: jax.Array, a_NIR: jax.Array, b_NRO: jax.Array, scale: float
) -> jax.Array:
    """DoRA's gains [N, outputs] float32: each output's learned length over that of its column in W + scale * a b.

    A column of zeros has gain 1, so that its adapter can train: pruned outputs and maps that start at zero have such
    columns. The column lengths have no gradient (section 4.3 of the paper). |w + s a b|^2 is expanded, so that the sum
    of the matrices needs no memory.
    """
    N, R, ins = a_NIR.shape[0], a_NIR.shape[-1], a_NIR.ndim - 2
    fixed = lambda x, *shape: jax.lax.stop_gradient(x.astype(jnp.float32)).reshape(*shape)
    outs = weight_IO.shape[ins:]
    a = fixed(a_NIR, N, -1, R)
    w, b = fixed(weight_IO, a.shape[1], -1), scale * fixed(b_NRO, N, R, -1)
    square_NO = (
        jnp.sum(w * w, axis=0)
        + 2 * jnp.einsum("NRO,NIR,IO->NO", b, a, w, optimize="optimal")
        + jnp.einsum("NRO,NIR,NIQ,NQO->NO", b, a, a, b, optimize="optimal")
    )
    square_NO = square_NO.reshape(N, *outs)
    inverse_NO = jax.lax.rsqrt(jnp.where(square_NO > 0, square_NO, 1.0))
    return jnp.where(square_NO > 0, magnitude_NO.astype(jnp.float32) * inverse_NO, 1.0)

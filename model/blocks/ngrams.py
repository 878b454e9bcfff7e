"""Hashed n-grams: adds to each byte's vector one vector for each n-gram that ends at the byte.

Pagnoni et al. 2024, arXiv:2412.09871, section 3.2.1. The hash is a polynomial of the token ids in 64-bit two's
complement arithmetic, with the primes of the released models.
"""

# B batch, T bytes, D width of a byte, V rows of the table, N kinds of hash, S steps back, L limbs

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from model.blocks.common import Context, param

PRIMES = (
    *(1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899),
    *(9576890767, 3628273133, 2860486313, 5463458053, 3367900313),
)
LIMB = 8  # bits; a 64-bit number is eight limbs, each in a 32-bit integer
MOST_BUCKETS = 2**23


@dataclasses.dataclass(frozen=True)
class NGrams:
    """A table of `buckets` vectors for each hash function and each size."""

    sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    buckets: int = 500_002
    functions: int = 1

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1 or self.functions < 1:
            raise ValueError(f"n-grams need sizes of at least 1 and a function; given {self}.")
        if not 1 <= self.buckets <= MOST_BUCKETS:
            raise ValueError(f"buckets={self.buckets} is not from 1 to {MOST_BUCKETS}.")

    def module(self, ctx: Context, name: str) -> nn.Module:
        """A module that maps [token ids [B, T] `s` bytes back for s in 0 to `span`], 0 for none, to [B, T, D]."""
        return NGramsModule(self, ctx, name=name)

    @property
    def span(self) -> int:
        """The number of earlier bytes in a byte's n-grams."""
        return max(self.sizes) - 1


class NGramsModule(nn.Module):
    spec: NGrams
    ctx: Context

    @nn.compact
    def __call__(self, back_BT: list[jax.Array]) -> jax.Array:
        spec, ctx = self.spec, self.ctx
        kinds = [(PRIMES[i % len(PRIMES)], size) for i in range(spec.functions) for size in spec.sizes]
        shape, init = (len(kinds) * spec.buckets, ctx.width), nn.initializers.normal(ctx.width**-0.5)
        role = "vectors of the n-grams that end at a byte, by their hash"
        table_VD = param(self, ctx, "table", shape, ("vocab", "embed"), init, 0, role)
        buckets_BTN = polynomial_hashes(jnp.stack(back_BT, axis=-1), kinds, spec.buckets)
        sum_BTD = jnp.zeros((*back_BT[0].shape, ctx.width), ctx.dtype)
        for i in range(len(kinds)):
            sum_BTD += jnp.take(table_VD, buckets_BTN[..., i] + i * spec.buckets, axis=0)
        return sum_BTD


def polynomial_hashes(back_BTS: jax.Array, kinds: list[tuple[int, int]], buckets: int) -> jax.Array:
    """[B, T, N]: for N pairs (prime, size), the sum of token_s * prime^(size - 1 - s) over s < size, modulo `buckets`.

    The sum is a signed 64-bit integer. It is computed limb by limb in 32-bit integers, exactly for token ids with a sum
    below 2^23.
    """
    count, mask = 64 // LIMB, (1 << LIMB) - 1
    sum_BTNL = jnp.zeros((*back_BTS.shape[:2], len(kinds), count), jnp.int32)
    for steps in range(back_BTS.shape[-1]):
        powers = [pow(prime, size - 1 - steps, 2**64) if steps < size else 0 for prime, size in kinds]
        limbs_NL = np.array(
            [[power >> (LIMB * i) & mask for i in range(count)] for power in powers], np.int32
        )
        sum_BTNL += back_BTS[:, :, steps, None, None] * limbs_NL
    limbs, carry_BTN = [], jnp.zeros(sum_BTNL.shape[:-1], jnp.int32)
    for i in range(count):
        carry_BTN += sum_BTNL[..., i]
        limbs.append(carry_BTN & mask)
        carry_BTN >>= LIMB
    rest_BTN = jnp.zeros_like(carry_BTN)
    for limb_BTN in reversed(limbs):
        rest_BTN = ((rest_BTN << LIMB) + limb_BTN) % buckets
    is_negative = limbs[-1] > mask // 2
    return (rest_BTN - jnp.where(is_negative, 2**64 % buckets, 0)) % buckets

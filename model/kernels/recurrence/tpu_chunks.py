"""Chunks of 128 tokens in the TPU kernels of recurrences: which tokens see which, and decays as columns and as rows.

A chunk is as long as a vector has lanes, so square matrices within it fill the matrix unit.
"""

# B batch, T tokens of a block, Q tokens of a chunk (128), R heads of a block, L lanes of a vector (128)

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128
CHUNK = LANES


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """Of one step of a kernel. A state a block is stored for the backward pass, so the longer the block, the fewer."""

    tokens: int = 512  # of a block, a multiple of 128
    width: int = 512  # channels of the values of all heads that a block has

    def __post_init__(self):
        if self.tokens % CHUNK or self.width % LANES or min(self.tokens, self.width) < 1:
            raise ValueError(f"{self}: blocks are multiples of the {LANES} lanes of a vector.")


def cost(multiplied: int, tokens: int, inputs: Sequence[jax.Array], outputs: Sequence) -> pl.CostEstimate:
    """What the compiler plans other work around: so many multiplications, and tokens of all rows and heads, each with
    decays to those of its chunk."""
    moved = sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs) if x is not None)
    return pl.CostEstimate(flops=2 * multiplied, bytes_accessed=moved, transcendentals=tokens * (CHUNK + 3))


def chunk_at(at):
    """The tokens of a block's chunk, counted from 0, as an index."""
    return pl.ds(at * CHUNK if isinstance(at, int) else pl.multiple_of(at * CHUNK, CHUNK), CHUNK)


class ChunkMask(NamedTuple):
    """Of a chunk, from the number of documents that began in it up to each token."""

    pairs_QQ: jax.Array  # bool: the second token is the first or stands before it in its document
    earlier_QQ: jax.Array  # bool: it stands before it
    from_before_Q1: jax.Array  # bool: the token sees the state before the chunk
    to_after_Q1: jax.Array  # bool: the state after the chunk sees the token


def chunk_mask(documents_1Q: jax.Array) -> ChunkMask:
    documents_QL = jnp.broadcast_to(documents_1Q, (LANES, CHUNK)).T
    row_QQ, column_QQ = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
    same_QQ = documents_QL == documents_1Q
    documents_Q1 = documents_QL[:, :1]
    return ChunkMask(
        same_QQ & (row_QQ >= column_QQ),
        same_QQ & (row_QQ > column_QQ),
        documents_Q1 == 0,
        documents_Q1 == documents_1Q[:, -1:],
    )


class Decays(NamedTuple):
    """Of a chunk's heads; every exponent is of decays between two tokens, so none is above 0."""

    totals_RQ: jax.Array  # sums of log decays from the chunk's first token on
    totals_QL: jax.Array  # the same upright, one head a lane
    into_QL: jax.Array  # from the state before the chunk to each token
    out_QL: jax.Array  # from each token to the state after the chunk

    def between(self, head: int, seen_QQ: jax.Array) -> jax.Array:
        """[Q, Q]: from the second token to the first where it is seen, else 0."""
        total_QQ = self.totals_QL[:, head : head + 1] - self.totals_RQ[head : head + 1]
        return jnp.exp(jnp.where(seen_QQ, total_QQ, -jnp.inf))

    def carry(self, head: int) -> jax.Array:
        """[1, 1]: from the state before the chunk to the state after it."""
        return self.into_QL[CHUNK - 1 :, head : head + 1]


def decays(totals_RQ: jax.Array, mask: ChunkMask) -> Decays:
    totals_QL = upright(totals_RQ)
    into_QL = jnp.where(mask.from_before_Q1, jnp.exp(totals_QL), 0)
    out_QL = jnp.where(mask.to_after_Q1, jnp.exp(totals_QL[CHUNK - 1 :] - totals_QL), 0)
    return Decays(totals_RQ, totals_QL, into_QL, out_QL)


def upright(rows_RQ: jax.Array) -> jax.Array:
    """[Q, L]: row r in lane r, zeros in the others."""
    R, Q = rows_RQ.shape
    if R < LANES:
        rows_RQ = jnp.concatenate([rows_RQ, jnp.zeros((LANES - R, Q), rows_RQ.dtype)])
    return rows_RQ.T


def in_lane(lane: int, column_Q1: jax.Array) -> jax.Array:
    """[Q, L]: the column in one lane, zeros in the others."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (column_Q1.shape[0], LANES), 1)
    return jnp.where(lanes == lane, column_Q1, 0)


def at_last(value_11: jax.Array) -> jax.Array:
    """[Q, 1]: the value at the chunk's last token, zeros elsewhere."""
    rows = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, 1), 0)
    return jnp.where(rows == CHUNK - 1, value_11, 0)


def in_row(row: int, num_rows: int, row_1Q: jax.Array) -> jax.Array:
    """[num_rows, Q]: the row in one place, zeros elsewhere."""
    rows = jax.lax.broadcasted_iota(jnp.int32, (num_rows, row_1Q.shape[1]), 0)
    return jnp.where(rows == row, row_1Q, 0)


def row_sum(x: jax.Array) -> jax.Array:
    """Sums of the rows, upright."""
    return jnp.sum(x, axis=1, keepdims=True)


def column_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, keepdims=True)


def all_sum(x: jax.Array) -> jax.Array:
    """[1, 1]"""
    return column_sum(row_sum(x))


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Of two matrices along these axes, their factors in `dtype` and what they add up to in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), dims, preferred_element_type=jnp.float32)


def narrowest(*arrays: jax.Array) -> jnp.dtype:
    """The dtype of products: what is rounded already makes finer factors beside it a waste."""
    return min((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)


def totals(log_decay_BTH: jax.Array) -> jax.Array:
    """[B, H, T] float32: of tokens in whole chunks, the sums of log decays from their chunk's first token on."""
    B, T, H = log_decay_BTH.shape
    chunks_BHNQ = log_decay_BTH.astype(jnp.float32).swapaxes(1, 2).reshape(B, H, -1, CHUNK)
    return jnp.cumsum(chunks_BHNQ, axis=3).reshape(B, H, T)


def documents(first_BT: jax.Array) -> jax.Array:
    """[B, 1, T] int32: of tokens in whole chunks, how many documents began in their chunk up to them."""
    B, T = first_BT.shape
    return jnp.cumsum(first_BT.reshape(B, -1, CHUNK), axis=2, dtype=jnp.int32).reshape(B, 1, T)


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros after the last, up to the size."""
    short = size - x.shape[axis]
    return jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)]) if short else x

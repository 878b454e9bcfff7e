"""Which blocks of keys a block of queries needs, and which of a block's scores count: what the kernels of flash
attention share.
"""

# B batch, I blocks of queries, J blocks of keys, Q queries of a block, N keys of a block, L lanes of a vector (128)

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

LANES = 128
NO_KEY = -1e30  # the log-sum-exp of a query that sees no key: finite, so that differences of two are no NaN
MASKED = -1e30  # the score of a key that is not seen
LEAST = (
    -5e29
)  # what a running maximum starts from: far above MASKED, so that exp(MASKED - maximum) is always 0


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """Queries and keys of one step of a kernel; multiples of 128."""

    queries: int = 512
    keys: int = 512

    def __post_init__(self):
        if self.queries % LANES or self.keys % LANES or min(self.queries, self.keys) < 1:
            raise ValueError(f"{self}: blocks are multiples of the {LANES} lanes of a vector.")


@dataclasses.dataclass(frozen=True)
class FlashCall:
    """The static arguments of one attention."""

    num_queries: int
    num_keys: int  # without padding
    group: int  # query heads of one key/value head
    tiles: TileSizes
    causal: bool
    window: int | None
    span: int | None  # at most `window`; blocks farther away are skipped
    scale: float
    softcap: float | None
    interpret: bool

    @property
    def query_blocks(self) -> int:
        return -(-self.num_queries // self.tiles.queries)

    @property
    def key_blocks(self) -> int:
        return -(-self.num_keys // self.tiles.keys)

    def key_steps(self) -> int:
        """At most so many blocks of keys does any block of queries need."""
        return self._steps(self.tiles.queries, self.tiles.keys, self.key_blocks)

    def query_steps(self) -> int:
        """At most so many blocks of queries need one block of keys."""
        return self._steps(self.tiles.keys, self.tiles.queries, self.query_blocks)

    def pairs(self) -> int:
        """At most so many pairs of a query and a key count, where the queries are a row's last tokens."""
        query = np.arange(self.num_queries) + (self.num_keys - self.num_queries if self.causal else 0)
        span = self.span or self.num_keys + self.num_queries
        last = np.minimum(query if self.causal else query + span - 1, self.num_keys - 1)
        return int(np.maximum(0, last - np.maximum(0, query - span + 1) + 1).sum())

    def cost(self, rows: int, channels: int, streamed: tuple, once: tuple) -> pl.CostEstimate:
        """An estimate, by which the compiler schedules other work.

        Args:
          rows: rows of the batch times query heads.
          channels: multiplied for each pair.
          streamed: (width, dtype, rows of a block of the other side) of each array that is read once for such a block.
          once: arrays that are read or written once.
        """
        pairs = rows * self.pairs()
        moved = sum(pairs // block * width * dtype.itemsize for width, dtype, block in streamed)
        moved += sum(x.size * x.dtype.itemsize for x in once)
        return pl.CostEstimate(flops=2 * pairs * channels, bytes_accessed=moved, transcendentals=pairs)

    def _steps(self, here: int, there: int, all_blocks: int) -> int:
        if self.span is None:
            return all_blocks
        seen = here + (self.span - 1) * (1 if self.causal else 2)  # places in a row
        return min(all_blocks, (seen - 2) // there + 2)


class Bounds(NamedTuple):
    """Of each block of each row, int32, known to a kernel before its blocks are read."""

    offset: jax.Array  # [1]
    first_key_block: jax.Array  # [B * I]; last < first where none is needed
    last_key_block: jax.Array  # [B * I]
    first_query_block: jax.Array  # [B * J]
    last_query_block: jax.Array  # [B * J]
    lowest_query_id: jax.Array  # [B * I]
    highest_query_id: jax.Array  # [B * I]
    lowest_key_id: jax.Array  # [B * J]
    highest_key_id: jax.Array  # [B * J]


def block_bounds(
    call: FlashCall, ids: tuple[jax.Array, jax.Array] | None, offset: jax.Array, B: int
) -> Bounds:
    """`ids` are those of queries [B, 1, I * Q] and of keys [B, 1, J * N]."""
    I, J, Q, N = call.query_blocks, call.key_blocks, call.tiles.queries, call.tiles.keys
    zeros = jnp.zeros((B, 1, I * Q), jnp.int32), jnp.zeros((B, 1, J * N), jnp.int32)
    query_ids_BIQ, key_ids_BJN = (x.reshape(B, n, -1) for x, n in zip(ids or zeros, (I, J), strict=True))
    low_BI, high_BI = query_ids_BIQ.min(-1), query_ids_BIQ.max(-1)
    low_BJ, high_BJ = key_ids_BJN.min(-1), key_ids_BJN.max(-1)
    needed_BIJ = (low_BI[:, :, None] <= high_BJ[:, None]) & (low_BJ[:, None] <= high_BI[:, :, None])
    query_I1, key_J = jnp.arange(I)[:, None] * Q + offset, jnp.arange(J) * N
    if call.causal:
        needed_BIJ &= key_J < query_I1 + Q
    if call.span is not None:
        needed_BIJ &= query_I1 - (key_J + N - 1) < call.span
        if not call.causal:
            needed_BIJ &= key_J - (query_I1 + Q - 1) < call.span
    ranges = *_first_and_last(needed_BIJ), *_first_and_last(needed_BIJ.swapaxes(1, 2))
    return Bounds(offset[None], *(x.reshape(-1) for x in (*ranges, low_BI, high_BI, low_BJ, high_BJ)))


def _first_and_last(needed_BIJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the needed blocks of the last axis; 0 and -1 where there is none."""
    J = needed_BIJ.shape[-1]
    first_BI = jnp.argmax(needed_BIJ, axis=-1).astype(jnp.int32)
    last_BI = J - 1 - jnp.argmax(needed_BIJ[..., ::-1], axis=-1).astype(jnp.int32)
    return first_BI, jnp.where(needed_BIJ.any(-1), last_BI, -1)


def key_block(call: FlashCall, bounds: Bounds, b, i, step):
    """(the block of keys that is read at this step, whether it is needed); one that is not needed is read only once."""
    return _block(bounds.first_key_block, bounds.last_key_block, b * call.query_blocks + i, step)


def query_block(call: FlashCall, bounds: Bounds, b, j, step):
    return _block(bounds.first_query_block, bounds.last_query_block, b * call.key_blocks + j, step)


def _block(first, last, at, step):
    wanted = first[at] + step
    return jnp.maximum(jnp.minimum(wanted, last[at]), 0), wanted <= last[at]


def all_seen(call: FlashCall, bounds: Bounds, b, i, j):
    """Whether each query of block i sees each key of block j, which then need no mask."""
    at_i, at_j = b * call.query_blocks + i, b * call.key_blocks + j
    query, key = i * call.tiles.queries + bounds.offset[0], j * call.tiles.keys
    last_query, last_key = query + call.tiles.queries - 1, key + call.tiles.keys - 1
    low, high = bounds.lowest_query_id[at_i], bounds.highest_query_id[at_i]
    seen = (low == high) & (bounds.lowest_key_id[at_j] == low) & (bounds.highest_key_id[at_j] == low)
    seen &= last_key < call.num_keys
    if call.causal:
        seen &= last_key <= query
    if call.window is not None:
        seen &= last_query - key < call.window
        if not call.causal:
            seen &= last_key - query < call.window
    return seen


def allows(call: FlashCall, bounds: Bounds, i, j, shape: tuple[int, int], query_axis: int) -> jax.Array:
    """bool, which of the scores of queries and keys count by place; ids are compared by the kernel."""
    query = jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    ahead = i * call.tiles.queries + bounds.offset[0] - j * call.tiles.keys
    seen = key < call.num_keys - j * call.tiles.keys
    if call.causal:
        seen &= key - query <= ahead
    if call.window is not None:
        seen &= key - query > ahead - call.window
        if not call.causal:
            seen &= key - query < ahead + call.window
    return seen


def column(row_1N: jax.Array) -> jax.Array:
    """[N, L]: the row upright, the same in all lanes."""
    return jnp.broadcast_to(row_1N, (LANES, row_1N.shape[1])).T


def across(column_NL: jax.Array, width: int) -> jax.Array:
    """[N, width], of one that is the same in all lanes."""
    return jnp.tile(column_NL, (1, -(-width // LANES)))[:, :width]


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Of two matrices along these axes, in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def capped(call: FlashCall, products: jax.Array) -> jax.Array:
    """Scores from products of queries and keys."""
    scores = products * call.scale
    return scores if call.softcap is None else call.softcap * jnp.tanh(scores / call.softcap)


def through_cap(call: FlashCall, scores: jax.Array, dscores: jax.Array) -> jax.Array:
    """Gradient of the products' scaled values from that of the capped ones."""
    return dscores if call.softcap is None else dscores * (1 - jnp.square(scores / call.softcap))

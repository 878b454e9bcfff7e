"""What the kernels of flash attention for GPUs share: sizes of tiles, which tiles each block needs, and scores.

A kernel goes through tiles by two loops. One reads the tiles whose scores all count, without a mask; the other reads
those at the edges (the diagonal, a window's ends, the border of two documents, padding). A tile outside of both is
never read.
"""

# B batch, T queries, S keys, I blocks of queries, J blocks of keys, Q queries of a tile, N keys of a tile

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from model.kernels.attention.tpu_blocks import MASKED

LOG2_E = math.log2(math.e)  # a GPU has an instruction for powers of two: scores in kernels are in base two
LEAST_WIDTH = 16  # of a matrix that a tensor core takes

Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys of one step of a kernel, powers of two, and how a GPU runs it."""

    queries: int
    keys: int
    warps: int  # of 32 threads, which share the 64 thousand registers of a processor, at most 255 each
    stages: int = 2  # tiles in fast memory: one is read while the one before is used


class Tiles(NamedTuple):
    """Those of the three kernels."""

    forward: Tile
    query_gradients: Tile
    key_value_gradients: Tile

    def within(self, T: int, S: int) -> Tiles:
        """Tiles that are no longer than rows of T queries and S keys need."""
        queries, keys = (max(LEAST_WIDTH, _power_of_two(n)) for n in (T, S))
        shorter = lambda tile: dataclasses.replace(
            tile, queries=min(tile.queries, queries), keys=min(tile.keys, keys)
        )
        return Tiles(*map(shorter, self))


@dataclasses.dataclass(frozen=True)
class FlashCall:
    """The static arguments of one attention."""

    num_keys: int  # without padding
    group: int  # query heads of one key/value head
    tiles: Tiles
    causal: bool
    window: int | None
    span: int | None  # at most `window`; tiles farther away are skipped
    scale: float
    softcap: float | None
    interpret: bool


def tile_ranges(
    call: FlashCall, tile: Tile, ids: tuple[jax.Array, jax.Array] | None, shape: tuple[int, int, int], offset
) -> tuple[jax.Array, jax.Array]:
    """The tiles of keys that each block of queries needs [B, I, 4], and of queries for each block of keys [B, J, 4].

    The four, int32: the first tile that is needed, the first and the end of a run of tiles whose scores all count, and
    the end of those that are needed.

    Args:
      ids: of queries [B, T] and keys [B, S].
      shape: (B, T, S), lengths being multiples of the tile's.
    """
    B, T, S = shape
    I, J = T // tile.queries, S // tile.keys
    query_I1 = jnp.arange(I)[:, None] * tile.queries + offset
    key_J = jnp.arange(J) * tile.keys
    last_query_I1, last_key_J = query_I1 + tile.queries - 1, key_J + tile.keys - 1
    needed_BIJ = jnp.broadcast_to(key_J < call.num_keys, (B, I, J))
    whole_BIJ = jnp.broadcast_to(last_key_J < call.num_keys, (B, I, J))
    if call.causal:
        needed_BIJ &= key_J <= last_query_I1
        whole_BIJ &= last_key_J <= query_I1
    if call.span is not None:
        needed_BIJ &= query_I1 - last_key_J < call.span
        if not call.causal:
            needed_BIJ &= key_J - last_query_I1 < call.span
    if call.window is not None:
        whole_BIJ &= last_query_I1 - key_J < call.window
        if not call.causal:
            whole_BIJ &= last_key_J - query_I1 < call.window
    if ids is not None:
        query_ids_BIQ, key_ids_BJN = ids[0].reshape(B, I, -1), ids[1].reshape(B, J, -1)
        low_BI1, high_BI1 = query_ids_BIQ.min(-1)[..., None], query_ids_BIQ.max(-1)[..., None]
        low_B1J, high_B1J = key_ids_BJN.min(-1)[:, None], key_ids_BJN.max(-1)[:, None]
        needed_BIJ &= (low_BI1 <= high_B1J) & (low_B1J <= high_BI1)
        whole_BIJ &= (low_BI1 == high_BI1) & (low_B1J == low_BI1) & (high_B1J == low_BI1)
    return _ranges(needed_BIJ, whole_BIJ), _ranges(needed_BIJ.swapaxes(1, 2), whole_BIJ.swapaxes(1, 2))


def _ranges(needed_BIJ: jax.Array, whole_BIJ: jax.Array) -> jax.Array:
    """[B, I, 4]; see `tile_ranges`."""
    J = needed_BIJ.shape[-1]
    first_BI = jnp.argmax(needed_BIJ, -1)
    end_BI = jnp.where(needed_BIJ.any(-1), J - jnp.argmax(needed_BIJ[..., ::-1], -1), first_BI)
    some_BI = whole_BIJ.any(-1)
    whole_BI = jnp.where(some_BI, jnp.argmax(whole_BIJ, -1), first_BI)
    after_BIJ = ~whole_BIJ & (jnp.arange(J) > whole_BI[..., None])
    run_end_BI = jnp.where(after_BIJ.any(-1), jnp.argmax(after_BIJ, -1), J)
    run_end_BI = jnp.where(some_BI, run_end_BI, whole_BI)
    return jnp.stack((first_BI, whole_BI, run_end_BI, end_BI), -1).astype(jnp.int32)


def over_tiles(ranges: Any, step: Callable[[Any, bool, Carry], Carry], carry: Carry) -> Carry:
    """`step(tile, whether it needs a mask, carry)` for each tile of one row of `tile_ranges`."""
    first, whole, run_end, end = (ranges[n] for n in range(4))
    carry = jax.lax.fori_loop(whole, run_end, lambda j, carry: step(j, False, carry), carry)
    run = run_end - whole

    def masked(j, carry):
        return step(jnp.where(j < whole, j, j + run), True, carry)

    return jax.lax.fori_loop(first, end - run, masked, carry)


def seen(call: FlashCall, query: jax.Array, key: jax.Array, query_id, key_id) -> jax.Array:
    """bool, which scores of a tile count; places and ids have shapes that broadcast."""
    mask = key < call.num_keys
    if call.causal:
        mask &= key <= query
    if call.window is not None:
        mask &= query - key < call.window
        if not call.causal:
            mask &= key - query < call.window
    return mask if query_id is None else mask & (query_id == key_id)


def scores(call: FlashCall, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(scores in base two, from products of queries and keys; how they change with the products where they are
    capped)."""
    if call.softcap is None:
        return products * (call.scale * LOG2_E), None
    bent = jnp.tanh(products * (call.scale / call.softcap))
    return bent * (call.softcap * LOG2_E), 1 - jnp.square(bent)


def masked_scores(mask: jax.Array, found: jax.Array) -> jax.Array:
    return jnp.where(mask, found, MASKED)


def slices(width: int) -> list[slice]:
    """A width that is a multiple of 16, in powers of two, the only sizes of a tile in Triton: 192 is 128 and 64."""
    parts, start = [], 0
    while start < width:
        size = 1 << (width - start).bit_length() - 1
        parts.append(slice(start, start + size))
        start += size
    return parts


def read(ref: Any, *index: Any) -> list[jax.Array]:
    """The slices of the last axis of what an index names, as `slices` cuts it."""
    return [ref[(*index, part)] for part in slices(ref.shape[-1])]


def write(ref: Any, parts: list[jax.Array]) -> None:
    for part, x in zip(slices(ref.shape[-1]), parts, strict=True):
        ref[:, part] = x.astype(ref.dtype)


def product(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """a @ b.T in float32, whose widths are cut alike."""
    dims = (((1,), (1,)), ((), ()))
    dot = lambda a, b: jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    total = dot(a[0], b[0])
    for x, y in zip(a[1:], b[1:], strict=True):
        total += dot(x, y)
    return total


def add_products(sums: list[jax.Array], a: jax.Array, b: list[jax.Array]) -> list[jax.Array]:
    """sums + a @ b in float32, for each slice of `b`."""
    return [
        total + jnp.dot(a.astype(x.dtype), x, preferred_element_type=jnp.float32)
        for total, x in zip(sums, b, strict=True)
    ]


def _power_of_two(n: int) -> int:
    """The least that is not less."""
    return 1 << (n - 1).bit_length()

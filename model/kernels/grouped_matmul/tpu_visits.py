"""Which tile of rows is multiplied by which group's matrix, and in what order, for the kernels of grouped products.

Rows are cut into tiles in their order, whatever the groups (Gale et al. 2022, arXiv:2211.15841); a tile is
visited once for each group that has rows in it.
"""

# M rows, E groups, V visits, R rows of a tile

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

PART = 128  # rows; of a tile that groups share, each part is multiplied only for the groups that it holds


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """Numbers of bfloat16 in a step of a kernel, multiples of 128; of float32, half as many inputs and outputs."""

    rows: int = 512
    inputs: int = 1024
    outputs: int = 1024
    memory: int | None = None  # bytes of fast memory; None: the default of 16 MiB

    def __post_init__(self):
        if any(n % PART or n < PART for n in (self.rows, self.inputs, self.outputs)):
            raise ValueError(f"{self}: blocks are multiples of {PART}.")

    def fitted(self, rows: int, inputs: int, outputs: int, itemsize: int) -> StepSizes:
        """For arrays of this size."""
        width = lambda block, size: _fitted(block * 2 // max(itemsize, 2), size)
        rows = rows if rows < PART else min(self.rows, rows // PART * PART)
        return StepSizes(rows, width(self.inputs, inputs), width(self.outputs, outputs))


class StepSizes(NamedTuple):
    """What one step of a kernel holds; a side that is no multiple of 128 is the whole of an array."""

    rows: int
    inputs: int
    outputs: int

    @property
    def part(self) -> int:
        return min(PART, self.rows)


class Visits(NamedTuple):
    """int32, known to a kernel before its blocks are read; group E is that of the rows beyond all sizes."""

    tile: jax.Array  # [V]
    group: jax.Array  # [V]
    start: jax.Array  # [E + 1]: the first row of each group
    stop: jax.Array  # [E + 1]: the row after its last
    last_tile: jax.Array  # [1]: the last with a row of a group: no other needs to be read


def visits_of(sizes_E: jax.Array, M: int, R: int, of_all_groups: bool) -> tuple[Visits, jax.Array]:
    """(the visits in the order of rows, how many of the V there are).

    Args:
      of_all_groups: empty groups are visited once, and the rows beyond all sizes are not; else the other way round.
    """
    E, tiles = len(sizes_E), -(-M // R)
    sizes_E = sizes_E.astype(jnp.int32)
    total = jnp.sum(sizes_E)
    sizes_G = jnp.append(sizes_E, 0 if of_all_groups else M - total)
    stop_G = jnp.cumsum(sizes_G)
    start_G = stop_G - sizes_G
    first_tile_G = jnp.minimum(start_G // R, tiles - 1)
    tiles_G = jnp.where(sizes_G > 0, (stop_G - 1) // R - first_tile_G + 1, 0)
    if of_all_groups:
        tiles_G = tiles_G.at[:E].max(1)
    before_G = jnp.cumsum(tiles_G) - tiles_G
    group_V = jnp.repeat(jnp.arange(E + 1), tiles_G, total_repeat_length=tiles + E)
    tile_V = jnp.minimum(first_tile_G[group_V] + jnp.arange(tiles + E) - before_G[group_V], tiles - 1)
    last_tile = jnp.maximum(total - 1, 0) // R
    arrays = (tile_V, group_V, start_G, stop_G, last_tile[None])
    return Visits(*(x.astype(jnp.int32) for x in arrays)), tiles_G.sum().astype(jnp.int32)


def rows_of_visit(visits: Visits, v, R: int):
    """(the group, its first row counted from the tile's first, the row after its last)."""
    group, tile_start = visits.group[v], visits.tile[v] * R
    return group, visits.start[group] - tile_start, visits.stop[group] - tile_start


def parts_of_visit(start, stop, tiles: StepSizes):
    """(the first part of the tile with rows of the group, the part after the last)."""
    up = jnp.minimum(stop, tiles.rows) + tiles.part - 1
    return jax.lax.div(jnp.maximum(start, 0), tiles.part), jax.lax.div(up, tiles.part)


def _fitted(block: int, size: int) -> int:
    """At most `block`; where there is a choice, a divisor of the size, so that no block is cut at the edge."""
    if size <= block:
        return size
    divisors = [n for n in range(block, block // 4, -PART) if size % n == 0]
    return divisors[0] if divisors else block

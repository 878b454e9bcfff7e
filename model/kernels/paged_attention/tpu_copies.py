"""What the kernel of paged attention copies from and to main memory: queries, outputs, old pages, new tokens."""

# T tokens of all rows, H query heads, C channels of a key, E channels of a value, n heads together
# Q tokens of a work item, J matrices of queries, M rows of one, L lanes (128)

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.paged_attention.tpu_plan import PagedCall, Part, Scalars


@dataclasses.dataclass
class Memory:
    """The arguments and scratch memory of the kernel."""

    call: PagedCall
    scalars: Scalars
    own_Mn: Any
    spread_keys: Any
    spread_values: Any
    sinks_JML: Any
    q_THC: Any
    fresh: dict
    pages: dict
    out_THE: Any
    blocks: dict  # [2, ...] of each part
    new_kv: dict  # [2, groups, ...]
    q_QHC: Any  # the work item's queries
    out_QHE: Any  # its outputs
    queries: list  # of each part of a key [J, M, n * C]; of heads that are together, each in its own head's channels
    top_JML: Any
    total_JML: Any
    sum_JME: Any
    buffer_slot: Any  # which of the two buffers the next work item's first block is copied to
    kv_read: Any  # semaphores
    pages_written: Any
    queries_read: Any
    outputs_written: Any


# Queries and outputs


def query_copies(memory: Memory, w, do) -> None:
    """`do(copy)` of each copy of the work item's queries."""

    def piece(token, at, size):
        source, target = memory.q_THC.at[pl.ds(token, size)], memory.q_QHC.at[pl.ds(at, size)]
        do(pltpu.make_async_copy(source, target, memory.queries_read.at[0]))

    _each_piece(memory, w, piece)


def output_copies(memory: Memory, w, do) -> None:
    """`do(copy)` of each copy of its outputs."""

    def piece(token, at, size):
        source, target = memory.out_QHE.at[pl.ds(at, size)], memory.out_THE.at[pl.ds(token, size)]
        do(pltpu.make_async_copy(source, target, memory.outputs_written.at[0]))

    _each_piece(memory, w, piece)


def _each_piece(memory: Memory, w, do) -> None:
    """`do(token among all, place in the work item, size)` for its tokens cut into powers of two, the largest first:
    copies need sizes that are known, and tokens after the work item are neither read nor written."""
    token, count = memory.scalars.work_item_token[w], memory.scalars.work_item_count[w]
    most = min(memory.call.tokens, memory.q_THC.shape[0])
    for size in (1 << n for n in reversed(range(most.bit_length()))):
        at = count - jax.lax.rem(count, jnp.int32(2 * size))
        pl.when((count & size) > 0)(functools.partial(do, token + at, at, size))


# What is read


def work_item_positions(memory: Memory, w):
    """(the row, the first position that some token of the work item sees, its first token's, that after its last)."""
    scalars, mask = memory.scalars, memory.call.mask
    first = scalars.work_item_first[w]
    low = jnp.int32(0)
    if mask.window is not None:
        low = jnp.maximum(low, first - mask.window + 1)
    if mask.chunk is not None:
        low = jnp.maximum(low, first - jax.lax.rem(first, jnp.int32(mask.chunk)))
    return scalars.work_item_row[w], low, first, first + scalars.work_item_count[w]


def work_item_blocks(memory: Memory, w):
    """(the first block of the row that the work item reads, that after the last)."""
    _, low, _, stop = work_item_positions(memory, w)
    return _div(low, memory.call.block), _up(stop, memory.call.block)


def kv_copies(memory: Memory, w, j, buffer_slot, do) -> None:
    """`do(copy)` of each copy that work item w reads of block j: old pages, and groups of new slots."""
    call, scalars = memory.call, memory.scalars
    row, low, _, _ = work_item_positions(memory, w)
    start = scalars.row_start[row]
    begin = jnp.maximum(j * call.block_pages, _div(low, call.page_size))
    end = jnp.minimum((j + 1) * call.block_pages, _up(start, call.page_size))

    def page(p, _):
        number = _page_number(memory, row, p)
        for part in call.parts:
            at = _page_in_block(memory, part, buffer_slot, p - j * call.block_pages)
            do(pltpu.make_async_copy(memory.pages[part.name].at[number], at, memory.kv_read.at[buffer_slot]))

    jax.lax.fori_loop(begin, end, page, None)
    for part in call.parts if memory.fresh else ():
        begin, end = _new_groups(memory, part, w, j)
        base = (scalars.row_page if part.scales else scalars.row_group)[row] - _div(start, part.group)

        def group(g, _, part=part, base=base, begin=begin):
            source = memory.fresh[part.name].at[base + g]
            do(
                pltpu.make_async_copy(
                    source,
                    memory.new_kv[part.name].at[buffer_slot, g - begin],
                    memory.kv_read.at[buffer_slot],
                )
            )

        jax.lax.fori_loop(begin, end, group, None)


def _new_groups(memory: Memory, part: Part, w, j):
    """(the first group of block j that holds new tokens up to the work item's last, that after the last)."""
    per_block, (row, _, _, stop) = memory.call.block // part.group, work_item_positions(memory, w)
    begin = jnp.maximum(j * per_block, _div(memory.scalars.row_start[row], part.group))
    return begin, jnp.minimum((j + 1) * per_block, _up(stop, part.group))


def _page_number(memory: Memory, row, p):
    entry = memory.scalars.table[row * memory.call.pages_a_row + jnp.minimum(p, memory.call.pages_a_row - 1)]
    return jnp.clip(entry, 0, memory.call.num_pages - 1)


def _page_in_block(memory: Memory, part: Part, buffer_slot, p):
    block, Z = memory.blocks[part.name], memory.call.page_size
    return (
        block.at[buffer_slot, p] if part.scales else block.at[buffer_slot, pl.ds(pl.multiple_of(p * Z, Z), Z)]
    )


def _group_in_block(memory: Memory, part: Part, buffer_slot, g):
    block, W = memory.blocks[part.name], part.group
    return (
        block.at[buffer_slot, g] if part.scales else block.at[buffer_slot, pl.ds(pl.multiple_of(g * W, W), W)]
    )


# What is written


def merge_new_kv(memory: Memory, w, j, buffer_slot) -> None:
    """New slots among the old ones of block j; those after the row's last hold any other token."""
    call, start = memory.call, memory.scalars.row_start[work_item_positions(memory, w)[0]]
    for part in call.parts:
        begin, end = _new_groups(memory, part, w, j)
        slot = jax.lax.broadcasted_iota(jnp.int32, part.shape(part.group), 1 if part.scales else 0)

        def group(g, _, part=part, begin=begin, slot=slot):
            at = _group_in_block(memory, part, buffer_slot, g - j * (call.block // part.group))
            is_old = slot < start - g * part.group
            new = memory.new_kv[part.name][buffer_slot, g - begin]
            if part.scales and call.max_new == 1:
                new = _column(new)
            at[...] = choose(is_old, at[...], new)

        jax.lax.fori_loop(begin, end, group, None)


def _column(x_1K):
    """[K, 1]."""
    K = x_1K.shape[1]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (K, K), axis) for axis in (0, 1))
    return jnp.where(row == column, x_1K, 0.0).sum(axis=1, keepdims=True)


def choose(which, yes, no):
    """`where` of numbers of any width, in 32 bits, which each chip can do."""
    if yes.dtype.itemsize == 4:
        return jnp.where(which, yes, no)
    return jnp.where(which, yes.astype(jnp.float32), no.astype(jnp.float32)).astype(yes.dtype)


def page_writes(memory: Memory, w, j, buffer_slot, do) -> None:
    """`do(copy)` of each copy to pages: of the groups of block j whose first new token is the work item's."""
    call = memory.call
    row, _, first, stop = work_item_positions(memory, w)
    for part in call.parts:
        per_block, per_page = call.block // part.group, call.page_size // part.group
        is_first = first == memory.scalars.row_start[row]
        begin = jnp.where(is_first, _div(first, part.group), _up(first, part.group))
        begin = jnp.maximum(begin, j * per_block)
        end = jnp.minimum((j + 1) * per_block, _up(stop, part.group))
        end = jnp.minimum(end, call.pages_a_row * per_page)

        def group(g, _, part=part, per_block=per_block, per_page=per_page):
            p = _div(g, per_page)
            number = _page_number(memory, row, p)
            page = memory.pages[part.name].at[number]
            if not part.scales:
                page = page.at[pl.ds(pl.multiple_of((g - p * per_page) * part.group, part.group), part.group)]
            source = _group_in_block(memory, part, buffer_slot, g - j * per_block)
            do(pltpu.make_async_copy(source, page, memory.pages_written.at[0]))

        jax.lax.fori_loop(begin, end, group, None)


def _div(n, by: int):
    return jax.lax.div(n, jnp.int32(by))


def _up(n, by: int):
    return _div(n + by - 1, by)

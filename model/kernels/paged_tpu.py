"""The kernel of paged attention for TPUs: each item's queries meet the blocks of pages of its row, one after the other.

Kwon et al. 2023, arXiv:2309.06180; weights are added up as in Dao 2023, arXiv:2307.08691. Pages stay in the chip's main
memory. Those of the next block, be it of the next item, are copied while this block is computed; only pages that some
query of the item sees are copied at all. New tokens are put among the old in fast memory, where they are attended to,
and go to their pages from there.
"""

# I items, J matrices of queries an item, M rows of one, n heads together, C channels of a key, E channels of a value
# N pages, Z slots a page, S slots of a block, W slots of a group, U groups, X channels of a slot, L lanes (128)

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.flash_blocks import LANES, LEAST, MASKED, across, product
from model.kernels.paged_plan import Part, Plan, Scalars, head_of_rows, spread
from model.kernels.pages import SCALE


def attend(
    plan: Plan,
    scalars: Scalars,
    q: tuple[jax.Array, ...],
    sinks_JML: jax.Array | None,
    fresh: dict[str, jax.Array],
    pages: dict[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(what each query finds [I, J, M, E], the pages with the new tokens).

    Args:
      q: for each of `plan.keys`, its channels of the queries [I, J, M, C].
      fresh: new tokens of each part of pages, in groups; {}: nothing is written, and the pages are given back.
    """
    (I, J, M, _), n, names = q[0].shape, plan.together, [part.name for part in plan.parts]
    E, dtype = plan.part(plan.values).width // plan.heads, q[0].dtype
    widths = [x.shape[-1] for x in q]
    constants: list[Any] = [None, None, None]
    if n > 1:
        own_Mn = head_of_rows(n, M)
        constants = [
            jnp.asarray(own_Mn),
            tuple(jnp.asarray(spread(n, width), dtype) for width in widths),
            jnp.asarray(spread(n, E), dtype),
        ]
    constants.append(sinks_JML)
    item = lambda core, i, *_: (i * plan.cores + core, 0, 0, 0)
    whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    of_q = tuple(pl.BlockSpec((None, J, M, width), item) for width in widths)
    write = bool(fresh)
    # A compiler with fast memory to spare would move all pages of scales there and back.
    stay = lambda x: x if plan.interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)
    first_page = len(scalars) + len(q) + len(jax.tree.leaves(constants)) + len(fresh)
    found, *written = pl.pallas_call(
        functools.partial(_kernel, plan, write),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.cores, I // plan.cores),
            in_specs=[
                of_q,
                jax.tree.map(whole, constants),
                [anywhere for _ in fresh],
                [anywhere for _ in names],
            ],
            out_specs=[pl.BlockSpec((None, J, M, E), item)] + [anywhere for _ in names if write],
            scratch_shapes=_scratch(plan, J, widths, E, dtype, {name: pages[name].dtype for name in names}),
        ),
        out_shape=[jax.ShapeDtypeStruct((I, J, M, E), dtype)]
        + [jax.ShapeDtypeStruct(pages[name].shape, pages[name].dtype) for name in names if write],
        input_output_aliases={first_page + k: 1 + k for k in range(len(names)) if write},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(plan, scalars, q, fresh, pages),
        interpret=plan.interpret,
        name="paged_attention",
    )(*scalars, q, constants, [fresh[name] for name in names if write], [stay(pages[name]) for name in names])
    return found, pages | dict(zip(names, written))


def _cost(plan: Plan, scalars: Scalars, q: tuple, fresh: dict, pages: dict) -> pl.CostEstimate:
    """If every row filled its pages: what the compiler plans other work around."""
    (I, J, M, _), (R,) = q[0].shape, scalars.row_start.shape
    slots = plan.pages_a_row * plan.page_size
    reach = min(plan.sight.reach() or slots, slots)
    scores = max(I, R) * J * M * reach
    width = sum(x.shape[-1] for x in q) + plan.part(plan.values).width // plan.heads
    of_page = sum(pages[part.name].nbytes for part in plan.parts) // plan.num_pages
    old = R * -(-reach // plan.page_size) * of_page
    moved = old + 2 * sum(x.nbytes for x in fresh.values()) + 2 * sum(x.nbytes for x in q)
    flops = 2 * scores * width * plan.together
    return pl.CostEstimate(flops=flops, transcendentals=scores, bytes_accessed=moved)


def _scratch(plan: Plan, J: int, widths: list[int], E: int, dtype, dtypes: dict) -> list:
    """In the order of `_Memory`'s last fields."""
    n, M, parts = plan.together, plan.rows, plan.parts

    def blocks(part: Part):
        each = (plan.block_pages, part.width, plan.page_size) if part.scales else (plan.block, part.width)
        return pltpu.VMEM((2, *each), dtypes[part.name])

    def news(part: Part):
        return pltpu.VMEM((2, plan.fresh_groups(part), *part.shape(part.group)), dtypes[part.name])

    return [
        [blocks(part) for part in parts],
        [news(part) for part in parts],
        [pltpu.VMEM((J, M, n * width), dtype) for width in widths],
        pltpu.VMEM((J, M, LANES), jnp.float32),
        pltpu.VMEM((J, M, LANES), jnp.float32),
        pltpu.VMEM((J, M, n * E), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((1,)),
    ]


@dataclasses.dataclass
class _Memory:
    """What a kernel is given."""

    plan: Plan
    scalars: Scalars
    q: tuple
    own_Mn: Any
    spread_keys: Any
    spread_values: Any
    sinks_JML: Any
    fresh: dict
    pages: dict
    found: Any
    blocks: dict  # [2, ...] of each part
    news: dict  # [2, groups, ...]
    wide_q: list  # [J, M, n * C] queries of heads that are together, each in its own head's channels
    top_JML: Any
    total_JML: Any
    sum_JME: Any
    turn: Any  # which of the two blocks the next item's first is copied to
    arrived: Any
    sent: Any


def _kernel(plan: Plan, write: bool, *refs):
    scalars, refs = Scalars(*refs[: len(Scalars._fields)]), refs[len(Scalars._fields) :]
    q, constants, fresh, pages, found, *refs = refs
    written, scratch = (refs[: len(pages)], refs[len(pages) :]) if write else (pages, refs)
    named = lambda xs: {part.name: x for part, x in zip(plan.parts, xs)}
    blocks, news, *rest = scratch
    of_parts = named(fresh), named(written), found, named(blocks), named(news)
    given: list[Any] = [plan, scalars, q, *constants, *of_parts, *rest]
    memory = _Memory(*given)
    step = pl.program_id(1)
    w = step * plan.cores + pl.program_id(0)

    @pl.when(w < scalars.num_items[0])
    def run():
        _run_item(memory, w, step)


def _run_item(memory: _Memory, w, step) -> None:
    plan = memory.plan
    first, last = _item_blocks(memory, w)

    @pl.when(step == 0)
    def begin():
        memory.turn[0] = 0
        _each_copy(memory, w, first, 0, lambda copy: copy.start())

    _start(memory)

    def block(j, turn):
        more = j + 1 < last
        following = jnp.where(more, w, jnp.minimum(w + plan.cores, memory.scalars.num_items[0] - 1))
        block_of_it = jnp.where(more, j + 1, _item_blocks(memory, following)[0])

        @pl.when(more | (w + plan.cores < memory.scalars.num_items[0]))
        def fetch_next():
            _each_copy(memory, following, block_of_it, 1 - turn, lambda copy: copy.start())

        _each_copy(memory, w, j, turn, lambda copy: copy.wait())
        if memory.fresh:
            _take_in(memory, w, j, turn)
            _each_write(memory, w, j, turn, lambda copy: copy.start())
        _meet(memory, w, j, turn)
        if memory.fresh:
            _each_write(memory, w, j, turn, lambda copy: copy.wait())
        return 1 - turn

    memory.turn[0] = jax.lax.fori_loop(first, last, block, memory.turn[0])
    _finish(memory)


# What is read


def _span(memory: _Memory, w):
    """(the row, the first position that some token of the item sees, its first token's, that after its last)."""
    scalars, sight = memory.scalars, memory.plan.sight
    first = scalars.item_first[w]
    low = jnp.int32(0)
    if sight.window is not None:
        low = jnp.maximum(low, first - sight.window + 1)
    if sight.chunk is not None:
        low = jnp.maximum(low, first - jax.lax.rem(first, jnp.int32(sight.chunk)))
    return scalars.item_row[w], low, first, first + scalars.item_count[w]


def _item_blocks(memory: _Memory, w):
    """(the first block of the row that the item reads, that after the last)."""
    _, low, _, stop = _span(memory, w)
    return _div(low, memory.plan.block), _up(stop, memory.plan.block)


def _each_copy(memory: _Memory, w, j, turn, do) -> None:
    """The copies of what item w reads of block j: old pages, and groups of new slots."""
    plan, scalars = memory.plan, memory.scalars
    row, low, _, _ = _span(memory, w)
    start = scalars.row_start[row]
    begin = jnp.maximum(j * plan.block_pages, _div(low, plan.page_size))
    end = jnp.minimum((j + 1) * plan.block_pages, _up(start, plan.page_size))

    def page(p, _):
        number = _page_number(memory, row, p)
        for part in plan.parts:
            at = _page_in_block(memory, part, turn, p - j * plan.block_pages)
            do(pltpu.make_async_copy(memory.pages[part.name].at[number], at, memory.arrived.at[turn]))

    jax.lax.fori_loop(begin, end, page, None)
    for part in plan.parts if memory.fresh else ():
        begin, end = _new_groups(memory, part, w, j)
        base = (scalars.row_page if part.scales else scalars.row_group)[row] - _div(start, part.group)

        def group(g, _, part=part, base=base, begin=begin):
            source = memory.fresh[part.name].at[base + g]
            do(
                pltpu.make_async_copy(
                    source, memory.news[part.name].at[turn, g - begin], memory.arrived.at[turn]
                )
            )

        jax.lax.fori_loop(begin, end, group, None)


def _new_groups(memory: _Memory, part: Part, w, j):
    """(the first group of block j that holds new tokens up to the item's last, that after the last)."""
    per_block, (row, _, _, stop) = memory.plan.block // part.group, _span(memory, w)
    begin = jnp.maximum(j * per_block, _div(memory.scalars.row_start[row], part.group))
    return begin, jnp.minimum((j + 1) * per_block, _up(stop, part.group))


def _page_number(memory: _Memory, row, p):
    entry = memory.scalars.table[row * memory.plan.pages_a_row + jnp.minimum(p, memory.plan.pages_a_row - 1)]
    return jnp.clip(entry, 0, memory.plan.num_pages - 1)


def _page_in_block(memory: _Memory, part: Part, turn, p):
    block, Z = memory.blocks[part.name], memory.plan.page_size
    return block.at[turn, p] if part.scales else block.at[turn, pl.ds(pl.multiple_of(p * Z, Z), Z)]


def _group_in_block(memory: _Memory, part: Part, turn, g):
    block, W = memory.blocks[part.name], part.group
    return block.at[turn, g] if part.scales else block.at[turn, pl.ds(pl.multiple_of(g * W, W), W)]


# What is written


def _take_in(memory: _Memory, w, j, turn) -> None:
    """New slots among the old ones of block j."""
    plan, start = memory.plan, memory.scalars.row_start[_span(memory, w)[0]]
    for part in plan.parts:
        begin, end = _new_groups(memory, part, w, j)
        slot = jax.lax.broadcasted_iota(jnp.int32, part.shape(part.group), 1 if part.scales else 0)

        def group(g, _, part=part, begin=begin, slot=slot):
            at = _group_in_block(memory, part, turn, g - j * (plan.block // part.group))
            is_old = slot < start - g * part.group
            at[...] = _choose(is_old, at[...], memory.news[part.name][turn, g - begin])

        jax.lax.fori_loop(begin, end, group, None)


def _choose(which, yes, no):
    """`where` of numbers of any width, in 32 bits, which each chip can do."""
    if yes.dtype.itemsize == 4:
        return jnp.where(which, yes, no)
    return jnp.where(which, yes.astype(jnp.float32), no.astype(jnp.float32)).astype(yes.dtype)


def _each_write(memory: _Memory, w, j, turn, do) -> None:
    """The copies to pages of the groups of block j whose first new token is the item's."""
    plan = memory.plan
    row, _, first, stop = _span(memory, w)
    for part in plan.parts:
        per_block, per_page = plan.block // part.group, plan.page_size // part.group
        is_first = first == memory.scalars.row_start[row]
        begin = jnp.where(is_first, _div(first, part.group), _up(first, part.group))
        begin = jnp.maximum(begin, j * per_block)
        end = jnp.minimum((j + 1) * per_block, _up(stop, part.group))
        end = jnp.minimum(end, plan.pages_a_row * per_page)

        def group(g, _, part=part, per_block=per_block, per_page=per_page):
            p = _div(g, per_page)
            number = _page_number(memory, row, p)
            page = memory.pages[part.name].at[number]
            if not part.scales:
                page = page.at[pl.ds(pl.multiple_of((g - p * per_page) * part.group, part.group), part.group)]
            source = _group_in_block(memory, part, turn, g - j * per_block)
            do(pltpu.make_async_copy(source, page, memory.sent.at[0]))

        jax.lax.fori_loop(begin, end, group, None)


# What is computed


def _start(memory: _Memory) -> None:
    plan, top, total = memory.plan, memory.top_JML, memory.total_JML
    if memory.sinks_JML is None:
        top[...] = jnp.full_like(top, LEAST)
        total[...] = jnp.zeros_like(total)
    else:
        top[...] = memory.sinks_JML[...]
        total[...] = jnp.ones_like(total)
    memory.sum_JME[...] = jnp.zeros_like(memory.sum_JME)
    if plan.together == 1:
        return
    for part, q in enumerate(memory.q):
        width = q.shape[-1]
        for k in range(q.shape[0]):
            wide = _exact(q[k], memory.spread_keys[part][...])
            memory.wide_q[part][k] = (wide * _own(memory, width)).astype(q.dtype)


def _own(memory: _Memory, width: int):
    """[M, n * width] 1 in the channels of the head that a row looks at."""
    own_Mn = memory.own_Mn[...]
    n = own_Mn.shape[1]
    begins = jax.lax.broadcasted_iota(jnp.int32, (n, n * width), 0) * width
    lane = jax.lax.broadcasted_iota(jnp.int32, (n, n * width), 1)
    return _exact(own_Mn, jnp.where((lane >= begins) & (lane < begins + width), 1.0, 0.0))


def _exact(a, b):
    """A product with zeros and ones, which changes no number."""
    dims = (((1,), (0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _meet(memory: _Memory, w, j, turn) -> None:
    """The item's queries meet block j."""
    _, low, first, stop = _span(memory, w)
    sight, begin = memory.plan.sight, j * memory.plan.block
    last = first + memory.plan.tokens - 1  # of the item's places, taken or not
    whole = begin + memory.plan.block <= first + 1
    if sight.window is not None:
        whole &= last - begin < sight.window
    if sight.chunk is not None:
        whole &= begin >= last - jax.lax.rem(last, jnp.int32(sight.chunk))

    @pl.when(whole)
    def all_seen():
        for k in range(memory.found.shape[0]):
            _add(memory, k, turn, _scores(memory, k, turn), None)

    @pl.when(~whole)
    def some_seen():
        seen_MS = _sees(memory, begin, low, first, stop)
        slot = begin + jax.lax.broadcasted_iota(jnp.int32, (memory.plan.block, 1), 0)
        slot_of_lane = begin + jax.lax.broadcasted_iota(jnp.int32, (1, memory.plan.block), 1)
        # what was not copied may be anything, and no number times 0 makes it 0
        copied = ((slot >= low) & (slot < stop), (slot_of_lane >= low) & (slot_of_lane < stop))
        for k in range(memory.found.shape[0]):
            _add(memory, k, turn, jnp.where(seen_MS, _scores(memory, k, turn), MASKED), copied)


def _sees(memory: _Memory, begin, low, first, stop):
    """[M, S] bool."""
    plan, shape = memory.plan, (memory.plan.rows, memory.plan.block)
    key = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    query = first + (jax.lax.broadcasted_iota(jnp.int32, shape, 0) & (plan.tokens - 1))
    seen = (key <= query) & (key < stop)
    if plan.sight.window is not None:
        seen &= query - key < plan.sight.window
    if plan.sight.chunk is not None:
        chunk = first - jax.lax.rem(first, jnp.int32(plan.sight.chunk))
        # an item is no longer than a chunk, so its tokens are in two at most
        seen &= key >= jnp.where(query < chunk + plan.sight.chunk, chunk, chunk + plan.sight.chunk)
    return seen


def _scores(memory: _Memory, k: int, turn):
    """[M, S] of the k-th matrix of queries, before any mask."""
    plan, queries = memory.plan, memory.q if memory.plan.together == 1 else memory.wide_q
    products = []
    for name, q in zip(plan.keys, queries, strict=True):
        part_MS = product(q[k], _channels(memory, name, k, turn, q.shape[-1], q.dtype), (1, 1))
        is_scaled = name + SCALE in memory.blocks
        products.append(part_MS * _scale_of_rows(memory, name, k, turn, None) if is_scaled else part_MS)
    scores = functools.reduce(jnp.add, products) * plan.scale
    return scores if plan.softcap is None else plan.softcap * jnp.tanh(scores / plan.softcap)


def _add(memory: _Memory, k: int, turn, scores_MS, copied) -> None:
    plan = memory.plan
    before_ML, S, E = memory.top_JML[k], plan.block, memory.sum_JME.shape[-1]
    top_ML = jnp.maximum(before_ML, scores_MS.max(axis=1, keepdims=True))
    weights_MS = jnp.exp(scores_MS - across(top_ML, S))
    shrink_ML = jnp.exp(before_ML - top_ML)
    memory.top_JML[k] = top_ML
    memory.total_JML[k] = memory.total_JML[k] * shrink_ML + weights_MS.sum(axis=1, keepdims=True)
    dtype = memory.q[0].dtype
    v_SE = _channels(memory, plan.values, k, turn, E, dtype)
    if copied is not None:
        v_SE = _choose(copied[0], v_SE, jnp.zeros_like(v_SE))
    if plan.values + SCALE in memory.blocks:
        weights_MS *= _scale_of_rows(memory, plan.values, k, turn, copied)
    found_ME = product(weights_MS.astype(dtype), v_SE, (1, 0))
    memory.sum_JME[k] = memory.sum_JME[k] * across(shrink_ML, E) + found_ME


def _channels(memory: _Memory, name: str, k: int, turn, width: int, dtype):
    """[S, n * C] of block j, of the heads of the k-th matrix of queries."""
    return memory.blocks[name][turn, :, k * width : (k + 1) * width].astype(dtype)


def _scale_of_rows(memory: _Memory, name: str, k: int, turn, copied):
    """[M, S], or [1, S] for one head: each slot's scale for the head that a row looks at."""
    n, pages = memory.plan.together, memory.blocks[name + SCALE]
    scales = [pages[turn, p, k * n : (k + 1) * n] for p in range(memory.plan.block_pages)]
    scales_nS = jnp.concatenate(scales, axis=1)
    if copied is not None:
        scales_nS = jnp.where(copied[1], scales_nS, 0.0)
    return scales_nS if n == 1 else _exact(memory.own_Mn[...], scales_nS)


def _finish(memory: _Memory) -> None:
    E = memory.sum_JME.shape[-1]
    for k in range(memory.found.shape[0]):
        total_ML = memory.total_JML[k]
        found_ME = memory.sum_JME[k] / across(jnp.where(total_ML > 0, total_ML, 1.0), E)
        if memory.plan.together > 1:
            mine_ME = jnp.where(_own(memory, E // memory.plan.together) > 0, found_ME, 0.0)
            dims = (((1,), (1,)), ((), ()))
            exact = jax.lax.Precision.HIGHEST if memory.found.dtype == jnp.float32 else None
            found_ME = jax.lax.dot_general(
                mine_ME.astype(memory.found.dtype),
                memory.spread_values[...],
                dims,
                precision=exact,
                preferred_element_type=jnp.float32,
            )
        memory.found[k] = found_ME.astype(memory.found.dtype)


def _div(n, by: int):
    return jax.lax.div(n, jnp.int32(by))


def _up(n, by: int):
    return _div(n + by - 1, by)

"""The TPU kernel of paged attention: the queries of each work item go through the blocks of pages of its row.

Kwon et al. 2023, arXiv:2309.06180; weights are added up as in Dao 2023, arXiv:2307.08691. Pages stay in the chip's main
memory. Those of the next block, even of the next work item, are copied while this block is computed. Only pages that
some query of the work item sees are copied. New tokens are merged with the old in fast memory, and copied to their
pages from there. Queries are read from the flat tokens in main memory; outputs are written to the same places.
"""

# T tokens of all rows, H query heads, C channels of a key, E channels of a value
# I work items of Q tokens, J matrices of queries a work item, M rows of one, G of them of one token, n heads together
# N pages, Z slots a page, S slots of a block, W slots of a group, U groups, X channels of a slot, L lanes (128)

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.attention.tpu_blocks import LANES, LEAST, MASKED, across, product
from model.kernels.paged_attention.pages import SCALE
from model.kernels.paged_attention.tpu_copies import (
    Memory,
    choose,
    kv_copies,
    merge_new_kv,
    output_copies,
    page_writes,
    query_copies,
    work_item_blocks,
    work_item_positions,
)
from model.kernels.paged_attention.tpu_plan import PagedCall, Part, Scalars, head_of_rows, spread


def attend(
    call: PagedCall,
    scalars: Scalars,
    q_THC: jax.Array,
    sinks_JML: jax.Array | None,
    fresh: dict[str, jax.Array],
    pages: dict[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(outputs [T, H, E], zero for tokens of no row, the pages with the new tokens).

    Args:
      fresh: new tokens of each part of pages, in groups; {}: nothing is written, and the pages are returned.
    """
    (T, H, _), names, write = q_THC.shape, [part.name for part in call.parts], bool(fresh)
    constants = [*_constants(call, q_THC.dtype), sinks_JML]
    zeros_THE = jnp.zeros((T, H, call.width_of(call.values)), q_THC.dtype)  # for tokens of no row
    # A compiler with fast memory to spare would move all pages of scales there and back. With arrays that stay it
    # refuses a program whose results are this call's in their order, so outputs come last here and first there.
    stay = lambda x: x if call.interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)
    in_memory = [
        q_THC,
        [fresh[name] for name in names if write],
        [stay(pages[name]) for name in names],
        zeros_THE,
    ]
    updated = jax.tree.leaves(in_memory)[-1 - len(names) * write :]
    first = len(scalars) + len(jax.tree.leaves((constants, in_memory))) - len(updated)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    *written, out_THE = pl.pallas_call(
        functools.partial(_kernel, call, write),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(call.cores, len(scalars.work_item_row) // call.cores),
            in_specs=[
                jax.tree.map(lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim), constants),
                jax.tree.map(lambda _: anywhere, in_memory),
            ],
            out_specs=[anywhere for _ in updated],
            scratch_shapes=_scratch(call, q_THC, {name: pages[name].dtype for name in names}),
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in updated],
        input_output_aliases={first + k: k for k in range(len(updated))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(call, scalars, q_THC, fresh, pages),
        interpret=call.interpret,
        name="paged_attention",
    )(*scalars, constants, in_memory)
    return out_THE, pages | dict(zip(names, written))


def _constants(call: PagedCall, dtype) -> list[Any]:
    """In the order of `Memory`'s fields."""
    n, E = call.together, call.width_of(call.values)
    if n == 1:
        return [None, None, None]
    return [
        jnp.asarray(head_of_rows(n, call.group, call.tokens)),
        tuple(jnp.asarray(spread(n, call.width_of(name)), dtype) for name in call.keys),
        jnp.asarray(spread(n, E), dtype),
    ]


def _cost(call: PagedCall, scalars: Scalars, q_THC: jax.Array, fresh: dict, pages: dict) -> pl.CostEstimate:
    """If every row filled its pages: what the compiler plans other work around."""
    (T, H, C), (R,), E = q_THC.shape, scalars.row_start.shape, call.width_of(call.values)
    slots = call.pages_a_row * call.page_size
    span = min(call.mask.span() or slots, slots)
    scores = T * H * span
    of_page = sum(pages[part.name].nbytes for part in call.parts) // call.num_pages
    old = R * -(-span // call.page_size) * of_page
    moved = old + 2 * sum(x.nbytes for x in fresh.values()) + T * H * (C + E) * q_THC.dtype.itemsize
    flops = 2 * scores * (C + E) * call.together
    return pl.CostEstimate(flops=flops, transcendentals=scores, bytes_accessed=moved)


def _scratch(call: PagedCall, q_THC: jax.Array, dtypes: dict) -> list:
    """In the order of `Memory`'s last fields."""
    (_, H, C), dtype, E = q_THC.shape, q_THC.dtype, call.width_of(call.values)
    J, n, M, parts = call.matrices, call.together, call.rows, call.parts

    def blocks(part: Part):
        each = (call.block_pages, part.width, call.page_size) if part.scales else (call.block, part.width)
        return pltpu.VMEM((2, *each), dtypes[part.name])

    def new_kv(part: Part):
        return pltpu.VMEM((2, call.fresh_groups(part), *call.fresh_shape(part)), dtypes[part.name])

    return [
        [blocks(part) for part in parts],
        [new_kv(part) for part in parts],
        pltpu.VMEM((call.tokens, H, C), dtype),
        pltpu.VMEM((call.tokens, H, E), dtype),
        [pltpu.VMEM((J, M, n * call.width_of(name)), dtype) for name in call.keys],
        pltpu.VMEM((J, M, LANES), jnp.float32),
        pltpu.VMEM((J, M, LANES), jnp.float32),
        pltpu.VMEM((J, M, n * E), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        *(pltpu.SemaphoreType.DMA((1,)) for _ in range(3)),
    ]


def _kernel(call: PagedCall, write: bool, *refs):
    scalars, refs = Scalars(*refs[: len(Scalars._fields)]), refs[len(Scalars._fields) :]
    constants, (q_THC, fresh, pages, _), *refs = refs
    written, (out_THE, *scratch) = (refs[: len(pages)], refs[len(pages) :]) if write else (pages, refs)
    named = lambda xs: {part.name: x for part, x in zip(call.parts, xs)}
    blocks, new_kv, *rest = scratch
    of_parts = named(fresh), named(written), out_THE, named(blocks), named(new_kv)
    given: list[Any] = [call, scalars, *constants, q_THC, *of_parts, *rest]
    memory = Memory(*given)
    step = pl.program_id(1)
    w = step * call.cores + pl.program_id(0)

    @pl.when(w < scalars.num_work_items[0])
    def run():
        _run_work_item(memory, w, step)


def _run_work_item(memory: Memory, w, step) -> None:
    call, num_work_items = memory.call, memory.scalars.num_work_items[0]
    first, last = work_item_blocks(memory, w)

    @pl.when(step == 0)
    def begin():
        memory.buffer_slot[0] = 0
        query_copies(memory, w, lambda copy: copy.start())
        kv_copies(memory, w, first, 0, lambda copy: copy.start())

    query_copies(memory, w, lambda copy: copy.wait())
    _small_or_full_tile(memory, w, functools.partial(_start, memory))

    @pl.when(w + call.cores < num_work_items)
    def ask_next():
        query_copies(memory, w + call.cores, lambda copy: copy.start())

    def block(j, buffer_slot):
        more = j + 1 < last
        following = jnp.where(more, w, jnp.minimum(w + call.cores, num_work_items - 1))
        block_of_it = jnp.where(more, j + 1, work_item_blocks(memory, following)[0])

        @pl.when(more | (w + call.cores < num_work_items))
        def fetch_next():
            kv_copies(memory, following, block_of_it, 1 - buffer_slot, lambda copy: copy.start())

        kv_copies(memory, w, j, buffer_slot, lambda copy: copy.wait())
        if memory.fresh:
            merge_new_kv(memory, w, j, buffer_slot)
            page_writes(memory, w, j, buffer_slot, lambda copy: copy.start())
        _small_or_full_tile(memory, w, functools.partial(_update, memory, w, j, buffer_slot))
        if memory.fresh:
            page_writes(memory, w, j, buffer_slot, lambda copy: copy.wait())
        return 1 - buffer_slot

    memory.buffer_slot[0] = jax.lax.fori_loop(first, last, block, memory.buffer_slot[0])

    @pl.when(step > 0)
    def clear():
        output_copies(memory, w - call.cores, lambda copy: copy.wait())

    _small_or_full_tile(memory, w, functools.partial(_finish, memory))
    output_copies(memory, w, lambda copy: copy.start())

    @pl.when(w + call.cores >= num_work_items)
    def end():
        output_copies(memory, w, lambda copy: copy.wait())


def _small_or_full_tile(memory: Memory, w, do) -> None:
    """`do(tokens)` of a small tile where the work item has no more tokens, else of all its places."""
    small_tile, tokens = memory.call.small_tile, memory.call.tokens
    if small_tile == tokens:
        return do(tokens)
    is_small = memory.scalars.work_item_count[w] <= small_tile
    pl.when(is_small)(lambda: do(small_tile))
    pl.when(~is_small)(lambda: do(tokens))


def _start(memory: Memory, tokens: int) -> None:
    """Sums are empty, and queries are matrices."""
    call, of_rows = memory.call, (slice(None), slice(tokens * memory.call.matrix_heads))
    for state, none in (memory.top_JML, LEAST), (memory.total_JML, 0.0), (memory.sum_JME, 0.0):
        state[of_rows] = jnp.full((state.shape[0], of_rows[1].stop, state.shape[2]), none, state.dtype)
    if memory.sinks_JML is not None:
        memory.top_JML[of_rows] = memory.sinks_JML[of_rows]
        memory.total_JML[of_rows] = jnp.ones_like(memory.total_JML[of_rows])
    begin = 0
    for part, name in enumerate(call.keys):
        width = call.width_of(name)
        for k in range(call.matrices):
            q_MC = _matrix(memory, k, tokens, slice(begin, begin + width))
            if call.together > 1:
                wide = _exact(q_MC, memory.spread_keys[part][...])
                q_MC = (wide * _own_head(memory, width, len(q_MC))).astype(q_MC.dtype)
            memory.queries[part][k, of_rows[1]] = q_MC
        begin += width


def _matrix(memory: Memory, k: int, tokens: int, channels: slice):
    """[M, C] the k-th matrix of the first tokens' queries, transposed in 32 bits, which each chip can do."""
    G = memory.call.matrix_heads
    q_QGC = memory.q_QHC[:tokens, k * G : (k + 1) * G, channels]
    return q_QGC.astype(jnp.float32).reshape(tokens * G, -1).astype(q_QGC.dtype)


def _own_head(memory: Memory, width: int, rows: int):
    """[M, n * width] 1 in the channels of the head that a row looks at."""
    own_Mn = memory.own_Mn[:rows]
    n = own_Mn.shape[1]
    begins = jax.lax.broadcasted_iota(jnp.int32, (n, n * width), 0) * width
    lane = jax.lax.broadcasted_iota(jnp.int32, (n, n * width), 1)
    return _exact(own_Mn, jnp.where((lane >= begins) & (lane < begins + width), 1.0, 0.0))


def _exact(a, b):
    """A product with zeros and ones, which changes no number."""
    dims = (((1,), (0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _update(memory: Memory, w, j, buffer_slot, tokens: int) -> None:
    """Updates the sums of the work item's first tokens with block j."""
    _, low, first, stop = work_item_positions(memory, w)
    call, mask, begin = memory.call, memory.call.mask, j * memory.call.block
    rows = slice(tokens * call.matrix_heads)
    last = first + tokens - 1  # of the places, taken or not
    whole = begin + call.block <= first + 1
    if mask.window is not None:
        whole &= last - begin < mask.window
    if mask.chunk is not None:
        whole &= begin >= last - jax.lax.rem(last, jnp.int32(mask.chunk))

    @pl.when(whole)
    def all_seen():
        for k in range(call.matrices):
            _add(memory, k, buffer_slot, _scores(memory, k, buffer_slot, rows), None)

    @pl.when(~whole)
    def some_seen():
        seen_MS = _sees(call, begin, first, stop, rows.stop)
        slot = begin + jax.lax.broadcasted_iota(jnp.int32, (call.block, 1), 0)
        slot_of_lane = begin + jax.lax.broadcasted_iota(jnp.int32, (1, call.block), 1)
        # what was not copied may be anything, and no number times 0 makes it 0
        copied = ((slot >= low) & (slot < stop), (slot_of_lane >= low) & (slot_of_lane < stop))
        for k in range(call.matrices):
            _add(
                memory,
                k,
                buffer_slot,
                jnp.where(seen_MS, _scores(memory, k, buffer_slot, rows), MASKED),
                copied,
            )


def _sees(call: PagedCall, begin, first, stop, rows: int):
    """[M, S] bool."""
    key = begin + jax.lax.broadcasted_iota(jnp.int32, (rows, call.block), 1)
    query = first + jax.lax.div(
        jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0), jnp.int32(call.matrix_heads)
    )
    seen = (key <= query) & (key < stop)
    if call.mask.window is not None:
        seen &= query - key < call.mask.window
    if call.mask.chunk is not None:
        chunk = first - jax.lax.rem(first, jnp.int32(call.mask.chunk))
        # a work item is no longer than a chunk, so its tokens are in two at most
        seen &= key >= jnp.where(query < chunk + call.mask.chunk, chunk, chunk + call.mask.chunk)
    return seen


def _scores(memory: Memory, k: int, buffer_slot, rows: slice):
    """[M, S] of the k-th matrix of queries, before any mask."""
    call, products = memory.call, []
    for name, q in zip(call.keys, memory.queries, strict=True):
        part_MS = product(q[k, rows], _channels(memory, name, k, buffer_slot, q.shape[-1], q.dtype), (1, 1))
        if name + SCALE in memory.blocks:
            part_MS *= _scale_of_rows(memory, name, k, buffer_slot, None, rows)
        products.append(part_MS)
    scores = functools.reduce(jnp.add, products) * call.scale
    return scores if call.softcap is None else call.softcap * jnp.tanh(scores / call.softcap)


def _add(memory: Memory, k: int, buffer_slot, scores_MS, copied) -> None:
    call, rows = memory.call, slice(len(scores_MS))
    before_ML, S, E = memory.top_JML[k, rows], call.block, memory.sum_JME.shape[-1]
    top_ML = jnp.maximum(before_ML, scores_MS.max(axis=1, keepdims=True))
    weights_MS = jnp.exp(scores_MS - across(top_ML, S))
    shrink_ML = jnp.exp(before_ML - top_ML)
    memory.top_JML[k, rows] = top_ML
    total_ML = memory.total_JML[k, rows] * shrink_ML + weights_MS.sum(axis=1, keepdims=True)
    memory.total_JML[k, rows] = total_ML
    dtype = memory.q_QHC.dtype
    v_SE = _channels(memory, call.values, k, buffer_slot, E, dtype)
    if copied is not None:
        v_SE = choose(copied[0], v_SE, jnp.zeros_like(v_SE))
    if call.values + SCALE in memory.blocks:
        weights_MS *= _scale_of_rows(memory, call.values, k, buffer_slot, copied, rows)
    out_ME = product(weights_MS.astype(dtype), v_SE, (1, 0))
    memory.sum_JME[k, rows] = memory.sum_JME[k, rows] * across(shrink_ML, E) + out_ME


def _channels(memory: Memory, name: str, k: int, buffer_slot, width: int, dtype):
    """[S, n * C] of block j, of the heads of the k-th matrix of queries."""
    return memory.blocks[name][buffer_slot, :, k * width : (k + 1) * width].astype(dtype)


def _scale_of_rows(memory: Memory, name: str, k: int, buffer_slot, copied, rows: slice):
    """[M, S], or [1, S] for one head: each slot's scale for the head that a row looks at."""
    n, pages = memory.call.together, memory.blocks[name + SCALE]
    scales = [pages[buffer_slot, p, k * n : (k + 1) * n] for p in range(memory.call.block_pages)]
    scales_nS = jnp.concatenate(scales, axis=1)
    if copied is not None:
        scales_nS = jnp.where(copied[1], scales_nS, 0.0)
    return scales_nS if n == 1 else _exact(memory.own_Mn[rows], scales_nS)


def _finish(memory: Memory, tokens: int) -> None:
    call, E, rows = memory.call, memory.sum_JME.shape[-1], tokens * memory.call.matrix_heads
    G, dtype = call.matrix_heads, memory.out_QHE.dtype
    for k in range(call.matrices):
        total_ML = memory.total_JML[k, :rows]
        out_ME = memory.sum_JME[k, :rows] / across(jnp.where(total_ML > 0, total_ML, 1.0), E)
        if call.together > 1:
            out_ME = _own_channels(memory, out_ME)
        out_QGE = out_ME.reshape(tokens, G, -1)
        memory.out_QHE[:tokens, k * G : (k + 1) * G] = out_QGE.astype(dtype)


def _own_channels(memory: Memory, out_ME):
    """Of the values of heads that are together, those of the head that a row looks at."""
    width, dtype = memory.out_QHE.shape[-1], memory.out_QHE.dtype
    mine_ME = jnp.where(_own_head(memory, width, len(out_ME)) > 0, out_ME, 0.0)
    return jax.lax.dot_general(
        mine_ME.astype(dtype),
        memory.spread_values[...],
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

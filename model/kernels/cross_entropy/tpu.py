"""The TPU kernels of cross-entropy: products of hidden states and the head in tiles. Logits never leave the chip's fast
memory.

A tile's products are summed over blocks of channels, so its size does not depend on the model's width. After the last
block, the sums become logits and update the scores.
"""

# N tokens, V vocabulary, D model width; Q tokens, S entries and C channels of a tile

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.attention.tpu_blocks import LANES, column, product
from model.kernels.cross_entropy.tiles import (
    MASKED,
    NOWHERE,
    Cotangents,
    CrossEntropyCall,
    Running,
    Scores,
    TileSizes,
    final_scores,
    initial_state,
    logits_of,
    product_gradients,
    update,
)


def forward(call: CrossEntropyCall, hidden_ND, head_VD, bias_V, targets_N, choices) -> Scores:
    (N, D), V = hidden_ND.shape, len(head_VD)
    grid, (Q, S, C) = _grid(call, hidden_ND, V)
    start = jax.eval_shape(lambda: initial_state(call, Q))
    rows = jax.eval_shape(lambda: final_scores(initial_state(call, 1)))
    scores = pl.pallas_call(
        functools.partial(_forward_kernel, call, V, D),
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *_specs(Q, S, C, bias_V), _row(Q)],
        out_specs=jax.tree.map(lambda _: _row(Q), rows),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, N), x.dtype), rows),
        scratch_shapes=[
            pltpu.VMEM((Q, S), jnp.float32),
            pltpu.VMEM((Q, 1), jnp.int32),
            *(pltpu.VMEM(x.shape, x.dtype) for x in jax.tree.leaves(start)),
        ],
        compiler_params=_COMPILER,
        cost_estimate=_cost(grid, hidden_ND, head_VD, 0),
        interpret=call.interpret,
        name="cross_entropy_forward",
    )(choices[None], hidden_ND, head_VD, _as_row(bias_V), targets_N[None])
    return jax.tree.map(lambda x_1N: x_1N[0], scores)


def stripe_gradients(
    call: CrossEntropyCall, hidden_ND, head_SD, bias_S, targets_N, cotangents: Cotangents
) -> jax.Array:
    """As `stripes.stripe_gradients`."""
    (N, D), V = hidden_ND.shape, len(head_SD)
    grid, (Q, S, C) = _grid(call, hidden_ND, V)
    rows = jax.tree.map(lambda x_N1: x_N1.T, cotangents)
    return pl.pallas_call(
        functools.partial(_gradient_kernel, call, D),
        grid=grid,
        in_specs=[*_specs(Q, S, C, bias_S), _row(Q), jax.tree.map(lambda _: _row(Q), rows)],
        out_specs=pl.BlockSpec((Q, S), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((N, V), hidden_ND.dtype),
        scratch_shapes=[
            pltpu.VMEM((Q, S), jnp.float32),
            pltpu.VMEM((Q, 1), jnp.int32),
            *[pltpu.VMEM((Q, 1), jnp.float32)] * len(jax.tree.leaves(rows)),
        ],
        compiler_params=_COMPILER,
        cost_estimate=_cost(grid, hidden_ND, head_SD, N * V * hidden_ND.dtype.itemsize),
        interpret=call.interpret,
        name="cross_entropy_gradients",
    )(hidden_ND, head_SD, _as_row(bias_S), targets_N[None], rows)


def _forward_kernel(
    call: CrossEntropyCall, V: int, D: int, choices, hidden_QC, head_SC, bias_1S, targets_1Q, *refs
):
    running = jax.tree.structure(jax.eval_shape(lambda: initial_state(call, 1)))
    products_QS, targets_Q1, *state = refs[-2 - running.num_leaves :]
    scores = refs[: -2 - running.num_leaves]
    j, first_step, last_step = _steps()

    @pl.when(first_step)
    def start():
        targets_Q1[...] = _upright(targets_1Q[...])
        _store(state, initial_state(call, len(targets_Q1)))

    def so_far() -> Running:
        return jax.tree.unflatten(running, [ref[...] for ref in state])

    def add_tile():
        logits_QS = logits_of(call, products_QS[...], None if bias_1S is None else bias_1S[...])
        entries_QS = _entries(logits_QS.shape, j)
        if V % logits_QS.shape[1]:
            counts_QS = entries_QS < V
            logits_QS = jnp.where(counts_QS, logits_QS, MASKED)
            entries_QS = jnp.where(counts_QS, entries_QS, NOWHERE)
        _store(state, update(call, so_far(), logits_QS, entries_QS, targets_Q1[...], choices[0]))

    _multiply(D, hidden_QC, head_SC, products_QS, add_tile)

    @pl.when(last_step)
    def finish():
        _store(scores, jax.tree.map(_lying, final_scores(so_far())))


def _gradient_kernel(
    call: CrossEntropyCall, D: int, hidden_QC, head_SC, bias_1S, targets_1Q, rows, d_QS, *scratch
):
    products_QS, targets_Q1, *cotangents = scratch
    j, first_step, _ = _steps()

    @pl.when(first_step)
    def start():
        targets_Q1[...] = _upright(targets_1Q[...])
        _store(cotangents, [_upright(row_1Q[...]) for row_1Q in jax.tree.leaves(rows)])

    def write_tile():
        logits_QS = logits_of(call, products_QS[...], None if bias_1S is None else bias_1S[...])
        entries_QS = _entries(logits_QS.shape, j)
        columns = jax.tree.unflatten(jax.tree.structure(rows), [ref[...] for ref in cotangents])
        gradients_QS = product_gradients(call, logits_QS, entries_QS, targets_Q1[...], columns)
        d_QS[...] = gradients_QS.astype(d_QS.dtype)

    _multiply(D, hidden_QC, head_SC, products_QS, write_tile)


def _multiply(D: int, hidden_QC, head_SC, products_QS, when_done) -> None:
    """Add the products over these channels; the first block starts the sum."""
    k = pl.program_id(2)

    @pl.when(k == 0)
    def clear():
        products_QS[...] = jnp.zeros_like(products_QS)

    products_QS[...] += product(_within(hidden_QC[...], k, D), _within(head_SC[...], k, D), (1, 1))
    pl.when(k == pl.num_programs(2) - 1)(when_done)


def _within(x_RC: jax.Array, k, D: int) -> jax.Array:
    """Zeros for channels beyond the last one, if the last block has any."""
    C = x_RC.shape[1]
    if D % C == 0:
        return x_RC
    channels_RC = jax.lax.broadcasted_iota(jnp.int32, x_RC.shape, 1) + k * C
    return jnp.where(channels_RC < D, x_RC.astype(jnp.float32), 0.0).astype(x_RC.dtype)


def _grid(
    call: CrossEntropyCall, hidden_ND: jax.Array, V: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(steps, sizes of a tile); the number of tokens is already a multiple.

    float32 channels take twice the memory and far more time, so a tile has half as many entries.
    """
    (N, D), tiles = hidden_ND.shape, call.tiles or TileSizes()
    entries = tiles.entries if hidden_ND.dtype.itemsize <= 2 else max(LANES, tiles.entries // 2)
    sizes = min(N, tiles.tokens), min(V, entries), _channels(D, tiles.width)
    return (pl.cdiv(N, sizes[0]), pl.cdiv(V, sizes[1]), pl.cdiv(D, sizes[2])), sizes


def _channels(D: int, most: int) -> int:
    """Channels of a tile: a divisor of all channels if it is at least half of `most`."""
    if D <= most:
        return D
    return next((C for C in range(most, most // 2 - 1, -LANES) if D % C == 0), most)


def _cost(grid: tuple[int, int, int], hidden_ND, head_VD, written: int) -> pl.CostEstimate:
    """The cost estimate: hidden states are read for each tile of the vocabulary, the head for each tile of tokens."""
    (N, D), V = hidden_ND.shape, len(head_VD)
    read = (
        grid[1] * hidden_ND.size * hidden_ND.dtype.itemsize + grid[0] * head_VD.size * head_VD.dtype.itemsize
    )
    return pl.CostEstimate(flops=2 * N * V * D, bytes_accessed=read + written, transcendentals=N * V)


def _specs(Q: int, S: int, C: int, bias: jax.Array | None) -> list[pl.BlockSpec | None]:
    """The blocks of hidden states, head and bias."""
    return [
        pl.BlockSpec((Q, C), lambda i, j, k: (i, k)),
        pl.BlockSpec((S, C), lambda i, j, k: (j, k)),
        None if bias is None else pl.BlockSpec((1, S), lambda i, j, k: (0, j)),
    ]


def _row(Q: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, Q), lambda i, j, k: (0, i))


_COMPILER = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))


def _steps():
    """(index of the vocabulary's tile, whether this is the tokens' first step, whether it is their last)."""
    j, k = pl.program_id(1), pl.program_id(2)
    last = (j == pl.num_programs(1) - 1) & (k == pl.num_programs(2) - 1)
    return j, (j == 0) & (k == 0), last


def _entries(shape: tuple[int, ...], j) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) + j * shape[1]


def _as_row(bias: jax.Array | None) -> jax.Array | None:
    return None if bias is None else bias.astype(jnp.float32)[None]


def _upright(row_1Q: jax.Array) -> jax.Array:
    return column(row_1Q)[:, :1]


def _lying(column_Q1: jax.Array) -> jax.Array:
    return jnp.broadcast_to(column_Q1, (len(column_Q1), LANES)).T[:1]


def _store(refs, values) -> None:
    for ref, value in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        ref[...] = value

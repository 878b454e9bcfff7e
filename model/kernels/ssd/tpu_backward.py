"""The backward kernel of state-space duality: blocks of tokens from the last to the first, with the state's gradient.

The forward pass left the state before each block; those before its chunks, and all within a chunk, are computed again.
A decay's gradient is what passes over its token: sums over tokens after it minus sums over tokens before it, of the
same float32 numbers, so that what cancels does so exactly. Letters are those of tpu_forward.
"""

# B batch, T tokens of a block, Q tokens of a chunk, R heads of a block, J blocks of heads of a walk, W walks
# I blocks of tokens, C chunks of a block, P value width, N key (state) width, F = R P channels, L lanes (128)

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.recurrence.tpu_chunks import (
    CHUNK,
    LANES,
    all_sum,
    at_last,
    column_sum,
    cost,
    in_lane,
    in_row,
    row_sum,
)
from model.kernels.ssd.tpu_forward import DIMENSIONS, Chunk, Inputs, Results, SSDCall, after


def gradients(
    call: SSDCall, inputs: Inputs, entering: jax.Array, dresults: Results
) -> tuple[Inputs, jax.Array]:
    """Of the inputs, of keys and queries a walk's part of them, and of the first states."""
    (B, T, F), N = inputs.v.shape, dresults.last.shape[1]
    grid = call.grid(B, T)
    W, I, J = grid[1:]
    back = lambda t: I - 1 - t
    specs = call.specs(N, back)
    part_spec = pl.BlockSpec((None, None, call.tokens, N), lambda b, w, t, j: (b, w, back(t), 0))
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    part, of_values = float32(B, W, T, N), jax.ShapeDtypeStruct((B, T, F), inputs.v.dtype)
    of_heads = float32(*inputs.totals.shape)
    of_inputs = Inputs(of_values, of_heads if call.scaled else None, of_heads, part, part, None)
    outputs = of_inputs, float32(B, N, F)
    arrays = (*inputs, entering, *dresults), (*outputs[0], outputs[1])
    multiplied = 3 * W * J * CHUNK * N + F * (2 * CHUNK + 5 * N)  # for a token
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid=grid,
        in_specs=[specs, call.entering_spec(N, back), Results(specs.v, call.state_spec(N, 0, J - 1))],
        out_specs=[
            specs._replace(k=part_spec, q=part_spec, documents=None),
            call.state_spec(N, I - 1, 0),
        ],
        out_shape=outputs,
        scratch_shapes=[
            _Scratch(
                pltpu.VMEM((J, N, call.channels), jnp.float32),
                pltpu.VMEM((call.tokens // CHUNK, N, call.channels), jnp.float32),
            )
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=DIMENSIONS),
        cost_estimate=cost(B * T * multiplied, B * T * F // call.width, *arrays),
        interpret=call.interpret,
        name="ssd_backward",
    )(inputs, entering, dresults)


class _Scratch(NamedTuple):
    dstates_JNF: Any  # of each block of heads, dS' of the chunk that is next
    states_CNF: Any  # of one block of heads, S of each chunk


def _kernel(
    call: SSDCall,
    inputs: Inputs,
    entering_NF,
    dresults: Results,
    dinputs: Inputs,
    dstart_NF,
    scratch: _Scratch,
):
    t, j, chunks = pl.program_id(2), pl.program_id(3), call.tokens // CHUNK
    dstate_NF = scratch.dstates_JNF.at[j]
    block = _Block(call, inputs, dresults.y, dinputs, scratch.states_CNF, dstate_NF)

    @pl.when(t == 0)
    def start():
        dstate_NF[...] = dresults.last[...]

    @pl.when(j == 0)
    def start_sums():
        dinputs.k[...] = jnp.zeros_like(dinputs.k)
        dinputs.q[...] = jnp.zeros_like(dinputs.q)

    block.states_CNF[0] = entering_NF[...]
    jax.lax.fori_loop(0, chunks - 1, lambda at, _: _recompute_states(block, at), None)
    jax.lax.fori_loop(0, chunks, lambda done, _: _chunk_gradients(block, chunks - 1 - done), None)

    @pl.when(t == pl.num_programs(2) - 1)
    def finish():
        dstart_NF[...] = dstate_NF[...]


class _Block(NamedTuple):
    """Refs to a block of tokens and of heads."""

    call: SSDCall
    inputs: Inputs
    dy_TF: Any
    dinputs: Inputs
    states_CNF: Any  # S of each chunk
    dstate_NF: Any  # dS' of the chunk that is next


def _recompute_states(block: _Block, at) -> None:
    """The state after chunk `at`, which is before the next."""
    chunk = block.inputs.chunk(at)
    for h in range(block.call.heads):
        head = block.call.head(h)
        before_NP = block.states_CNF[at, :, head]
        v_QP = chunk.scaled(h, block.inputs.v[chunk.here, head])
        block.states_CNF[at + 1, :, head] = after(chunk, h, v_QP, before_NP)


def _chunk_gradients(block: _Block, at) -> None:
    """The gradients of chunk `at`: of its inputs, and dS in place of dS'."""
    call, dinputs, chunk = block.call, block.dinputs, block.inputs.chunk(at)
    here, shared = chunk.here, _shared(chunk)
    sums, dscale_QL = _no_sums(call.heads, chunk), jnp.zeros((CHUNK, LANES), jnp.float32)
    for h in range(call.heads):
        head = call.head(h)
        states = block.states_CNF[at, :, head], block.dstate_NF[:, head]
        v_QP = block.inputs.v[here, head]
        x = _Head(h, chunk.scaled(h, v_QP), block.dy_TF[here, head], *states)
        dscaled_QP, block.dstate_NF[:, head], of_head = _head_gradients(shared, x)
        dinputs.v[here, head] = chunk.scaled(h, dscaled_QP).astype(dinputs.v.dtype)
        dscale_QL += in_lane(h, row_sum(dscaled_QP * v_QP.astype(jnp.float32)))
        sums = jax.tree.map(operator.add, sums, of_head)
    if call.scaled:
        dinputs.scale[:, here] = dscale_QL.T[: call.heads]
    dinputs.totals[:, here] = sums.rises_QL.T[: call.heads] - sums.falls_RQ
    dinputs.q[here] += sums.dq_QN + chunk.product(sums.dscores_QQ, chunk.k_QN, (1, 0))
    dinputs.k[here] += sums.dk_QN + chunk.product(sums.dscores_QQ, chunk.q_QN, (0, 0))


class _Shared(NamedTuple):
    """By the heads of a chunk."""

    chunk: Chunk
    k_QN: jax.Array  # float32
    q_QN: jax.Array  # float32
    scores_QQ: jax.Array


def _shared(chunk: Chunk) -> _Shared:
    return _Shared(chunk, chunk.k_QN.astype(jnp.float32), chunk.q_QN.astype(jnp.float32), chunk.scores())


class _Sums(NamedTuple):
    """Over heads; of totals what each head adds is in a lane or a row of its own."""

    dscores_QQ: jax.Array
    dk_QN: jax.Array  # through S'
    dq_QN: jax.Array  # through S
    rises_QL: jax.Array  # of totals, upright
    falls_RQ: jax.Array  # of totals, to subtract


def _no_sums(heads: int, chunk: Chunk) -> _Sums:
    shapes = (CHUNK, CHUNK), chunk.k_QN.shape, chunk.q_QN.shape, (CHUNK, LANES), (heads, CHUNK)
    return _Sums(*(jnp.zeros(shape, jnp.float32) for shape in shapes))


class _Head(NamedTuple):
    """What the gradients of one head of a chunk come from."""

    h: int
    v_QP: jax.Array
    dy_QP: jax.Array
    before_NP: jax.Array  # S
    dafter_NP: jax.Array  # dS'


def _head_gradients(shared: _Shared, x: _Head) -> tuple[jax.Array, jax.Array, _Sums]:
    """(dv = P^T dy + out k dS', dS = carry dS' + q^T (into dy), what it adds to sums over heads)."""
    chunk, decay, product = shared.chunk, shared.chunk.decay, shared.chunk.product
    into_Q1, out_Q1 = decay.into_QL[:, x.h : x.h + 1], decay.out_QL[:, x.h : x.h + 1]
    between_QQ = decay.between(x.h, chunk.mask.pairs_QQ)
    weights_QQ, dweights_QQ = shared.scores_QQ * between_QQ, product(x.dy_QP, x.v_QP, (1, 1))
    dv_QP = product(weights_QQ, x.dy_QP, (0, 0)) + product(chunk.k_QN, x.dafter_NP, (1, 0)) * out_Q1
    dq_QN = product(x.dy_QP, x.before_NP, (1, 1)) * into_Q1
    dk_QN = product(x.v_QP, x.dafter_NP, (1, 1)) * out_Q1
    over_QQ = jnp.where(chunk.mask.earlier_QQ, weights_QQ * dweights_QQ, 0)
    rise_Q1 = _rise(shared, x, over_QQ, dk_QN, dq_QN)
    fall_RQ = in_row(x.h, decay.totals_RQ.shape[0], column_sum(over_QQ))
    dbefore_NP = x.dafter_NP * decay.carry(x.h) + product(chunk.q_QN, x.dy_QP * into_Q1, (0, 0))
    sums = _Sums(dweights_QQ * between_QQ, dk_QN, dq_QN, in_lane(x.h, rise_Q1), fall_RQ)
    return dv_QP, dbefore_NP, sums


def _rise(shared: _Shared, x: _Head, over_QQ, dk_QN, dq_QN) -> jax.Array:
    """[Q, 1], of totals: of pairs of tokens (`over_QQ`) at the later one, from S to tokens, from tokens to S', and from
    S to S'."""
    gone_Q1 = row_sum(dk_QN * shared.k_QN)
    carried_11 = all_sum(x.dafter_NP * x.before_NP) * shared.chunk.decay.carry(x.h)
    rise_Q1 = row_sum(over_QQ) + row_sum(dq_QN * shared.q_QN) - gone_Q1
    return rise_Q1 + at_last(column_sum(gone_Q1) + carried_11)

"""The backward kernel of the gated delta rule: blocks of tokens from the last to the first, with the state's gradient.

The forward pass left the state before each block and the inverse of each chunk's system; all else is computed again.
In the letters of delta_forward dr = X^T du and dA = -dr u^T. A decay's gradient is what passes over its token: sums
over tokens after it minus sums over tokens before it, of the same float32 numbers.
"""

# B batch, T tokens of a block, Q tokens of a chunk, C chunks of a block, H heads, I blocks of tokens
# K key width, V value width

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.delta_rule.tpu_forward import (
    DIMENSIONS,
    Chunk,
    DeltaCall,
    Inputs,
    Results,
    Saved,
    after,
    new_values,
    written,
)
from model.kernels.recurrence.tpu_chunks import CHUNK, all_sum, at_last, column_sum, cost, in_lane, row_sum


def gradients(call: DeltaCall, inputs: Inputs, saved: Saved, dresults: Results) -> tuple[Inputs, jax.Array]:
    """Of the inputs and the first state."""
    (B, H, K, V), T = dresults.last.shape, inputs.q.shape[1]
    in_spec, out_spec, saved_spec = call.specs(lambda t: T // call.tokens - 1 - t)
    of_inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs._replace(documents=None)
    )
    of_state = jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)
    multiplied = 5 * CHUNK * (K + V) + 8 * K * V  # for a token of a head
    arrays = (*inputs, *saved, *dresults), (*of_inputs, of_state)
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid=(B, H, T // call.tokens),
        in_specs=[in_spec, saved_spec, out_spec],
        out_specs=[in_spec._replace(documents=None), out_spec.last],
        out_shape=[of_inputs, of_state],
        scratch_shapes=[
            _Scratch(
                pltpu.VMEM((K, V), jnp.float32),
                pltpu.VMEM((call.tokens // CHUNK, K, V), jnp.float32),
                pltpu.VMEM((call.tokens, V), jnp.float32),
                pltpu.VMEM((call.tokens, V), jnp.float32),
            )
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=DIMENSIONS),
        cost_estimate=cost(B * H * T * multiplied, B * H * T, *arrays),
        interpret=call.interpret,
        name="delta_backward",
    )(inputs, saved, dresults)


class _Scratch(NamedTuple):
    dstate_KV: Any  # of the state after the chunk that is next
    states_CKV: Any  # before each chunk
    new_TV: Any  # v - into k S
    written_TV: Any  # u


def _kernel(
    call: DeltaCall,
    inputs: Inputs,
    saved: Saved,
    dresults: Results,
    dinputs: Inputs,
    dstart_KV,
    scratch: _Scratch,
):
    chunks = call.tokens // CHUNK

    @pl.when(pl.program_id(2) == 0)
    def start():
        scratch.dstate_KV[...] = dresults.last[...]

    _recompute_states(chunks, inputs, saved, scratch)

    def step(done, _):
        x = _around(chunks - 1 - done, inputs, saved, dresults, scratch)
        d, scratch.dstate_KV[...] = _chunk_gradients(x)
        here = x.chunk.here
        for ref, of_chunk in ((dinputs.q, d.q), (dinputs.k, d.k), (dinputs.v, d.v)):
            ref[here] = of_chunk.astype(ref.dtype)
        dinputs.totals[:, here], dinputs.beta[:, here] = d.totals, d.beta
        return 0

    jax.lax.fori_loop(0, chunks, step, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def finish():
        dstart_KV[...] = scratch.dstate_KV[...]


def _recompute_states(chunks: int, inputs: Inputs, saved: Saved, scratch: _Scratch) -> None:
    """The states before the block's chunks, and what their tokens write."""
    scratch.states_CKV[0] = saved.entering[...]

    def step(at, _):
        chunk, before_KV = inputs.chunk(at), scratch.states_CKV[at]
        new_QV = new_values(chunk, before_KV)
        written_QV = written(chunk, saved.inverses[chunk.here], new_QV)
        scratch.new_TV[chunk.here], scratch.written_TV[chunk.here] = new_QV, written_QV

        @pl.when(at + 1 < chunks)
        def go_on():
            scratch.states_CKV[at + 1] = after(chunk, before_KV, written_QV)

        return 0

    jax.lax.fori_loop(0, chunks, step, 0)


class _Around(NamedTuple):
    """What the gradients of a chunk come from."""

    chunk: Chunk
    before_KV: jax.Array  # S
    inverse_QQ: jax.Array  # X
    new_QV: jax.Array  # v - into k S
    written_QV: jax.Array  # u
    do_QV: jax.Array
    dafter_KV: jax.Array  # dS'


def _around(at, inputs: Inputs, saved: Saved, dresults: Results, scratch: _Scratch) -> _Around:
    chunk = inputs.chunk(at)
    here = chunk.here
    return _Around(
        chunk,
        before_KV=scratch.states_CKV[at],
        inverse_QQ=saved.inverses[here],
        new_QV=scratch.new_TV[here],
        written_QV=scratch.written_TV[here],
        do_QV=dresults.o[here],
        dafter_KV=scratch.dstate_KV[...],
    )


def _chunk_gradients(x: _Around) -> tuple[Inputs, jax.Array]:
    """(of the chunk's inputs, float32; dS)."""
    chunk, found = x.chunk, _from_found(x)
    q_QK, k_QK, product = chunk.q_QK, chunk.k_QK, chunk.product
    dq_QK = found.dinto_QK + product(found.dproducts_QQ, k_QK, (1, 0))
    dright_QV, dout_QK = _from_written(x, found.weights_QQ)
    dv_QV = chunk.beta_Q1 * dright_QV
    dproducts_QQ, dbeta_QQ = _from_system(x, found.between_QQ, dright_QV)
    dknown_QK = _from_known(x, dv_QV)
    dk_QK = product(found.dproducts_QQ, q_QK, (0, 0)) + dout_QK + dknown_QK
    dk_QK += product(dproducts_QQ + dproducts_QQ.T, k_QK, (1, 0))
    over_QQ = jnp.where(chunk.mask.earlier_QQ, found.dproducts_QQ * found.products_QQ, 0)
    over_QQ += chunk.beta_Q1 * dbeta_QQ
    dbeta_Q1 = row_sum(dbeta_QQ) + row_sum(dright_QV * x.new_QV)
    dtotals_1Q = _from_decays(x, over_QQ, found.dinto_QK, dknown_QK, dout_QK)
    return Inputs(dq_QK, dk_QK, dv_QV, dtotals_1Q, _row(dbeta_Q1), None), _before(x, dv_QV)


class _Found(NamedTuple):
    between_QQ: jax.Array  # D up to the diagonal
    products_QQ: jax.Array  # q k^T
    weights_QQ: jax.Array  # P
    dproducts_QQ: jax.Array  # D do u^T
    dinto_QK: jax.Array  # of the queries through S, into do S^T


def _from_found(x: _Around) -> _Found:
    """Of o = into q S + P u, P = D q k^T."""
    chunk = x.chunk
    between_QQ = chunk.decay.between(0, chunk.mask.pairs_QQ)
    products_QQ = chunk.product(chunk.q_QK, chunk.k_QK, (1, 1))
    weights_QQ = products_QQ * between_QQ
    dproducts_QQ = chunk.product(x.do_QV, x.written_QV, (1, 1)) * between_QQ
    dinto_QK = chunk.product(x.do_QV, x.before_KV, (1, 1)) * chunk.decay.into_QL[:, :1]
    return _Found(between_QQ, products_QQ, weights_QQ, dproducts_QQ, dinto_QK)


def _from_written(x: _Around, weights_QQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of u in o and in S': (dr = X^T (P^T do + out k dS'); the keys' gradient through S', out u dS'^T)."""
    chunk, out_Q1 = x.chunk, x.chunk.decay.out_QL[:, :1]
    dwritten_QV = chunk.product(weights_QQ, x.do_QV, (0, 0))
    dwritten_QV += chunk.product(chunk.k_QK, x.dafter_KV, (1, 0)) * out_Q1
    dout_QK = chunk.product(x.written_QV, x.dafter_KV, (1, 1)) * out_Q1
    return chunk.exact(x.inverse_QQ, dwritten_QV, (0, 0)), dout_QK


def _from_system(x: _Around, between_QQ: jax.Array, dright_QV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of A, dA = -dr u^T: (the gradient of k k^T, beta D dA; what adds up to that of beta, dA D k k^T)."""
    chunk = x.chunk
    within_QQ = jnp.where(chunk.mask.earlier_QQ, between_QQ, 0)
    overlap_QQ = chunk.product(chunk.k_QK, chunk.k_QK, (1, 1)) * within_QQ
    doverlap_QQ = -chunk.exact(dright_QV, x.written_QV, (1, 1))
    return doverlap_QQ * chunk.beta_Q1 * within_QQ, doverlap_QQ * overlap_QQ


def _from_known(x: _Around, dv_QV: jax.Array) -> jax.Array:
    """Of into k S: the keys' gradient through S, -into dv S^T."""
    return -x.chunk.product(dv_QV, x.before_KV, (1, 1)) * x.chunk.decay.into_QL[:, :1]


def _from_decays(x: _Around, over_QQ, dinto_QK, dknown_QK, dout_QK) -> jax.Array:
    """[1, Q], of totals: of pairs of tokens (`over_QQ`), from S to tokens, from tokens to S', and from S to S'."""
    chunk, decay = x.chunk, x.chunk.decay
    q_QK, k_QK = chunk.q_QK.astype(jnp.float32), chunk.k_QK.astype(jnp.float32)
    gone_Q1 = row_sum(dout_QK * k_QK)
    carried_11 = all_sum(x.dafter_KV * x.before_KV) * decay.carry(0)
    seen_Q1 = row_sum(dinto_QK * q_QK + dknown_QK * k_QK)
    rise_Q1 = row_sum(over_QQ) + seen_Q1 - gone_Q1 + at_last(column_sum(gone_Q1) + carried_11)
    return _row(rise_Q1) - column_sum(over_QQ)


def _before(x: _Around, dv_QV: jax.Array) -> jax.Array:
    """dS = carry dS' + q^T (into do) - k^T (into dv)."""
    chunk, into_Q1 = x.chunk, x.chunk.decay.into_QL[:, :1]
    from_found_KV = chunk.product(chunk.q_QK, x.do_QV * into_Q1, (0, 0))
    from_known_KV = chunk.product(chunk.k_QK, dv_QV * into_Q1, (0, 0))
    return x.dafter_KV * chunk.decay.carry(0) + from_found_KV - from_known_KV


def _row(column_Q1: jax.Array) -> jax.Array:
    """[1, Q]"""
    return in_lane(0, column_Q1).T[:1]

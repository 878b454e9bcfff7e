"""The backward kernel of the gated delta rule: blocks of tokens from the last to the first, with the state's gradient.

The forward pass left the state before each block and the inverse of each chunk's system, X = (1 + A)^-1; all else is
computed again. What is written is u = X r, so dr = X^T du and dA = -dr u^T. A decay's gradient is what passes over its
token: sums over tokens after it minus sums over tokens before it, of the same float32 numbers.
"""

# B batch, T tokens of a block, Q tokens of a chunk, C chunks of a block, H heads, I blocks of tokens
# K key width, V value width, L lanes (128)

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.chunk_tiles import CHUNK, all_sum, at_last, column_sum, cost, in_lane, product, row_sum
from model.kernels.delta_forward import DIMENSIONS, Plan, added, exact, new_values, of_chunk


def gradients(
    plan: Plan,
    q_BTE,
    k_BTE,
    v_BTF,
    totals_BH1T,
    beta_BH1T,
    documents_B1T,
    entering_BHIKV,
    inverses_BTX,
    do_BTF,
    dlast_BHKV,
) -> tuple[jax.Array, ...]:
    """Of queries, keys, values, totals, beta and the first state."""
    B, H = dlast_BHKV.shape[:2]
    I = q_BTE.shape[1] // plan.tokens
    back = lambda t: I - 1 - t
    keys, values, row, documents, inverses = plan.specs(back)
    inputs = q_BTE, k_BTE, v_BTF, totals_BH1T, beta_BH1T, documents_B1T
    inputs += entering_BHIKV, inverses_BTX, do_BTF, dlast_BHKV
    outputs = [
        jax.ShapeDtypeStruct(x.shape, x.dtype)
        for x in (q_BTE, k_BTE, v_BTF, totals_BH1T, beta_BH1T, dlast_BHKV)
    ]
    tokens = B * H * q_BTE.shape[1]
    multiplied = 5 * CHUNK * (plan.keys + plan.values) + 8 * plan.keys * plan.values  # for one
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(B, H, I),
        in_specs=[
            keys,
            keys,
            values,
            row,
            row,
            documents,
            plan.entering_spec(back),
            inverses,
            values,
            plan.state_spec(),
        ],
        out_specs=[keys, keys, values, row, row, plan.state_spec()],
        out_shape=outputs,
        scratch_shapes=[
            pltpu.VMEM((plan.keys, plan.values), jnp.float32),
            pltpu.VMEM((plan.tokens // CHUNK, plan.keys, plan.values), jnp.float32),
            pltpu.VMEM((plan.tokens, plan.values), jnp.float32),
            pltpu.VMEM((plan.tokens, plan.values), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=DIMENSIONS),
        cost_estimate=cost(tokens * multiplied, tokens, inputs, outputs),
        interpret=plan.interpret,
        name="delta_backward",
    )(*inputs)


def _kernel(
    plan: Plan,
    q_TK,
    k_TK,
    v_TV,
    totals_1T,
    beta_1T,
    documents_1T,
    entering_KV,
    inverses_TQ,
    do_TV,
    dlast_KV,
    dq_TK,
    dk_TK,
    dv_TV,
    dtotals_1T,
    dbeta_1T,
    dstart_KV,
    dstate_KV,
    states_CKV,
    new_TV,
    written_TV,
):
    multiply, chunks = functools.partial(product, dtype=k_TK.dtype), plan.tokens // CHUNK

    @pl.when(pl.program_id(2) == 0)
    def start():
        dstate_KV[...] = dlast_KV[...]

    states_CKV[0] = entering_KV[...]

    def again(at, _):
        here = pl.ds(pl.multiple_of(at * CHUNK, CHUNK), CHUNK)
        _, decay, beta_Q1 = of_chunk(totals_1T, beta_1T, documents_1T, here)
        new_QV = new_values(k_TK[here], v_TV[here], states_CKV[at], decay)
        written_QV = exact(inverses_TQ[here], beta_Q1 * new_QV, (1, 0), k_TK.dtype)
        new_TV[here], written_TV[here] = new_QV, written_QV

        @pl.when(at + 1 < chunks)
        def go_on():
            states_CKV[at + 1] = states_CKV[at] * decay.kept(0) + added(k_TK[here], written_QV, decay)

        return 0

    jax.lax.fori_loop(0, chunks, again, 0)

    def chunk(step, _):
        at = chunks - 1 - step
        here = pl.ds(pl.multiple_of(at * CHUNK, CHUNK), CHUNK)
        sees, decay, beta_Q1 = of_chunk(totals_1T, beta_1T, documents_1T, here)
        k_QK, q_QK, do_QV, written_QV = k_TK[here], q_TK[here], do_TV[here], written_TV[here]
        state_KV, d_KV, into_Q1, out_Q1 = (
            states_CKV[at],
            dstate_KV[...],
            decay.into_QL[:, :1],
            decay.out_QL[:, :1],
        )

        # what is found: queries meet the state before the chunk and what its tokens write
        between_QQ = decay.between(0, sees.pairs_QQ)
        products_QQ = multiply(q_QK, k_QK, (1, 1))
        scores_QQ = products_QQ * between_QQ
        dscores_QQ = multiply(do_QV, written_QV, (1, 1)) * between_QQ
        dinto_QK = multiply(do_QV, state_KV, (1, 1)) * into_Q1
        dq_TK[here] = (dinto_QK + multiply(dscores_QQ, k_QK, (1, 0))).astype(dq_TK.dtype)

        # what is written: into the chunk's own tokens and into the state after it
        dwritten_QV = multiply(scores_QQ, do_QV, (0, 0)) + multiply(k_QK, d_KV, (1, 0)) * out_Q1
        dout_QK = multiply(written_QV, d_KV, (1, 1)) * out_Q1
        dright_QV = exact(inverses_TQ[here], dwritten_QV, (0, 0), k_TK.dtype)
        dv_QV = beta_Q1 * dright_QV
        dv_TV[here] = dv_QV.astype(dv_TV.dtype)

        # the triangular system and what the state before the chunk knows
        within_QQ = jnp.where(sees.earlier_QQ, between_QQ, 0)
        overlap_QQ = multiply(k_QK, k_QK, (1, 1)) * within_QQ
        doverlap_QQ = -exact(dright_QV, written_QV, (1, 1), k_TK.dtype)
        dproducts_QQ = doverlap_QQ * beta_Q1 * within_QQ
        dknown_QK = -multiply(dv_QV, state_KV, (1, 1)) * into_Q1
        dk_QK = multiply(dscores_QQ, q_QK, (0, 0)) + dout_QK + dknown_QK
        dk_QK += multiply(dproducts_QQ + dproducts_QQ.T, k_QK, (1, 0))
        dk_TK[here] = dk_QK.astype(dk_TK.dtype)

        over_beta_QQ = doverlap_QQ * overlap_QQ
        over_QQ = jnp.where(sees.earlier_QQ, dscores_QQ * products_QQ, 0) + beta_Q1 * over_beta_QQ
        dbeta_Q1 = row_sum(over_beta_QQ) + row_sum(dright_QV * new_TV[here])
        gone_Q1 = row_sum(dout_QK * k_QK.astype(jnp.float32))
        seen_QK = dinto_QK * q_QK.astype(jnp.float32) + dknown_QK * k_QK.astype(jnp.float32)
        kept_11 = all_sum(d_KV * state_KV) * decay.kept(0)
        rise_Q1 = row_sum(over_QQ) + row_sum(seen_QK) - gone_Q1 + at_last(column_sum(gone_Q1) + kept_11)
        upright_1Q = in_lane(0, rise_Q1).T[:1]
        dtotals_1T[:, here] = upright_1Q - column_sum(over_QQ)
        dbeta_1T[:, here] = in_lane(0, dbeta_Q1).T[:1]

        from_found_KV = multiply(q_QK, do_QV * into_Q1, (0, 0))
        from_known_KV = multiply(k_QK, dv_QV * into_Q1, (0, 0))
        dstate_KV[...] = d_KV * decay.kept(0) + from_found_KV - from_known_KV
        return 0

    jax.lax.fori_loop(0, chunks, chunk, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def finish():
        dstart_KV[...] = dstate_KV[...]

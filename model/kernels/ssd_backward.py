"""The backward kernel of state-space duality: blocks of tokens from the last to the first, with the state's gradient.

The forward pass left the state before each block; those before its chunks, and all within a chunk, are computed again.
A decay's gradient is what passes over its token: sums over tokens after it minus sums over tokens before it, of the
same float32 numbers, so that what cancels does so exactly.
"""

# B batch, T tokens of a block, Q tokens of a chunk, R heads of a block, J blocks of heads of a walk, W walks
# I blocks of tokens, C chunks of a block, P value width, N key (state) width, F = R P channels, L lanes (128)

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.chunk_tiles import (
    CHUNK,
    LANES,
    all_sum,
    at_last,
    column_sum,
    cost,
    decays,
    in_lane,
    in_row,
    product,
    row_sum,
    sight,
)
from model.kernels.ssd_forward import DIMENSIONS, Plan, added


def gradients(
    plan: Plan, v_BTF, totals_BMRT, k_BTE, q_BTE, documents_B1T, entering_BINF, dy_BTF, dlast_BNF
) -> tuple[jax.Array, ...]:
    """Of values, totals, keys and queries (both a walk's part of them, [B, W, T, N] float32), and the first state."""
    (B, T, F), N = v_BTF.shape, dlast_BNF.shape[1]
    grid = plan.grid(B, T)
    W, I, J = grid[1:]
    back = lambda t: I - 1 - t
    values, totals, keys, documents = plan.specs(N, back)
    key_parts = pl.BlockSpec((None, None, plan.tokens, N), lambda b, w, t, j: (b, w, back(t), 0))
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    multiplied = 3 * W * J * CHUNK * N + F * (2 * CHUNK + 5 * N)  # for a token
    inputs = v_BTF, totals_BMRT, k_BTE, q_BTE, documents_B1T, entering_BINF, dy_BTF, dlast_BNF
    outputs = [
        jax.ShapeDtypeStruct(v_BTF.shape, v_BTF.dtype),
        float32(*totals_BMRT.shape),
        float32(B, W, T, N),
        float32(B, W, T, N),
        float32(B, N, F),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=grid,
        in_specs=[
            values,
            totals,
            keys,
            keys,
            documents,
            plan.entering_spec(N, back),
            values,
            plan.state_spec(N, 0, J - 1),
        ],
        out_specs=[values, totals, key_parts, key_parts, plan.state_spec(N, I - 1, 0)],
        out_shape=outputs,
        scratch_shapes=[
            pltpu.VMEM((J, N, plan.channels), jnp.float32),
            pltpu.VMEM((plan.tokens // CHUNK, N, plan.channels), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=DIMENSIONS),
        cost_estimate=cost(B * T * multiplied, B * T * F // plan.width, inputs, outputs),
        interpret=plan.interpret,
        name="ssd_backward",
    )(*inputs)


def _kernel(
    plan: Plan,
    v_TF,
    totals_RT,
    k_TN,
    q_TN,
    documents_1T,
    entering_NF,
    dy_TF,
    dlast_NF,
    dv_TF,
    dtotals_RT,
    dk_TN,
    dq_TN,
    dstart_NF,
    dstates_JNF,
    states_CNF,
):
    t, j, chunks = pl.program_id(2), pl.program_id(3), plan.tokens // CHUNK
    dstate_NF, multiply = dstates_JNF.at[j], functools.partial(product, dtype=k_TN.dtype)

    @pl.when(t == 0)
    def start():
        dstate_NF[...] = dlast_NF[...]

    @pl.when(j == 0)
    def start_sums():
        dk_TN[...] = jnp.zeros_like(dk_TN)
        dq_TN[...] = jnp.zeros_like(dq_TN)

    def of_chunk(at):
        here = pl.ds(pl.multiple_of(at * CHUNK, CHUNK), CHUNK)
        sees = sight(documents_1T[:, here])
        return here, sees, decays(totals_RT[:, here], sees)

    states_CNF[0] = entering_NF[...]

    def again(at, _):
        here, _, decay = of_chunk(at)
        for h in range(plan.heads):
            head = plan.head(h)
            new_NP = added(k_TN[here], v_TF[here, head], decay.out_QL[:, h : h + 1])
            states_CNF[at + 1, :, head] = states_CNF[at, :, head] * decay.kept(h) + new_NP
        return 0

    jax.lax.fori_loop(0, chunks - 1, again, 0)

    def chunk(step, _):
        at = chunks - 1 - step
        here, sees, decay = of_chunk(at)
        k_QN, q_QN = k_TN[here], q_TN[here]
        k32_QN, q32_QN = k_QN.astype(jnp.float32), q_QN.astype(jnp.float32)
        scores_QQ = multiply(q_QN, k_QN, (1, 1))
        dscores_QQ = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        dk_QN, dq_QN = jnp.zeros(k_QN.shape, jnp.float32), jnp.zeros(q_QN.shape, jnp.float32)
        rises_QL, falls_RQ = (
            jnp.zeros((CHUNK, LANES), jnp.float32),
            jnp.zeros((plan.heads, CHUNK), jnp.float32),
        )
        for h in range(plan.heads):
            head = plan.head(h)
            v_QP, dy_QP, dstate_NP = v_TF[here, head], dy_TF[here, head], dstate_NF[:, head]
            state_NP, into_Q1, out_Q1 = (
                states_CNF[at, :, head],
                decay.into_QL[:, h : h + 1],
                decay.out_QL[:, h : h + 1],
            )
            between_QQ = decay.between(h, sees.pairs_QQ)
            weights_QQ = scores_QQ * between_QQ
            dweights_QQ = multiply(dy_QP, v_QP, (1, 1))
            dscores_QQ += dweights_QQ * between_QQ
            dv_QP = multiply(weights_QQ, dy_QP, (0, 0)) + multiply(k_QN, dstate_NP, (1, 0)) * out_Q1
            dv_TF[here, head] = dv_QP.astype(dv_TF.dtype)
            dinto_QN = multiply(dy_QP, state_NP, (1, 1)) * into_Q1
            dout_QN = multiply(v_QP, dstate_NP, (1, 1)) * out_Q1
            dq_QN, dk_QN = dq_QN + dinto_QN, dk_QN + dout_QN

            over_QQ = jnp.where(sees.earlier_QQ, weights_QQ * dweights_QQ, 0)
            gone_Q1 = row_sum(dout_QN * k32_QN)
            kept_11 = all_sum(dstate_NP * state_NP) * decay.kept(h)
            rise_Q1 = row_sum(over_QQ) + row_sum(dinto_QN * q32_QN) - gone_Q1
            rises_QL += in_lane(h, rise_Q1 + at_last(column_sum(gone_Q1) + kept_11))
            falls_RQ += in_row(h, plan.heads, column_sum(over_QQ))
            dstate_NF[:, head] = dstate_NP * decay.kept(h) + multiply(q_QN, dy_QP * into_Q1, (0, 0))
        dtotals_RT[:, here] = rises_QL.T[: plan.heads] - falls_RQ
        dq_TN[here] += dq_QN + multiply(dscores_QQ, k_QN, (1, 0))
        dk_TN[here] += dk_QN + multiply(dscores_QQ, q_QN, (0, 0))
        return 0

    jax.lax.fori_loop(0, chunks, chunk, 0)

    @pl.when(t == pl.num_programs(2) - 1)
    def finish():
        dstart_NF[...] = dstate_NF[...]

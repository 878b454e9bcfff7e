"""The backward kernels of flash attention: scores are computed again, once for the gradients of queries and once
for those of keys and values. Algorithm 2 of Dao 2023, arXiv:2307.08691.

With d = dout . value and delta = dout . out - dlse, the gradient of a score is weight * (d - delta).
"""

# B batch, H query heads, K key/value heads, T queries, S keys, C width of a query and a key, E width of a value
# Q queries of a block, N keys of a block, L lanes of a vector (128)

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.attention.tpu_blocks import (
    LANES,
    MASKED,
    Bounds,
    FlashCall,
    across,
    all_seen,
    allows,
    capped,
    column,
    key_block,
    product,
    query_block,
    through_cap,
)


def query_gradients(
    call: FlashCall, bounds: Bounds, q_BHTC, k_BKSC, v_BKSE, ids, dout_BHTE, lse_BH1T, delta_BH1T
) -> jax.Array:
    """[B, H, T, C]; each block of queries goes through its blocks of keys."""
    (B, H, _, C), E = q_BHTC.shape, v_BKSE.shape[3]
    Q, N = call.tiles.queries, call.tiles.keys

    def of_queries(b, h, i, step, *bounds):
        return b, h, i, 0

    def of_keys(b, h, i, step, *bounds):
        return b, jax.lax.div(h, call.group), key_block(call, Bounds(*bounds), b, i, step)[0], 0

    def key_ids(b, h, i, step, *bounds):
        return b, 0, key_block(call, Bounds(*bounds), b, i, step)[0]

    row = pl.BlockSpec((None, None, 1, Q), lambda b, h, i, step, *bounds: (b, h, 0, i))
    query_ids = pl.BlockSpec((None, 1, Q), lambda b, h, i, step, *bounds: (b, 0, i))
    id_specs = (query_ids, pl.BlockSpec((None, 1, N), key_ids))
    return pl.pallas_call(
        functools.partial(_query_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(bounds),
            grid=(B, H, call.query_blocks, call.key_steps()),
            in_specs=[
                pl.BlockSpec((None, None, Q, C), of_queries),
                pl.BlockSpec((None, None, N, C), of_keys),
                pl.BlockSpec((None, None, N, E), of_keys),
                None if ids is None else id_specs,
                pl.BlockSpec((None, None, Q, E), of_queries),
                row,
                row,
            ],
            out_specs=pl.BlockSpec((None, None, Q, C), of_queries),
            scratch_shapes=[
                pltpu.VMEM((Q, C), jnp.float32),
                pltpu.VMEM((Q, LANES), jnp.float32),
                pltpu.VMEM((Q, LANES), jnp.float32),
                None if ids is None else pltpu.VMEM((Q, LANES), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BHTC.shape, q_BHTC.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=call.cost(B * H, 2 * C + E, ((C + E, k_BKSC.dtype, Q),), (q_BHTC, q_BHTC, dout_BHTE)),
        interpret=call.interpret,
        name="flash_query_gradients",
    )(*bounds, q_BHTC, k_BKSC, v_BKSE, ids, dout_BHTE, lse_BH1T, delta_BH1T)


def _query_kernel(call: FlashCall, *refs):
    bounds = Bounds(*refs[: len(Bounds._fields)])
    q_QC, k_NC, v_NE, ids, dout_QE, lse_1Q, delta_1Q, dq_QC, sum_QC, lse_QL, delta_QL, query_ids_QL = refs[
        len(bounds) :
    ]
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    j, needed = key_block(call, bounds, b, i, step)
    Q, N = call.tiles.queries, call.tiles.keys

    @pl.when(step == 0)
    def start():
        sum_QC[...] = jnp.zeros_like(sum_QC)
        lse_QL[...] = column(lse_1Q[...])
        delta_QL[...] = column(delta_1Q[...])
        if ids is not None:
            query_ids_QL[...] = column(ids[0][...])

    def add(mask):
        scores_QN = capped(call, product(q_QC[...], k_NC[...], (1, 1)))
        weights_QN = jnp.exp(mask(scores_QN) - across(lse_QL[...], N))
        dweights_QN = product(dout_QE[...], v_NE[...], (1, 1))
        dscores_QN = through_cap(call, scores_QN, weights_QN * (dweights_QN - across(delta_QL[...], N)))
        sum_QC[...] += product(dscores_QN.astype(k_NC.dtype), k_NC[...], (1, 0))

    def mask(scores_QN):
        seen_QN = allows(call, bounds, i, j, (Q, N), query_axis=0)
        if ids is not None:
            seen_QN &= across(query_ids_QL[...], N) == ids[1][...]
        return jnp.where(seen_QN, scores_QN, MASKED)

    whole = all_seen(call, bounds, b, i, j)
    pl.when(needed & whole)(lambda: add(lambda scores_QN: scores_QN))
    pl.when(needed & ~whole)(lambda: add(mask))

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        dq_QC[...] = (sum_QC[...] * call.scale).astype(dq_QC.dtype)


def key_value_gradients(
    call: FlashCall, bounds: Bounds, q_BHTC, k_BKSC, v_BKSE, ids, dout_BHTE, lse_BH1T, delta_BH1T
) -> tuple[jax.Array, jax.Array]:
    """([B, K, S, C], [B, K, S, E]); each block of keys goes through the query heads of its group and, of each, through
    the blocks of queries that see it."""
    (B, K, _, C), E = k_BKSC.shape, v_BKSE.shape[3]
    Q, N = call.tiles.queries, call.tiles.keys

    def of_queries(b, k, j, g, step, *bounds):
        return b, k * call.group + g, query_block(call, Bounds(*bounds), b, j, step)[0], 0

    def row_of_queries(b, k, j, g, step, *bounds):
        return b, k * call.group + g, 0, query_block(call, Bounds(*bounds), b, j, step)[0]

    def of_keys(b, k, j, g, step, *bounds):
        return b, k, j, 0

    def query_ids(b, k, j, g, step, *bounds):
        return b, 0, query_block(call, Bounds(*bounds), b, j, step)[0]

    row = pl.BlockSpec((None, None, 1, Q), row_of_queries)
    key_ids = pl.BlockSpec((None, 1, N), lambda b, k, j, g, step, *bounds: (b, 0, j))
    id_specs = (pl.BlockSpec((None, 1, Q), query_ids), key_ids)
    keys, values = pl.BlockSpec((None, None, N, C), of_keys), pl.BlockSpec((None, None, N, E), of_keys)
    return pl.pallas_call(
        functools.partial(_key_value_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(bounds),
            grid=(B, K, call.key_blocks, call.group, call.query_steps()),
            in_specs=[
                pl.BlockSpec((None, None, Q, C), of_queries),
                keys,
                values,
                None if ids is None else id_specs,
                pl.BlockSpec((None, None, Q, E), of_queries),
                row,
                row,
            ],
            out_specs=[keys, values],
            scratch_shapes=[
                pltpu.VMEM((N, C), jnp.float32),
                pltpu.VMEM((N, E), jnp.float32),
                None if ids is None else pltpu.VMEM((N, LANES), jnp.int32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BKSC, v_BKSE)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=call.cost(
            *(B * K * call.group, 2 * (C + E), ((C + E, q_BHTC.dtype, N),)),
            (k_BKSC, v_BKSE, k_BKSC, v_BKSE),
        ),
        interpret=call.interpret,
        name="flash_key_value_gradients",
    )(*bounds, q_BHTC, k_BKSC, v_BKSE, ids, dout_BHTE, lse_BH1T, delta_BH1T)


def _key_value_kernel(call: FlashCall, *refs):
    """Keys down, queries across, so one number a query is a row, as in memory."""
    bounds = Bounds(*refs[: len(Bounds._fields)])
    q_QC, k_NC, v_NE, ids, dout_QE, lse_1Q, delta_1Q, dk_NC, dv_NE, sum_NC, sum_NE, key_ids_NL = refs[
        len(bounds) :
    ]
    b, j, g, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    i, needed = query_block(call, bounds, b, j, step)
    Q, N = call.tiles.queries, call.tiles.keys

    @pl.when((g == 0) & (step == 0))
    def start():
        sum_NC[...] = jnp.zeros_like(sum_NC)
        sum_NE[...] = jnp.zeros_like(sum_NE)
        if ids is not None:
            key_ids_NL[...] = column(ids[1][...])

    def add(mask):
        scores_NQ = capped(call, product(k_NC[...], q_QC[...], (1, 1)))
        weights_NQ = jnp.exp(mask(scores_NQ) - lse_1Q[...])
        dweights_NQ = product(v_NE[...], dout_QE[...], (1, 1))
        dscores_NQ = through_cap(call, scores_NQ, weights_NQ * (dweights_NQ - delta_1Q[...]))
        sum_NE[...] += product(weights_NQ.astype(dout_QE.dtype), dout_QE[...], (1, 0))
        sum_NC[...] += product(dscores_NQ.astype(q_QC.dtype), q_QC[...], (1, 0))

    def mask(scores_NQ):
        seen_NQ = allows(call, bounds, i, j, (N, Q), query_axis=1)
        if ids is not None:
            seen_NQ &= across(key_ids_NL[...], Q) == ids[0][...]
        return jnp.where(seen_NQ, scores_NQ, MASKED)

    whole = all_seen(call, bounds, b, i, j)
    pl.when(needed & whole)(lambda: add(lambda scores_NQ: scores_NQ))
    pl.when(needed & ~whole)(lambda: add(mask))

    @pl.when((g == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def finish():
        dk_NC[...] = (sum_NC[...] * call.scale).astype(dk_NC.dtype)
        dv_NE[...] = sum_NE[...].astype(dv_NE.dtype)

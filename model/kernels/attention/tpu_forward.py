"""The forward kernel of flash attention: a block of queries goes through its blocks of keys.

Algorithm 1 of Dao 2023, arXiv:2307.08691: each query has a running maximum and sum of its weights, and sums
shrink when the maximum grows.
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
    LEAST,
    MASKED,
    NO_KEY,
    Bounds,
    FlashCall,
    across,
    all_seen,
    allows,
    capped,
    column,
    key_block,
    product,
)


def forward(call: FlashCall, bounds: Bounds, q_BHTC, k_BKSC, v_BKSE, ids) -> tuple[jax.Array, jax.Array]:
    """(out [B, H, T, E], log-sum-exp [B, H, 1, T] float32)."""
    (B, H, T, C), E = q_BHTC.shape, v_BKSE.shape[3]
    Q, N = call.tiles.queries, call.tiles.keys

    def of_queries(b, h, i, step, *bounds):
        return b, h, i, 0

    def of_keys(b, h, i, step, *bounds):
        return b, jax.lax.div(h, call.group), key_block(call, Bounds(*bounds), b, i, step)[0], 0

    def query_ids(b, h, i, step, *bounds):
        return b, 0, i

    def key_ids(b, h, i, step, *bounds):
        return b, 0, key_block(call, Bounds(*bounds), b, i, step)[0]

    id_specs = (pl.BlockSpec((None, 1, Q), query_ids), pl.BlockSpec((None, 1, N), key_ids))
    out = jax.ShapeDtypeStruct((B, H, T, E), q_BHTC.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(bounds),
            grid=(B, H, call.query_blocks, call.key_steps()),
            in_specs=[
                pl.BlockSpec((None, None, Q, C), of_queries),
                pl.BlockSpec((None, None, N, C), of_keys),
                pl.BlockSpec((None, None, N, E), of_keys),
                None if ids is None else id_specs,
            ],
            out_specs=[
                pl.BlockSpec((None, None, Q, E), of_queries),
                pl.BlockSpec((None, None, 1, Q), lambda b, h, i, step, *bounds: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((Q, LANES), jnp.float32),
                pltpu.VMEM((Q, LANES), jnp.float32),
                pltpu.VMEM((Q, E), jnp.float32),
                None if ids is None else pltpu.VMEM((Q, LANES), jnp.int32),
            ],
        ),
        out_shape=[out, jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=call.cost(B * H, C + E, ((C + E, k_BKSC.dtype, Q),), (q_BHTC, out)),
        interpret=call.interpret,
        name="flash_forward",
    )(*bounds, q_BHTC, k_BKSC, v_BKSE, ids)


def _kernel(call: FlashCall, *refs):
    bounds = Bounds(*refs[: len(Bounds._fields)])
    q_QC, k_NC, v_NE, ids, out_QE, lse_1Q, top_QL, total_QL, sum_QE, query_ids_QL = refs[len(bounds) :]
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    j, needed = key_block(call, bounds, b, i, step)
    Q, N, E = call.tiles.queries, call.tiles.keys, v_NE.shape[1]

    @pl.when(step == 0)
    def start():
        top_QL[...] = jnp.full_like(top_QL, LEAST)
        total_QL[...] = jnp.zeros_like(total_QL)
        sum_QE[...] = jnp.zeros_like(sum_QE)
        if ids is not None:
            query_ids_QL[...] = column(ids[0][...])

    def add(scores_QN):
        before_QL = top_QL[...]
        top_QL[...] = jnp.maximum(before_QL, scores_QN.max(axis=1, keepdims=True))
        weights_QN = jnp.exp(scores_QN - across(top_QL[...], N))
        shrink_QL = jnp.exp(before_QL - top_QL[...])
        total_QL[...] = total_QL[...] * shrink_QL + weights_QN.sum(axis=1, keepdims=True)
        added_QE = product(weights_QN.astype(v_NE.dtype), v_NE[...], (1, 0))
        sum_QE[...] = sum_QE[...] * across(shrink_QL, E) + added_QE

    def scores():
        return capped(call, product(q_QC[...], k_NC[...], (1, 1)))

    whole = all_seen(call, bounds, b, i, j)

    @pl.when(needed & whole)
    def add_all():
        add(scores())

    @pl.when(needed & ~whole)
    def add_seen():
        seen_QN = allows(call, bounds, i, j, (Q, N), query_axis=0)
        if ids is not None:
            seen_QN &= across(query_ids_QL[...], N) == ids[1][...]
        add(jnp.where(seen_QN, scores(), MASKED))

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        some_QL = total_QL[...] > 0
        total = jnp.where(some_QL, total_QL[...], 1.0)
        out_QE[...] = (sum_QE[...] / across(total, E)).astype(out_QE.dtype)
        lse_QL = jnp.where(some_QL, top_QL[...] + jnp.log(total), NO_KEY)
        lse_1Q[...] = lse_QL.T[:1]

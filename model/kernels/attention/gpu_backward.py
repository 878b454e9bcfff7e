"""The backward kernels of flash attention for GPUs, in Pallas through Triton: scores are computed again, once for the
gradients of queries and once for those of keys and values, so that no two programs add to one number. Algorithm 2 of
Dao 2023, arXiv:2307.08691.

With d = dout . value and delta = dout . out - dlse, the gradient of a score is weight * (d - delta).
"""

# B batch, H query heads, K key/value heads, T queries, S keys, C width of a query and a key, E width of a value
# I blocks of queries, J blocks of keys, Q queries of a tile, N keys of a tile

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.kernels.attention.gpu_blocks import (
    LOG2_E,
    FlashCall,
    add_products,
    masked_scores,
    over_tiles,
    product,
    read,
    scores,
    seen,
    slices,
    write,
)


def query_gradients(
    call: FlashCall, ranges_BI4, offset_1, q_BTHC, k_BSKC, v_BSKE, ids, dout_BTHE, lse_BHT, delta_BHT
) -> jax.Array:
    """[B, T, H, C]; each block of queries goes through its tiles of keys."""
    (B, T, H, C), (S, E) = q_BTHC.shape, (v_BSKE.shape[1], v_BSKE.shape[3])
    tile = call.tiles.query_gradients
    of_queries, of_keys = (
        (lambda i, h, b: (b, i, h, 0)),
        (lambda i, h, b: (b, 0, jax.lax.div(h, call.group), 0)),
    )
    row = pl.BlockSpec((None, None, tile.queries), lambda i, h, b: (b, h, i))
    query_ids = pl.BlockSpec((None, tile.queries), lambda i, h, b: (b, i))
    return pl.pallas_call(
        functools.partial(_query_kernel, call),
        grid=(T // tile.queries, H, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0)),
            pl.BlockSpec((1,), lambda i, h, b: (0,)),
            pl.BlockSpec((None, tile.queries, None, C), of_queries),
            pl.BlockSpec((None, S, None, C), of_keys),
            pl.BlockSpec((None, S, None, E), of_keys),
            None if ids is None else (query_ids, pl.BlockSpec((None, S), lambda i, h, b: (b, 0))),
            pl.BlockSpec((None, tile.queries, None, E), of_queries),
            row,
            row,
        ],
        out_specs=pl.BlockSpec((None, tile.queries, None, C), of_queries),
        out_shape=jax.ShapeDtypeStruct(q_BTHC.shape, q_BTHC.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=call.interpret,
        name="flash_query_gradients_gpu",
    )(ranges_BI4, offset_1, q_BTHC, k_BSKC, v_BSKE, ids, dout_BTHE, lse_BHT, delta_BHT)


def _query_kernel(call: FlashCall, ranges_4, offset_1, q_QC, k_SC, v_SE, ids, dout_QE, lse_Q, delta_Q, dq_QC):
    Q, N = call.tiles.query_gradients.queries, call.tiles.query_gradients.keys
    query_Q = pl.program_id(0) * Q + offset_1[0] + jnp.arange(Q)
    query_ids_Q1 = None if ids is None else ids[0][...][:, None]
    q, dout = read(q_QC, slice(None)), read(dout_QE, slice(None))
    lse_Q1, delta_Q1 = lse_Q[...][:, None] * LOG2_E, delta_Q[...][:, None]

    def step(j, needs_mask, sums_QC):
        keys = pl.ds(j * N, N)
        k = read(k_SC, keys)
        scores_QN, slope_QN = scores(call, product(q, k))
        if needs_mask:
            key_1N = (j * N + jnp.arange(N))[None]
            key_ids_1N = None if ids is None else ids[1][keys][None]
            scores_QN = masked_scores(
                seen(call, query_Q[:, None], key_1N, query_ids_Q1, key_ids_1N), scores_QN
            )
        weights_QN = jnp.exp2(scores_QN - lse_Q1)
        dscores_QN = weights_QN * (product(dout, read(v_SE, keys)) - delta_Q1)
        if slope_QN is not None:
            dscores_QN *= slope_QN
        return add_products(sums_QC, dscores_QN, k)

    sums_QC = [jnp.zeros((Q, part.stop - part.start), jnp.float32) for part in slices(q_QC.shape[1])]
    write(dq_QC, [x * call.scale for x in over_tiles(ranges_4, step, sums_QC)])


def key_value_gradients(
    call: FlashCall, ranges_BJ4, offset_1, q_BTHC, k_BSKC, v_BSKE, ids, dout_BTHE, lse_BHT, delta_BHT
) -> tuple[jax.Array, jax.Array]:
    """([B, S, K, C], [B, S, K, E]); each block of keys goes through the query heads of its group and, of each, through
    the tiles of queries that see it."""
    (B, S, K, C), (T, E) = k_BSKC.shape, (q_BTHC.shape[1], v_BSKE.shape[3])
    tile = call.tiles.key_value_gradients
    of_keys, of_queries = (lambda j, k, b: (b, j, k, 0)), (lambda j, k, b: (b, 0, k, 0))
    row = pl.BlockSpec((None, call.group, T), lambda j, k, b: (b, k, 0))
    keys, values = (pl.BlockSpec((None, tile.keys, None, width), of_keys) for width in (C, E))
    id_specs = (
        pl.BlockSpec((None, T), lambda j, k, b: (b, 0)),
        pl.BlockSpec((None, tile.keys), lambda j, k, b: (b, j)),
    )
    return pl.pallas_call(
        functools.partial(_key_value_kernel, call),
        grid=(S // tile.keys, K, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda j, k, b: (b, j, 0)),
            pl.BlockSpec((1,), lambda j, k, b: (0,)),
            pl.BlockSpec((None, T, call.group, C), of_queries),
            keys,
            values,
            None if ids is None else id_specs,
            pl.BlockSpec((None, T, call.group, E), of_queries),
            row,
            row,
        ],
        out_specs=[keys, values],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSKC, v_BSKE)],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=call.interpret,
        name="flash_key_value_gradients_gpu",
    )(ranges_BJ4, offset_1, q_BTHC, k_BSKC, v_BSKE, ids, dout_BTHE, lse_BHT, delta_BHT)


def _key_value_kernel(
    call: FlashCall, ranges_4, offset_1, q_TGC, k_NC, v_NE, ids, dout_TGE, lse_GT, delta_GT, *out
):
    """Keys down, queries across, so that weights are multiplied as they lie in registers."""
    Q, N = call.tiles.key_value_gradients.queries, call.tiles.key_value_gradients.keys
    key_N1 = (pl.program_id(0) * N + jnp.arange(N))[:, None]
    key_ids_N1 = None if ids is None else ids[1][...][:, None]
    k, v = read(k_NC, slice(None)), read(v_NE, slice(None))

    def step(g, i, needs_mask, carry):
        sums_NC, sums_NE = carry
        queries = pl.ds(i * Q, Q)
        q, dout = read(q_TGC, queries, g), read(dout_TGE, queries, g)
        scores_NQ, slope_NQ = scores(call, product(k, q))
        if needs_mask:
            query_1Q = (i * Q + offset_1[0] + jnp.arange(Q))[None]
            query_ids_1Q = None if ids is None else ids[0][queries][None]
            scores_NQ = masked_scores(seen(call, query_1Q, key_N1, query_ids_1Q, key_ids_N1), scores_NQ)
        weights_NQ = jnp.exp2(scores_NQ - lse_GT[g, queries][None] * LOG2_E)
        dscores_NQ = weights_NQ * (product(v, dout) - delta_GT[g, queries][None])
        if slope_NQ is not None:
            dscores_NQ *= slope_NQ
        return add_products(sums_NC, dscores_NQ, q), add_products(sums_NE, weights_NQ, dout)

    def head(g, carry):
        return over_tiles(ranges_4, functools.partial(step, g), carry)

    zeros = lambda ref: [jnp.zeros((N, part.stop - part.start), jnp.float32) for part in slices(ref.shape[1])]
    dk, dv = jax.lax.fori_loop(0, call.group, head, (zeros(k_NC), zeros(v_NE)))
    write(out[0], [x * call.scale for x in dk])
    write(out[1], dv)

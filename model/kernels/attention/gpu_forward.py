"""The forward kernel of flash attention for GPUs, in Pallas through Triton: a block of queries goes through its tiles
of keys. Algorithm 1 of Dao 2023, arXiv:2307.08691.
"""

# B batch, H query heads, K key/value heads, T queries, S keys, C width of a query and a key, E width of a value
# I blocks of queries, Q queries of a tile, N keys of a tile

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
from model.kernels.attention.tpu_blocks import LEAST, NO_KEY


def forward(
    call: FlashCall, ranges_BI4, offset_1, q_BTHC, k_BSKC, v_BSKE, ids
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, H, E], log-sum-exp [B, H, T] float32)."""
    (B, T, H, C), (S, E) = q_BTHC.shape, (v_BSKE.shape[1], v_BSKE.shape[3])
    tile = call.tiles.forward
    of_keys = lambda i, h, b: (b, 0, jax.lax.div(h, call.group), 0)
    query_ids = pl.BlockSpec((None, tile.queries), lambda i, h, b: (b, i))
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid=(T // tile.queries, H, B),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0)),
            pl.BlockSpec((1,), lambda i, h, b: (0,)),
            pl.BlockSpec((None, tile.queries, None, C), lambda i, h, b: (b, i, h, 0)),
            pl.BlockSpec((None, S, None, C), of_keys),
            pl.BlockSpec((None, S, None, E), of_keys),
            None if ids is None else (query_ids, pl.BlockSpec((None, S), lambda i, h, b: (b, 0))),
        ],
        out_specs=[
            pl.BlockSpec((None, tile.queries, None, E), lambda i, h, b: (b, i, h, 0)),
            pl.BlockSpec((None, None, tile.queries), lambda i, h, b: (b, h, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, T, H, E), q_BTHC.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=call.interpret,
        name="flash_forward_gpu",
    )(ranges_BI4, offset_1, q_BTHC, k_BSKC, v_BSKE, ids)


def _kernel(call: FlashCall, ranges_4, offset_1, q_QC, k_SC, v_SE, ids, out_QE, lse_Q):
    Q, N = call.tiles.forward.queries, call.tiles.forward.keys
    query_Q = pl.program_id(0) * Q + offset_1[0] + jnp.arange(Q)
    query_ids_Q1 = None if ids is None else ids[0][...][:, None]
    q = read(q_QC, slice(None))

    def step(j, needs_mask, carry):
        top_Q, total_Q, sums_QE = carry
        keys = pl.ds(j * N, N)
        scores_QN, _ = scores(call, product(q, read(k_SC, keys)))
        if needs_mask:
            key_1N = (j * N + jnp.arange(N))[None]
            key_ids_1N = None if ids is None else ids[1][keys][None]
            scores_QN = masked_scores(
                seen(call, query_Q[:, None], key_1N, query_ids_Q1, key_ids_1N), scores_QN
            )
        new_top_Q = jnp.maximum(top_Q, scores_QN.max(1))
        shrink_Q = jnp.exp2(top_Q - new_top_Q)
        weights_QN = jnp.exp2(scores_QN - new_top_Q[:, None])
        sums_QE = add_products([x * shrink_Q[:, None] for x in sums_QE], weights_QN, read(v_SE, keys))
        return new_top_Q, total_Q * shrink_Q + weights_QN.sum(1), sums_QE

    sums_QE = [jnp.zeros((Q, part.stop - part.start), jnp.float32) for part in slices(v_SE.shape[1])]
    start = jnp.full((Q,), LEAST, jnp.float32), jnp.zeros((Q,), jnp.float32), sums_QE
    top_Q, total_Q, sums_QE = over_tiles(ranges_4, step, start)
    some_Q = total_Q > 0
    total_Q = jnp.where(some_Q, total_Q, 1.0)
    write(out_QE, [x / total_Q[:, None] for x in sums_QE])
    lse_Q[...] = jnp.where(some_Q, top_Q / LOG2_E + jnp.log(total_Q), NO_KEY)

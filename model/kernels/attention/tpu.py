"""Flash attention for TPUs: exact attention in blocks, whose scores never leave the chip's fast memory.

Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691. The kernels are in tpu_forward and tpu_backward; here are
their arguments: heads before tokens, lengths that are multiples of the blocks, and for each block of queries the first
and the last block of keys that it needs.
"""

# B batch, T queries, S keys, H query heads, K key/value heads, C width of a query and a key, E width of a value

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.kernels.attention.tpu_backward import key_value_gradients, query_gradients
from model.kernels.attention.tpu_blocks import LANES, NO_KEY, FlashCall, TileSizes, block_bounds
from model.kernels.attention.tpu_forward import forward
from model.kernels.names import ATTENTION

# Sizes by chip. A block of keys and values is read once for each block of queries, at about as many flops a byte as
# the block has queries, so queries are as many as the chip has flops for a byte of its memory (v4 229, v5e 240,
# v5p 166, v6e 560, tpu7x 312) or more; 512 x 512 scores and their gradients in float32 fit the 16 MiB of a kernel
# on the smallest.
TILE_SIZES = {
    "v4": TileSizes(512, 512),
    "v5e": TileSizes(512, 512),
    "v5p": TileSizes(512, 512),
    "v6e": TileSizes(1024, 512),
    "tpu7x": TileSizes(512, 512),
}


def flash_attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKE: jax.Array,
    query_ids_BT: jax.Array | None = None,
    key_ids_BS: jax.Array | None = None,
    offset: int | jax.Array | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    span: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    tiles: TileSizes = TileSizes(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(outputs [B, T, H, E] in the dtype of `q`, log-sum-exp of its scores [B, H, T] float32).

    The output of a query that sees no key is zero, and its log-sum-exp `NO_KEY`. Both results have gradients.
    Parts that were computed for different keys are joined by their log-sum-exps, and so are sinks: see `with_sinks`.

    Args:
      query_ids_BT, key_ids_BS: int32; a query sees only keys of its own id (segments, chunks: see
        `mask.chunk_segment_ids`). None, both: all.
      offset: query i has the place of key i + offset; may be traced, and negative. None: queries are the last T of
        the S keys.
      window: a query sees no key `window` or more places away.
      span: no key of its id is `span` or more places away, so blocks of keys can be skipped. None: unknown.
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    check_shapes(q_BTHC, k_BSKC, v_BSKE, query_ids_BT, key_ids_BS)
    call = FlashCall(
        num_queries=T,
        num_keys=S,
        group=H // K,
        tiles=TileSizes(min(tiles.queries, _up(T, LANES)), min(tiles.keys, _up(S, LANES))),
        causal=causal,
        window=window,
        span=min((n for n in (window, span) if n is not None), default=None),
        scale=C**-0.5 if scale is None else scale,
        softcap=softcap,
        interpret=interpret,
    )
    at_queries = functools.partial(_padded, multiple=call.tiles.queries)
    at_keys = functools.partial(_padded, multiple=call.tiles.keys)
    q_BHTC, k_BKSC, v_BKSE = (x.swapaxes(1, 2) for x in (q_BTHC, k_BSKC, v_BSKE))
    ids = None
    if query_ids_BT is not None and key_ids_BS is not None:
        ids = (
            at_queries(query_ids_BT[:, None], axis=2, mode="edge"),
            at_keys(key_ids_BS[:, None], axis=2, mode="edge"),
        )
    offset = jnp.asarray(S - T if offset is None else offset, jnp.int32)
    arrays = at_queries(q_BHTC, axis=2), at_keys(k_BKSC, axis=2), at_keys(v_BKSE, axis=2)
    out_BHTE, lse_BH1T = _flash(call, *arrays, ids, offset)
    return out_BHTE[:, :, :T].swapaxes(1, 2), lse_BH1T[:, :, 0, :T]


def with_sinks(out_BTHE: jax.Array, lse_BHT: jax.Array, sinks_H: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The results of `flash_attention` with one more score a head, `sinks_H`, that gives nothing. Xiao et al. 2023,
    arXiv:2309.17453."""
    sinks_H1 = sinks_H.astype(jnp.float32)[:, None]
    share_BTH1 = jax.nn.sigmoid(lse_BHT - sinks_H1).swapaxes(1, 2)[..., None]
    return (out_BTHE * share_BTH1).astype(out_BTHE.dtype), jnp.logaddexp(lse_BHT, sinks_H1)


def _attend(call: FlashCall, q_BHTC, k_BKSC, v_BKSE, ids, offset) -> tuple[jax.Array, jax.Array]:
    return forward(call, block_bounds(call, ids, offset, len(q_BHTC)), q_BHTC, k_BKSC, v_BKSE, ids)


_flash = jax.custom_vjp(_attend, nondiff_argnums=(0,))


def _flash_forward(call: FlashCall, q_BHTC, k_BKSC, v_BKSE, ids, offset):
    found = _attend(call, q_BHTC, k_BKSC, v_BKSE, ids, offset)
    out_BHTE, lse_BH1T = (checkpoint_name(x, ATTENTION) for x in found)
    return (out_BHTE, lse_BH1T), (q_BHTC, k_BKSC, v_BKSE, ids, offset, out_BHTE, lse_BH1T)


def _flash_backward(call: FlashCall, saved, gradients):
    q_BHTC, k_BKSC, v_BKSE, ids, offset, out_BHTE, lse_BH1T = saved
    dout_BHTE, dlse_BH1T = gradients
    # d score = weight * (dout . value - dout . out + dlse); what does not depend on the key is summed here
    delta_BHT = jnp.einsum("BHTE,BHTE->BHT", dout_BHTE, out_BHTE, preferred_element_type=jnp.float32)
    delta_BH1T = delta_BHT[:, :, None] - dlse_BH1T
    lse_BH1T = jnp.where(lse_BH1T == NO_KEY, -NO_KEY, lse_BH1T)  # so that exp(score - lse) is 0, not infinite
    bounds = block_bounds(call, ids, offset, len(q_BHTC))
    inputs = q_BHTC, k_BKSC, v_BKSE, ids, dout_BHTE, lse_BH1T, delta_BH1T
    return query_gradients(call, bounds, *inputs), *key_value_gradients(call, bounds, *inputs), None, None


_flash.defvjp(_flash_forward, _flash_backward)


def check_shapes(q_BTHC, k_BSKC, v_BSKE, query_ids_BT, key_ids_BS) -> None:
    """ValueError where arguments of flash attention don't fit one another."""
    H, K = q_BTHC.shape[2], k_BSKC.shape[2]
    if H % K or k_BSKC.shape[:3] != v_BSKE.shape[:3] or q_BTHC.shape[3] != k_BSKC.shape[3]:
        raise ValueError(
            f"queries {q_BTHC.shape}, keys {k_BSKC.shape} and values {v_BSKE.shape} don't fit: [B, T, H, C], "
            "[B, S, K, C] and [B, S, K, E] with H a multiple of K are wanted."
        )
    if (query_ids_BT is None) != (key_ids_BS is None):
        raise ValueError("ids are given for queries or keys alone: give both or neither.")


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _padded(x: jax.Array, multiple: int, axis: int, mode: str = "constant") -> jax.Array:
    short = -x.shape[axis] % multiple
    widths = [(0, short if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, mode=mode) if short else x

"""Flash attention for GPUs by kernels of our own, in Pallas through Triton: Ampere, Hopper and later.

Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691. The kernels are in gpu_forward and gpu_backward; here are
their arguments. They read [B, T, H, C] as it lies, and no array of T x S numbers is in memory: packed rows are compared
by their ids within the kernel.
"""

# B batch, T queries, S keys, H query heads, K key/value heads, C width of a query and a key, E width of a value

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.kernels.attention.gpu_backward import key_value_gradients, query_gradients
from model.kernels.attention.gpu_blocks import LEAST_WIDTH, FlashCall, Tile, Tiles, tile_ranges
from model.kernels.attention.gpu_forward import forward
from model.kernels.attention.tpu import check_shapes
from model.kernels.attention.tpu_blocks import NO_KEY
from model.kernels.names import ATTENTION

WIDEST = 256  # of a query, a key or a value

# Tiles by bytes of a number and by the widest of query, key and value. They serve every GPU from Ampere on: no kernel
# takes more shared memory than the 99 KiB of a program on the small ones (sm_86, sm_89, sm_120; an A100 has 163, an
# H100 227). Shared memory holds what stays (queries; queries and dout; keys and values) and `stages` of what is
# streamed, so at width 128 the forward kernel has 32 KiB of queries and 2 * (16 + 16) KiB of keys and values. Sums stay
# in registers: 128 x 128 in float32 are 64 of a thread's 255 where 256 threads share them. Where a tile is wider its
# rows are fewer, by both bounds. Beside each: bytes of shared memory and registers of a thread, of the forward kernel,
# of gradients of queries and of keys and values, as Triton 3.9 compiles them for sm_90; a thread of none of them spills
# more than 24 bytes (`python -m benchmarks.gpu registers`).
TILES = {
    (2, 64): Tiles(  # 49408, 125; 49408, 125; 50432, 246
        Tile(128, 64, warps=8), Tile(64, 64, warps=4), Tile(64, 64, warps=4)
    ),
    (2, 128): Tiles(  # 98560, 237; 98560, 179; 65920, 211
        Tile(128, 64, warps=8), Tile(64, 64, warps=4), Tile(32, 64, warps=8)
    ),
    (2, 256): Tiles(  # 98432, 231; 67712, 128; 67968, 168
        Tile(64, 32, warps=8), Tile(32, 32, warps=8), Tile(32, 32, warps=8)
    ),
    (4, 64): Tiles(  # 49280, 156; 65664, 116; 65920, 207
        Tile(64, 32, warps=4), Tile(64, 32, warps=4), Tile(32, 64, warps=4)
    ),
    (4, 128): Tiles(  # 98432, 170; 82048, 165; 82304, 168
        Tile(64, 32, warps=8), Tile(32, 32, warps=4), Tile(32, 32, warps=4)
    ),
    (4, 256): Tiles(  # 67648, 127; 81984, 125; 82112, 203
        Tile(32, 16, warps=8), Tile(16, 16, warps=4), Tile(16, 16, warps=4)
    ),
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
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(outputs [B, T, H, E] in the dtype of `q`, log-sum-exp of its scores [B, H, T] float32).

    Arguments and results are those of `tpu.flash_attention`, which says more of them.

    Args:
      tiles: None: those of `TILES`.

    Raises:
      ValueError: shapes that don't fit, or widths and dtypes that `refusal` names.
    """
    check_shapes(q_BTHC, k_BSKC, v_BSKE, query_ids_BT, key_ids_BS)
    (T, H, C), (S, K, E) = q_BTHC.shape[1:], v_BSKE.shape[1:]
    if reason := refusal(C, E, q_BTHC.dtype):
        raise ValueError(f"flash attention for GPUs can't serve this: {reason}.")
    tiles = (tiles or _tiles(max(C, E), q_BTHC.dtype)).within(T, S)
    call = FlashCall(
        num_keys=S,
        group=H // K,
        tiles=tiles,
        causal=causal,
        window=window,
        span=min((n for n in (window, span) if n is not None), default=None),
        scale=C**-0.5 if scale is None else scale,
        softcap=softcap,
        interpret=interpret,
    )
    at_queries = functools.partial(_padded, length=max(tile.queries for tile in tiles))
    at_keys = functools.partial(_padded, length=max(tile.keys for tile in tiles))
    ids = None
    if query_ids_BT is not None and key_ids_BS is not None:
        ids = at_queries(query_ids_BT, mode="edge"), at_keys(key_ids_BS, mode="edge")
    offset = jnp.asarray(S - T if offset is None else offset, jnp.int32)
    wide = functools.partial(_padded, length=LEAST_WIDTH, axis=3)
    arrays = at_queries(wide(q_BTHC)), at_keys(wide(k_BSKC)), at_keys(wide(v_BSKE))
    out_BTHE, lse_BHT = _flash(call, *arrays, ids, offset)
    return out_BTHE[:, :T, :, :E], lse_BHT[:, :, :T]


def refusal(key_width: int, value_width: int, dtype: jnp.dtype) -> str | None:
    """Why heads of these widths and dtype can't be served, as a clause."""
    if max(key_width, value_width) > WIDEST:
        return (
            f"keys and values have widths {key_width} and {value_width}, and its tiles hold {WIDEST} at most"
        )
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it computes in bfloat16, float16 or float32, and this is {dtype}"
    return None


def _tiles(width: int, dtype: jnp.dtype) -> Tiles:
    return TILES[dtype.itemsize, next(n for n in (64, 128, WIDEST) if width <= n)]


def _attend(call: FlashCall, q_BTHC, k_BSKC, v_BSKE, ids, offset) -> tuple[jax.Array, jax.Array]:
    ranges_BI4, _ = _tile_ranges(call, call.tiles.forward, q_BTHC, k_BSKC, ids, offset)
    return forward(call, ranges_BI4, offset[None], q_BTHC, k_BSKC, v_BSKE, ids)


_flash = jax.custom_vjp(_attend, nondiff_argnums=(0,))


def _flash_forward(call: FlashCall, q_BTHC, k_BSKC, v_BSKE, ids, offset):
    found = _attend(call, q_BTHC, k_BSKC, v_BSKE, ids, offset)
    out_BTHE, lse_BHT = (checkpoint_name(x, ATTENTION) for x in found)
    return (out_BTHE, lse_BHT), (q_BTHC, k_BSKC, v_BSKE, ids, offset, out_BTHE, lse_BHT)


def _flash_backward(call: FlashCall, saved, gradients):
    q_BTHC, k_BSKC, v_BSKE, ids, offset, out_BTHE, lse_BHT = saved
    dout_BTHE, dlse_BHT = gradients
    # d score = weight * (dout . value - dout . out + dlse); what does not depend on the key is summed here
    delta_BHT = jnp.einsum("BTHE,BTHE->BHT", dout_BTHE, out_BTHE, preferred_element_type=jnp.float32)
    delta_BHT -= dlse_BHT
    lse_BHT = jnp.where(lse_BHT == NO_KEY, -NO_KEY, lse_BHT)  # so that exp(score - lse) is 0, not infinite
    ranges_BI4, _ = _tile_ranges(call, call.tiles.query_gradients, q_BTHC, k_BSKC, ids, offset)
    _, ranges_BJ4 = _tile_ranges(call, call.tiles.key_value_gradients, q_BTHC, k_BSKC, ids, offset)
    inputs = offset[None], q_BTHC, k_BSKC, v_BSKE, ids, dout_BTHE, lse_BHT, delta_BHT
    return (
        query_gradients(call, ranges_BI4, *inputs),
        *key_value_gradients(call, ranges_BJ4, *inputs),
        None,
        None,
    )


_flash.defvjp(_flash_forward, _flash_backward)


def _tile_ranges(call, tile, q_BTHC, k_BSKC, ids, offset):
    B, T = q_BTHC.shape[:2]
    return tile_ranges(call, tile, ids, (B, T, k_BSKC.shape[1]), offset)


def _padded(x: jax.Array, length: int, axis: int = 1, mode: str = "constant") -> jax.Array:
    short = -x.shape[axis] % length
    widths = [(0, short if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, mode=mode) if short else x

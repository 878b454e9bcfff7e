"""Pages of keys and values: their layout in memory, and how plain jnp writes tokens there and reads them.

A page has Z slots, and a slot has the concatenated channels of all heads, [N, Z, K * C]. A head's keys are then columns
of a matrix that a TPU multiplies without a copy, and heads of 64 channels, or a single head on a device, still fill a
vector's 128 lanes.

Quantized pages hold integers or small floats, with a scale for each token and head in pages beside them, [N, K, Z]
float32, as in KVQuant's per-token values (Hooper et al. 2024, arXiv:2401.18079). A token is quantized once, when it is
written.
"""

# B rows, T tokens, N pages, Z slots a page, P pages a row, S = P * Z slots a row, K heads, C channels of a head

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # of what a quantised number can be
SCALE = "_scale"  # after the name of quantised pages: their scales
CACHE_DTYPES = ("float32", "bfloat16", "float16", *LARGEST)


def is_quantized(dtype) -> bool:
    return jnp.dtype(dtype).name in LARGEST


def check_cache_dtype(dtype) -> None:
    """Raises ValueError for a dtype that pages do not support."""
    try:
        known = jnp.dtype(dtype).name in CACHE_DTYPES
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"cache_dtype={dtype!r}: keys and values are stored as one of {CACHE_DTYPES}.")


def empty_pages(
    name: str, num_pages: int, page_size: int, heads: int, width: int, dtype: jnp.dtype
) -> dict[str, jax.Array]:
    """{name: pages}, and their scales if they are quantized."""
    pages = {name: jnp.zeros((num_pages, page_size, heads * width), dtype)}
    if is_quantized(dtype):
        pages[name + SCALE] = jnp.zeros((num_pages, heads, page_size), jnp.float32)
    return pages


def row_by_row(pages: jax.Array | jax.ShapeDtypeStruct, sharding: Sharding) -> Format:
    """The layout of pages as arguments and results of a program: row-major, without gaps.

    By default the compiler for TPUs transposes pages with slots that do not fill whole vectors (64 channels of a
    rotated key, or 3 heads of 64), and then copies all of them before and after the kernel, which reads rows.
    """
    return Format(Layout(tuple(range(pages.ndim))), sharding)


def quantize(x_BTKC: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """(numbers of this dtype [..., K, C], scales [..., K] float32); a head's largest becomes the largest number."""
    largest = LARGEST[jnp.dtype(dtype).name]
    x_BTKC = x_BTKC.astype(jnp.float32)
    top_BTK = jnp.abs(x_BTKC).max(-1)
    scaled_BTKC = x_BTKC * (largest / jnp.where(top_BTK > 0, top_BTK, 1.0))[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        scaled_BTKC = jnp.round(scaled_BTKC)
    return jnp.clip(scaled_BTKC, -largest, largest).astype(dtype), top_BTK / largest


def as_stored(cache: dict[str, jax.Array], new: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """New tokens [B, T, K, C] (one head: [B, T, C]) in the format of pages: {"k": [B, T, K * C]}, and for quantized
    pages scales {"k_scale": [B, T, K]}."""
    stored = {}
    for name, x in new.items():
        if name + SCALE in cache:
            heads = cache[name + SCALE].shape[1]
            x, scales = quantize(x.reshape(*x.shape[:2], heads, -1), cache[name].dtype)
            stored[name + SCALE] = scales
        stored[name] = x.reshape(*x.shape[:2], -1).astype(cache[name].dtype)
    return stored


def write(
    cache: dict[str, jax.Array], new: dict[str, jax.Array], page_BT: jax.Array, slot_BT: jax.Array
) -> dict[str, jax.Array]:
    """`cache` with each new token in its page and slot; a token with a page out of range is not written."""
    written = {}
    for name, x in as_stored(cache, new).items():
        at = (page_BT, slice(None), slot_BT) if name.endswith(SCALE) else (page_BT, slot_BT)
        written[name] = cache[name].at[at].set(x, mode="drop")
    return cache | written


def gather(pages: jax.Array, page_table_BP: jax.Array) -> jax.Array:
    """[N, Z, ...] pages to [B, S, ...]: slot s of a row holds position s."""
    B, P = page_table_BP.shape
    rows = jnp.take(pages, page_table_BP, axis=0, mode="clip")
    return rows.reshape(B, P * pages.shape[1], *pages.shape[2:])


def read(
    cache: dict[str, jax.Array], name: str, page_table_BP: jax.Array, heads: int, dtype: jnp.dtype
) -> jax.Array:
    """[B, S, K, C] in `dtype`: the values in each row's slots."""
    rows_BSX = gather(cache[name], page_table_BP)
    rows_BSKC = rows_BSX.reshape(*rows_BSX.shape[:2], heads, -1)
    if name + SCALE not in cache:
        return rows_BSKC.astype(dtype)
    scales_BSK = gather(cache[name + SCALE].swapaxes(1, 2), page_table_BP)
    return (rows_BSKC.astype(jnp.float32) * scales_BSK[..., None]).astype(dtype)

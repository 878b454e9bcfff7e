"""Paged attention on a CPU by a native kernel, which reads each row's own pages once: see native/paged.cc.

Plain jnp gathers the whole of each token's row, as long as the longest may be.
"""

# T tokens of all rows, R rows, H query heads, K key/value heads, C channels of a key, E channels of a value

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from model.kernels import native
from model.kernels.attention import Mask, Scores
from model.kernels.attention.mask import LISTED
from model.kernels.paged_attention.kv_layout import KVLayout
from model.kernels.paged_attention.rows import Rows

if TYPE_CHECKING:
    from model.kernels.paged_attention import Request

WIDEST, MOST_SLOTS = 256, 64  # channels of a head, slots of a page
LANES = 16


def refusal(request: Request) -> str | None:
    """Why the kernel can't serve a request, as a clause; None: it can."""
    if reason := native.missing():
        return reason
    if request.stored != {"k", "v"} or request.kv_layout.names != ("k", "v"):
        return (
            f"it reads keys and values as they are, and these pages hold {', '.join(sorted(request.stored))}"
        )
    if request.dtypes != {"float32"}:
        return f"it reads float32, and these are {', '.join(sorted(request.dtypes))}"
    if request.page_size > MOST_SLOTS:
        return f"its pages have at most {MOST_SLOTS} slots, and these have {request.page_size}"
    for width in (request.key_width, request.value_width):
        if width % LANES or width > WIDEST:
            return f"its heads have a multiple of {LANES} channels up to {WIDEST}, and these have {width}"
    if request.bias:
        return "its scores have no biases"
    return request.mask.without("keys ahead of a query", *LISTED)


def native_kernel(
    q_THC: jax.Array,
    stored: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_RP: jax.Array,
    rows: Rows,
    kv_layout: KVLayout,
    mask: Mask,
    scores: Scores,
    *_: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(outputs [T, H, E], the cache with the new tokens, in the same memory where XLA can)."""
    k, v = cache["k"], cache["v"]
    T, H, C = q_THC.shape
    E = v.shape[-1] // kv_layout.heads
    shapes = [
        jax.ShapeDtypeStruct((T, H, E), jnp.float32),
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
    ]
    call = jax.ffi.ffi_call("crucible_paged", shapes, input_output_aliases={3: 1, 4: 2})
    nothing = jnp.zeros(0, jnp.float32)
    new = (nothing, nothing) if stored is None else (stored["k"], stored["v"])
    ints = (x.astype(jnp.int32) for x in (page_table_RP, rows.first_R, rows.count_R, rows.start_R))
    sinks_H = nothing if scores.sinks_H is None else scores.sinks_H.astype(jnp.float32)
    out_THE, k, v = call(
        q_THC,
        *new,
        k,
        v,
        *ints,
        sinks_H,
        heads=np.int64(kv_layout.heads),
        scale=np.float32(scores.scale_of(C)),
        softcap=np.float32(scores.softcap or 0),
        window=np.int64(mask.window or 0),
        chunk=np.int64(mask.chunk or 0),
    )
    return out_THE, cache | {"k": k, "v": v}

"""Attention of new tokens to rows in pages, which also writes the new tokens.

Kwon et al. 2023, arXiv:2309.06180; flat tokens of rows of any length, as in "ragged paged attention" of vLLM's TPU back
end. Pages are those of pages.py. There is no gradient, because training has no cache. `PAGED_ATTENTION` has the
implementations; see model.kernels.choice.
"""

# T tokens of all rows, R rows, H query heads, K key/value heads, C channels of a key, E channels of a value
# N pages, Z slots a page, P pages a row, S = P * Z slots a row

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.attention import Mask, Scores
from model.kernels.attention.mask import LISTED
from model.kernels.choice import Implementation, Operation
from model.kernels.paged_attention import cpu, pages, third_party
from model.kernels.paged_attention.kv_layout import KVLayout
from model.kernels.paged_attention.reference import in_plain
from model.kernels.paged_attention.rows import Rows


@dataclasses.dataclass(frozen=True)
class Request:
    """What an implementation reads to decide whether it can serve."""

    backend: backend.Backend
    stored: frozenset[str]  # names of the arrays of pages
    kv_layout: KVLayout
    mask: Mask
    bias: bool
    sinks: bool
    key_width: int
    value_width: int
    page_size: int
    dtypes: frozenset[str]  # of queries and pages


def request_for(
    q_THC: jax.Array, cache: dict[str, jax.Array], kv_layout: KVLayout, mask: Mask, scores: Scores
) -> Request:
    bias, sinks = scores.bias is not None, scores.sinks_H is not None
    values = cache[kv_layout.values]
    return Request(
        backend.current(),
        frozenset(cache),
        kv_layout,
        mask,
        bias,
        sinks,
        key_width=q_THC.shape[-1],
        value_width=values.shape[-1] // kv_layout.heads,
        page_size=values.shape[1],
        dtypes=frozenset(str(x.dtype) for x in (q_THC, *cache.values())),
    )


def paged_attention(
    q_THC: jax.Array,
    new: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_RP: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    kv_layout: KVLayout,
    mask: Mask = Mask(),
    scores: Scores = Scores(),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Write new tokens to pages, and attend to them and to all earlier tokens of their rows.

    Args:
      new: the arrays that `kv_layout` names, of these tokens, [T, K, C] each (one head: [T, C]); None: the pages hold
        them already.
      cache: pages [N, Z, K * C] and scales; returned with the new tokens, in the same memory where it is donated.
      page_table_RP: int32; entries past a row's length may be anything.
      cu_q_lens: [R + 1] int32; row r's are the tokens cu_q_lens[r] to cu_q_lens[r + 1], none where both are equal.
      kv_lens: [R] int32, tokens of each row with the new ones, which are its last.

    Returns:
      ([T, H, E] in the dtype of `q`, zero for tokens of no row; cache).
    """
    count_R = cu_q_lens[1:] - cu_q_lens[:-1]
    rows = Rows(cu_q_lens[:-1], count_R, kv_lens - count_R)
    return _no_gradient(kv_layout, dataclasses.replace(scores, sinks_H=None), q_THC.shape[0])(
        q_THC, new, cache, page_table_RP, rows, mask, scores.sinks_H
    )


def attend_in_rows(
    q_BTHC: jax.Array,
    new: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_BP: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    kv_layout: KVLayout,
    mask: Mask = Mask(),
    scores: Scores = Scores(),
    first_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`paged_attention` of rows of T places. From `first_B` on (None: 0), `count_B` places are tokens, at positions
    from `start_B` on."""
    B, T = q_BTHC.shape[:2]
    begins_B = jnp.arange(B, dtype=jnp.int32) * T
    rows = Rows(begins_B if first_B is None else begins_B + first_B, count_B, start_B)
    flat = lambda x: x.reshape(B * T, *x.shape[2:])
    out_THE, cache = _no_gradient(kv_layout, dataclasses.replace(scores, sinks_H=None), T)(
        flat(q_BTHC), jax.tree.map(flat, new), cache, page_table_BP, rows, mask, scores.sinks_H
    )
    return out_THE.reshape(B, T, *out_THE.shape[1:]), cache


def _no_gradient(kv_layout: KVLayout, scores: Scores, longest: int):
    """The chosen implementation; its derivative is an error."""

    @jax.custom_jvp
    def run(q_THC, new, cache, page_table_RP, rows, mask, sinks_H):
        with_sinks = dataclasses.replace(scores, sinks_H=sinks_H)
        new = None if new is None else pages.as_stored(cache, {k: x[None] for k, x in new.items()})
        new = None if new is None else {name: x[0] for name, x in new.items()}
        request = request_for(q_THC, cache, kv_layout, mask, with_sinks)
        inputs = q_THC, new, cache, page_table_RP, rows, kv_layout, mask, with_sinks
        return PAGED_ATTENTION.choose(request).run(*inputs, longest, request.backend)

    @run.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(
            "paged attention has no gradient: a cache serves, it does not train. Call apply without a cache, on whole "
            "texts, for what is to be differentiated."
        )

    return run


def _plain(*arguments: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return in_plain(*arguments[:8])


def _by_kernel(*arguments: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    from model.kernels.paged_attention.tpu import by_kernel  # imported here, because Pallas is slow to import

    return by_kernel(*arguments)


def _ragged(*arguments: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return third_party.ragged(*arguments[:8])


def _plain_refusal(request: Request) -> str | None:
    return request.mask.without("spans")  # pages do not have the spans of old tokens


def _kernel_refusal(request: Request) -> str | None:
    return (
        "its scores have no biases"
        if request.bias
        else request.mask.without("keys ahead of a query", *LISTED)
    )


def _ragged_refusal(request: Request) -> str | None:
    if request.backend.interpret:
        return "JAX can't interpret it"
    if request.stored != {"k", "v"} or set(request.kv_layout.names) != {"k", "v"}:
        return (
            f"it reads keys and values as they are, and these pages hold {', '.join(sorted(request.stored))}"
        )
    if request.key_width % third_party.LANES:
        return f"its heads fill vectors of {third_party.LANES}, and these have {request.key_width} channels"
    if request.sinks:
        return "it has no sinks"
    return _kernel_refusal(request) or request.mask.without("chunks")


PAGED_ATTENTION = Operation(
    "paged",
    {
        "plain": Implementation(
            ("plain", "gpu", "tpu"), _plain, _plain_refusal, cost="It gathers whole rows for each token."
        ),
        "native": Implementation(("plain",), cpu.native_kernel, cpu.refusal),
        "kernel": Implementation(("tpu",), _by_kernel, _kernel_refusal),
        "ragged": Implementation(("tpu",), _ragged, _ragged_refusal),
    },
    preferred={
        "plain": ("plain",),
        "cpu": ("native", "plain"),
        "gpu": ("plain",),
        "tpu": ("kernel", "plain"),
    },
)

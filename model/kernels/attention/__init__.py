"""Attention of a row's tokens among themselves. `ATTENTION` has its implementations; see model.kernels.choice."""

# B batch, T tokens, H query heads, K key/value heads, C width of a query and a key, E width of a value

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.kernels import backend, mesh
from model.kernels.attention import gpu_libraries, tpu_splash
from model.kernels.attention.blocks import in_query_blocks
from model.kernels.attention.mask import LISTED, Mask, chunk_segment_ids
from model.kernels.attention.reference import Scores
from model.kernels.choice import Implementation, Operation
from model.sharding import ShardingRules


@dataclasses.dataclass(frozen=True)
class Request:
    """What an implementation must know to say whether it can serve."""

    backend: backend.Backend
    mask: Mask
    bias: bool
    sinks: bool
    softcap: bool
    key_width: int
    value_width: int
    dtype: jnp.dtype
    length: int  # tokens of a row
    packed: bool  # whether ids say which tokens of a row see each other
    split_length: bool  # whether a mesh splits the tokens of a row


def self_attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    mask: Mask = Mask(),
    scores: Scores = Scores(),
    rules: ShardingRules | None = None,
) -> jax.Array:
    """Attention within segments, [B, T, H, E].

    Args:
      positions_BT: int32, rising by one along each segment.
      segment_ids_BT: int32; a token sees only tokens of its own segment. None: each row is one document.
      rules: how a mesh splits rows, tokens and heads. Kernels need it; plain jnp does not.

    Raises:
      ValueError: the implementation that was named can't serve this.
    """
    chosen = backend.current()
    request = Request(
        chosen,
        mask,
        scores.bias is not None,
        scores.sinks_H is not None,
        scores.softcap is not None,
        k_BTKC.shape[-1],
        v_BTKE.shape[-1],
        jnp.dtype(q_BTHC.dtype),
        q_BTHC.shape[1],
        segment_ids_BT is not None or mask.chunk is not None,
        any(mesh.ways((axis,)) > 1 for axis in mesh.split_by(rules, "length")[0]),
    )
    run = ATTENTION.choose(request).run
    return run(q_BTHC, k_BTKC, v_BTKE, positions_BT, segment_ids_BT, mask, scores, rules, chosen)


def _plain(*arguments: Any) -> jax.Array:
    return in_query_blocks(*arguments[:7])


def _flash(*arguments: Any) -> jax.Array:
    # here, since Pallas takes long to import and is wanted on TPUs and GPUs alone
    from model.kernels.attention.tpu import TILE_SIZES, TileSizes, flash_attention

    tiles = arguments[-1].of_chip(TILE_SIZES, TileSizes())
    return _by_flash(functools.partial(flash_attention, tiles=tiles), *arguments)


def _triton(*arguments: Any) -> jax.Array:
    from model.kernels.attention.gpu_triton import flash_attention

    return _by_flash(flash_attention, *arguments)


def _by_flash(
    attend: Callable[..., tuple[jax.Array, jax.Array]],
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    mask: Mask,
    scores: Scores,
    rules: ShardingRules | None,
    chosen: backend.Backend,
) -> jax.Array:
    from model.kernels.attention.sharded import flash_on_mesh
    from model.kernels.attention.tpu import with_sinks

    out_BTHE, lse_BHT = flash_on_mesh(
        *(attend, q_BTHC, k_BTKC, v_BTKE),
        chunk_segment_ids(positions_BT, segment_ids_BT, mask.chunk),
        rules,
        causal=mask.causal,
        window=mask.window,
        span=mask.span(),
        scale=scores.scale,
        softcap=scores.softcap,
        interpret=chosen.interpret,
    )
    return out_BTHE if scores.sinks_H is None else with_sinks(out_BTHE, lse_BHT, scores.sinks_H)[0]


def _flash_refusal(request: Request) -> str | None:
    return "its scores have no biases" if request.bias else request.mask.without(*LISTED)


def _triton_refusal(request: Request) -> str | None:
    from model.kernels.attention.gpu_triton import refusal

    return refusal(request.key_width, request.value_width, request.dtype) or _flash_refusal(request)


def _splash_refusal(request: Request) -> str | None:
    if request.split_length:
        return "it computes whole rows, and the mesh splits their tokens"
    return _flash_refusal(request)


def _cudnn_refusal(request: Request) -> str | None:
    if request.softcap:
        return "its scores have no soft-cap"
    if request.dtype not in (jnp.bfloat16, jnp.float16) and not request.backend.interpret:
        return f"it computes in bfloat16 or float16, and this is {request.dtype}"
    if request.key_width != request.value_width or request.key_width % 8 or request.key_width > 128:
        widths = f"{request.key_width} and {request.value_width}"
        return f"keys and values have widths {widths}, and it takes one multiple of 8 up to 128"
    if request.length % 2:
        return f"its gradient takes rows of an even length, and these have {request.length} tokens"
    return request.mask.without("window to both sides") or _tokamax_refusal(request)


def _cudnn_drawback(request: Request) -> str | None:
    return "packed rows need a mask of [rows, tokens, tokens] in memory" if request.packed else None


def _tokamax_refusal(request: Request) -> str | None:
    return "it has no sinks" if request.sinks else _flash_refusal(request)


ATTENTION = Operation(
    "attention",
    {
        "plain": Implementation(
            ("plain", "tpu", "gpu"),
            _plain,
            cost="It holds scores of [rows, heads, tokens, tokens] in memory.",
        ),
        "flash": Implementation(("tpu",), _flash, _flash_refusal),
        "splash": Implementation(("tpu",), tpu_splash.splash, _splash_refusal),
        "cudnn": Implementation(("gpu",), gpu_libraries.cudnn, _cudnn_refusal, _cudnn_drawback),
        "triton": Implementation(("gpu",), _triton, _triton_refusal),
        "tokamax": Implementation(("gpu", "tpu"), gpu_libraries.tokamax, _tokamax_refusal),
    },
    # on GPUs packed rows, as in training, go to triton: cudnn has a drawback there, see `_cudnn_drawback`
    preferred={"plain": ("plain",), "tpu": ("flash", "plain"), "gpu": ("cudnn", "triton", "plain")},
)

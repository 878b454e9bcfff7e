"""Attention of a row's tokens among themselves, in the form that suits the platform or that a config names.

`FORMS` has them all. Each says what it can't serve: a form that was named and can't is an error that says which can,
one that the platform would have taken gives way to the next, and the log says so once.
"""

# B batch, T tokens, H query heads, K key/value heads, C width of a query and a key, E width of a value

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.attention import third_party
from model.kernels.attention.blocks import in_query_blocks
from model.kernels.attention.reference import Scores, Sight, stretch_ids
from model.sharding import ShardingRules

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Request:
    """All that a form must know to say whether it can."""

    backend: backend.Backend
    sight: Sight
    bias: bool
    sinks: bool
    softcap: bool
    key_width: int
    value_width: int
    dtype: jnp.dtype
    length: int  # tokens of a row
    split_length: bool  # whether a mesh splits the tokens of a row


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to compute attention; `run` takes the arguments of `self_attention` and the back end."""

    platforms: tuple[str, ...]  # names of back ends
    refusal: Callable[[Request], str | None]  # why it can't serve, in a few words
    run: Callable[..., jax.Array]


def self_attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    sight: Sight = Sight(),
    scores: Scores = Scores(),
    rules: ShardingRules | None = None,
) -> jax.Array:
    """Attention within segments, [B, T, H, E], in the form of `FORMS` that the config or the platform chooses.

    Args:
      positions_BT: int32, rising by one along each segment.
      segment_ids_BT: int32; a token sees only tokens of its own segment. None: each row is one document.
      rules: how a mesh splits rows, tokens and heads: asked for by kernels alone.

    Raises:
      ValueError: the form that was named can't serve this.
    """
    chosen = backend.current()
    request = Request(
        chosen,
        sight,
        scores.bias is not None,
        scores.sinks_H is not None,
        scores.softcap is not None,
        k_BTKC.shape[-1],
        v_BTKE.shape[-1],
        jnp.dtype(q_BTHC.dtype),
        q_BTHC.shape[1],
        rules is not None and third_party.splits_length(rules),
    )
    form = FORMS[form_for(request, backend.kernels().attention)]
    return form.run(q_BTHC, k_BTKC, v_BTKE, positions_BT, segment_ids_BT, sight, scores, rules, chosen)


def form_for(request: Request, named: str = "auto") -> str:
    """The name of the form that serves; see `self_attention`."""
    if named == "auto":
        return _of_platform(request)
    if named not in FORMS:
        raise ValueError(f"kernels.attention={named!r} is not one of auto, {', '.join(FORMS)}.")
    if reason := _refusal(named, request):
        can = [name for name in FORMS if _refusal(name, request) is None]
        raise ValueError(
            f"kernels.attention={named!r} can't serve this: {reason}. These can: {', '.join(can)}."
        )
    return named


def _refusal(name: str, request: Request) -> str | None:
    form = FORMS[name]
    if request.backend.name not in form.platforms and not request.backend.interpret:
        return f"it runs on {' and '.join(form.platforms)}, and kernels here are for {request.backend.name}"
    return form.refusal(request)


def _of_platform(request: Request) -> str:
    first, *others = PREFERRED[request.backend.name]
    if (reason := _refusal(first, request)) is None:
        return first
    second = next(name for name in others if _refusal(name, request) is None)
    _say(first, second, reason)
    return second


@functools.cache
def _say(first: str, second: str, reason: str) -> None:
    costs = " It holds a mask of [rows, 1, tokens, tokens]." if second == "plain" else ""
    _log.warning("Attention runs in the form %r: %r can't serve it, %s.%s", second, first, reason, costs)


def _plain(*arguments: Any) -> jax.Array:
    return in_query_blocks(*arguments[:7])


def _flash(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    sight: Sight,
    scores: Scores,
    rules: ShardingRules | None,
    chosen: backend.Backend,
) -> jax.Array:
    # here, since Pallas takes long to import and is wanted on TPUs alone
    from model.kernels.attention.sharded import flash_on_mesh
    from model.kernels.attention.tpu import BLOCKS, Blocks, with_sinks

    out_BTHE, lse_BHT = flash_on_mesh(
        *(q_BTHC, k_BTKC, v_BTKE, stretch_ids(positions_BT, segment_ids_BT, sight.chunk), rules),
        causal=sight.causal,
        window=sight.window,
        reach=sight.reach(),
        scale=scores.scale,
        softcap=scores.softcap,
        blocks=BLOCKS[chosen.chip] if chosen.chip else Blocks(),
        interpret=chosen.interpret,
    )
    return out_BTHE if scores.sinks_H is None else with_sinks(out_BTHE, lse_BHT, scores.sinks_H)[0]


def _no_bias(request: Request) -> str | None:
    return "its scores have no biases" if request.bias else None


def _splash_refusal(request: Request) -> str | None:
    if request.split_length:
        return "it computes whole rows, and the mesh splits their tokens"
    return _no_bias(request)


def _cudnn_refusal(request: Request) -> str | None:
    if request.softcap:
        return "its scores have no soft-cap"
    if request.dtype not in (jnp.bfloat16, jnp.float16) and not request.backend.interpret:
        return f"it computes in bfloat16 or float16, and this is {request.dtype}"
    if request.key_width != request.value_width or request.key_width % 8 or request.key_width > 128:
        widths = f"{request.key_width} and {request.value_width}"
        return f"keys and values have widths {widths}, and it takes one multiple of 8 up to 128"
    if request.sight.window is not None and not request.sight.causal:
        return "its windows look back alone, and this one to both sides"
    if request.length % 2:
        return f"its gradient takes rows of an even length, and these have {request.length} tokens"
    return _tokamax_refusal(request)


def _tokamax_refusal(request: Request) -> str | None:
    if request.sinks:
        return "it has no sinks"
    return _no_bias(request)


FORMS = {
    "plain": Form(("plain", "tpu", "gpu"), lambda request: None, _plain),
    "flash": Form(("tpu",), _no_bias, _flash),
    "splash": Form(("tpu",), _splash_refusal, third_party.splash),
    "cudnn": Form(("gpu",), _cudnn_refusal, third_party.cudnn),
    "tokamax": Form(("gpu", "tpu"), _tokamax_refusal, third_party.tokamax),
}
PREFERRED = {"plain": ("plain",), "tpu": ("flash", "plain"), "gpu": ("cudnn", "plain")}

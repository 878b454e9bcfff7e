"""What recurrent mixers share: where documents start, the rows of the state, and the short causal convolution.

A recurrent mixer keeps a state of constant size for each row instead of pages. Its module calls `begin`, runs over
the tokens from `order.state`, and passes its output and new state to `finish`.
"""

# B batch, T tokens, D model width, R rows of the state, K taps of a convolution, F channels

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from model.blocks.common import Context, Mixer, TokenInfo, in_float32, param

# Roles of parameters that several recurrent mixers have.
READ_OUT = "adds what was read from the state to the residual stream"
OUTPUT_GATE = "gate: opens each channel of the output"
HEAD_FORGETTING = "how fast a head forgets, as a logarithm"
FORGETTING = "how fast the state forgets, as a logarithm"
TIME_STEP = "where a token's time step starts from"
HEAD_NORM = "scale of each head's output"


@flax.struct.dataclass
class SegmentOrder:
    """The order in which a recurrence reads a batch: the real tokens of each row come first."""

    positions_BT: jax.Array
    first_BT: jax.Array  # bool: a document starts here, so the state before this token is zero
    real_BT: jax.Array | None  # bool: padding must not change the state; None: all tokens are real
    state: dict[str, jax.Array]  # each batch row's state before its first token
    inverse_BT: jax.Array | None = None  # [B, T]: index here of the caller's token t; None: t
    permutation_BT: jax.Array | None = None  # [B, T]: caller's index of token t here
    begins_B: jax.Array | None = None  # bool: rows that begin a document, maybe before these tokens

    def permute(self, x_BTF: jax.Array) -> jax.Array:
        """From the caller's order to this one."""
        if self.permutation_BT is None:
            return x_BTF
        return jnp.take_along_axis(x_BTF, _like(self.permutation_BT, x_BTF), axis=1)

    def last(self, x_BTF: jax.Array) -> jax.Array:
        """[B, F]: the values of each row's last real token."""
        if self.real_BT is None:
            return x_BTF[:, -1]
        last_B = jnp.maximum(self.real_BT.sum(axis=1) - 1, 0)
        return jnp.take_along_axis(x_BTF, _like(last_B[:, None], x_BTF), axis=1)[:, 0]

    def only_real(self, x_BTF: jax.Array) -> jax.Array:
        """`x` with zeros at padding."""
        return x_BTF if self.real_BT is None else jnp.where(_like(self.real_BT, x_BTF), x_BTF, 0)


def begin(
    mixer: Mixer, x_BTD: jax.Array, info: TokenInfo, cache: dict | None
) -> tuple[jax.Array, SegmentOrder]:
    """The tokens in a recurrence's order, and this order. Without a cache, each change of segment starts a document."""
    B, T = x_BTD.shape[:2]
    if cache is None:
        first_BT = jnp.broadcast_to(jnp.arange(T) == 0, (B, T))
        if info.segment_ids is not None:
            change_BT = info.segment_ids[:, 1:] != info.segment_ids[:, :-1]
            first_BT = jnp.concatenate([first_BT[:, :1], change_BT], axis=1)
        return x_BTD, SegmentOrder(info.positions, first_BT, None, mixer.init_cache(0, 0, B, x_BTD.dtype))

    if info.segment_ids is None:
        first_BT = info.positions == 0
        return x_BTD, SegmentOrder(info.positions, first_BT, None, _read(cache, info, first_BT))
    real_BT, positions_BT, inverse_BT, permutation_BT = info.segment_ids != 0, info.positions, None, None
    if T > 1:
        # A convolution reads a fixed number of tokens back, so padding moves to the end.
        permutation_BT = jnp.argsort(~real_BT, axis=1, stable=True)
        inverse_BT = jnp.maximum(jnp.cumsum(real_BT, axis=1) - 1, 0)
        x_BTD = jnp.take_along_axis(x_BTD, permutation_BT[..., None], axis=1)
        real_BT, positions_BT = (
            jnp.take_along_axis(x, permutation_BT, axis=1) for x in (real_BT, positions_BT)
        )
    first_BT = real_BT & (positions_BT == 0)
    state = _read(cache, info, first_BT)
    return x_BTD, SegmentOrder(
        positions_BT, first_BT, real_BT, state, inverse_BT, permutation_BT, info.begins
    )


def finish(
    y_BTD: jax.Array, state: dict[str, jax.Array], order: SegmentOrder, info: TokenInfo, cache: dict | None
) -> tuple[jax.Array, dict | None]:
    """The output in the caller's order, and the cache with `state` ([B, ...] each) in the rows of the batch."""
    if cache is None:
        return y_BTD, None
    if order.inverse_BT is not None:
        y_BTD = jnp.take_along_axis(y_BTD, order.inverse_BT[..., None], axis=1)
    rows_B = cast(jax.Array, info.rows)

    def write(value_R: jax.Array, new_B: jax.Array) -> jax.Array:
        # a batch row without real tokens may name the same state row as another one
        nowhere = value_R.shape[0]
        if order.real_BT is None:
            return value_R.at[rows_B].set(new_B.astype(value_R.dtype), mode="drop")
        written_B = order.real_BT.any(axis=1)
        if order.begins_B is not None:  # clears what an earlier document left in the row
            written_B |= order.begins_B
        to_B = jnp.where(written_B, rows_B, nowhere)
        return value_R.at[to_B].set(new_B.astype(value_R.dtype), mode="drop")

    return y_BTD, {name: write(value, state[name]) for name, value in cache.items()}


def _read(cache: dict, info: TokenInfo, first_BT: jax.Array) -> dict[str, jax.Array]:
    """The states of the batch's rows; zero for a row that starts a document."""
    rows_B = cast(jax.Array, info.rows)  # set whenever there is a cache
    fresh_B = first_BT[:, 0] if info.begins is None else first_BT[:, 0] | info.begins

    def read(value_R: jax.Array) -> jax.Array:
        state_B = value_R.at[rows_B].get(mode="clip")
        return jnp.where(_like(fresh_B, state_B), 0, state_B)

    return {name: read(value) for name, value in cache.items()}


def causal_conv(
    x_BTF: jax.Array, w_KF: jax.Array, tail_BKF: jax.Array, order: SegmentOrder
) -> tuple[jax.Array, jax.Array]:
    """Depthwise: y_t = sum over l < K of w_(K-1-l) x_(t-l), over tokens of one document.

    Args:
      x_BTF: F is any number of axes; `w` and `tail` have the same ones.
      tail_BKF: the K - 1 real tokens before these.

    Returns:
      y in the dtype of `x` (summed in float32), and the K - 1 last real tokens, zero where the document has fewer.
    """
    recent, K = conv_context(x_BTF, tail_BKF, order), w_KF.shape[0]
    y_BTF = jnp.zeros(x_BTF.shape, jnp.float32)
    for tap in range(K):
        y_BTF += recent.back(K - 1 - tap).astype(jnp.float32) * w_KF[tap].astype(jnp.float32)
    return y_BTF.astype(x_BTF.dtype), recent.tail(order)


@flax.struct.dataclass
class ConvContext:
    """The tokens of a call after the K - 1 before them, S = K - 1 + T in all."""

    tokens_BSF: jax.Array
    document_BS: jax.Array  # int32, the number of each token's document
    before: int = flax.struct.field(pytree_node=False)  # K - 1

    def back(self, steps: int) -> jax.Array:
        """[B, T, F]: the token `steps` before each token of the call; zero before its document's first token."""
        start, stop = self.before - steps, self.tokens_BSF.shape[1] - steps
        seen_BTF = self.tokens_BSF[:, start:stop]
        same_BT = self.document_BS[:, start:stop] == self.document_BS[:, self.before :]
        return jnp.where(_like(same_BT, seen_BTF), seen_BTF, 0)

    def tail(self, order: SegmentOrder) -> jax.Array:
        """[B, K - 1, F]: the last real tokens, zero where the document has fewer."""
        B, S = self.document_BS.shape
        length_B = jnp.full((B,), S - self.before) if order.real_BT is None else order.real_BT.sum(axis=1)
        last_BK = length_B[:, None] + jnp.arange(self.before)
        own_BK = jnp.take_along_axis(self.document_BS, last_BK, axis=1) == self.document_BS[:, -1:]
        tail_BKF = jnp.take_along_axis(self.tokens_BSF, _like(last_BK, self.tokens_BSF), axis=1)
        return jnp.where(_like(own_BK, tail_BKF), tail_BKF, 0)


def conv_context(x_BTF: jax.Array, tail_BKF: jax.Array, order: SegmentOrder) -> ConvContext:
    """The tokens of a call, after the K - 1 real tokens before them (`tail`)."""
    before = tail_BKF.shape[1]
    document_BS = jnp.pad(jnp.cumsum(order.first_BT, axis=1), ((0, 0), (before, 0)))
    return ConvContext(jnp.concatenate([tail_BKF.astype(x_BTF.dtype), x_BTF], axis=1), document_BS, before)


def param32(
    module: nn.Module,
    ctx: Context,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Callable,
    role: str = "",
) -> jax.Array:
    """A parameter with one number for each channel or head, in float32 in every computation dtype.

    It is stored flat, split over devices along the first of `axes`, and has no weight decay.
    """
    flat = lambda key, size, dtype: init(key, shape, dtype).reshape(size)
    size = (int(np.prod(shape)),)
    return param(module, in_float32(ctx), name, size, axes[:1], flat, 0, role, decay=False).reshape(shape)


def head_rms_norm(module: nn.Module, ctx: Context, o_BTHV: jax.Array, eps: float) -> jax.Array:
    """RMS norm of each head's output in float32, with a scale "norm" that all heads share."""
    o_BTHV = o_BTHV.astype(jnp.float32)
    size, ones = o_BTHV.shape[-1:], nn.initializers.ones
    scale_V = param32(module, ctx, "norm", size, ("head_dim",), ones, HEAD_NORM)
    return o_BTHV * jax.lax.rsqrt(jnp.mean(o_BTHV * o_BTHV, axis=-1, keepdims=True) + eps) * scale_V


def log_uniform(low: float, high: float) -> Callable:
    """log(x) for x uniform in [low, high): the start of A_log."""

    def init(key, shape, dtype):
        return jnp.log(jax.random.uniform(key, shape, jnp.float32, low, high)).astype(dtype)

    return init


def inverse_softplus_of_log_uniform(low: float, high: float) -> Callable:
    """b such that softplus(b) is log-uniform in [low, high): the start of a time step's bias."""

    def init(key, shape, dtype):
        step = jnp.exp(jax.random.uniform(key, shape, jnp.float32, np.log(low), np.log(high)))
        return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)

    return init


def _like(mask: jax.Array, x: jax.Array) -> jax.Array:
    """`mask` with trailing axes of length one, so that it broadcasts to `x`."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))

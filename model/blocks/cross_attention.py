"""Attention of a decoder's tokens to an encoder's output. Vaswani et al. 2017, arXiv:1706.03762."""

# B batch, T tokens of the decoder, S tokens of the encoder, D model width, H query heads, K key/value heads, C head
# width, R rows of the cache

from __future__ import annotations

import dataclasses
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.attention import combine_heads, project_heads
from model.blocks.common import Context, TokenInfo
from model.kernels.attention import Scores
from model.kernels.attention.reference import attention


@dataclasses.dataclass(frozen=True)
class CrossAttention:
    """Every token sees the whole encoder text; in packed rows, that of its own document."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None  # multiplies the scores; None: head_dim ** -0.5

    def module(self, ctx: Context, name: str) -> nn.Module:
        """Called like a mixer; its cache is a part of the block's."""
        return CrossAttentionModule(self, ctx, name=name)

    def init_cache(self, num_rows: int, encoder_length: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """For each row, the keys and values of one encoder text and a mask of its tokens."""
        shape = (num_rows, encoder_length, self.num_kv_heads, self.head_dim)
        return {
            "cross_k": jnp.zeros(shape, dtype),
            "cross_v": jnp.zeros(shape, dtype),
            "cross_real": jnp.zeros(shape[:2], bool),
        }

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        axes = ("rows", None, "act_kv_heads", None)
        return {"cross_k": axes, "cross_v": axes, "cross_real": axes[:2]}

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass, with as many tokens in the encoder as in the decoder."""
        projections = 2 * width * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return projections + 2 * 2 * seq_len * self.num_heads * self.head_dim


class CrossAttentionModule(nn.Module):
    spec: CrossAttention
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        scores, new = Scores(self.spec.scale), {}
        q_BTHC = project_heads(self, x_BTD, {"q": "queries to the encoder"})["q"]
        if info.encoder is not None:
            roles = {"k": "keys of the encoder's tokens", "v": "values of the encoder's tokens"}
            keys_values = project_heads(self, info.encoder, roles)
            new = {f"cross_{name}": value for name, value in keys_values.items()}
            new["cross_real"] = _real(info.encoder, info.encoder_segment_ids)
        seen, segments_BS = new, info.encoder_segment_ids
        if cache is not None:
            rows_B = cast(jax.Array, info.rows)  # set whenever there is a cache
            cache = _remember(cache, new, rows_B) if new else cache
            seen = {name: jnp.take(value, rows_B, axis=0) for name, value in cache.items()}
            segments_BS = None
        real_B1S = seen["cross_real"][:, None]
        mask_BTS = jnp.broadcast_to(real_B1S, (*q_BTHC.shape[:2], real_B1S.shape[2]))
        if info.segment_ids is not None and segments_BS is not None:
            mask_BTS &= info.segment_ids[:, :, None] == segments_BS[:, None]
        k_BSKC, v_BSKC = (seen[name].astype(q_BTHC.dtype) for name in ("cross_k", "cross_v"))
        found_BTHC = attention(q_BTHC, k_BSKC, v_BSKC, mask_BTS, scores)
        role = "adds the heads' outputs to the residual stream"
        return combine_heads(self, found_BTHC, role), cache


def _real(encoder_BSD: jax.Array, segment_ids_BS: jax.Array | None) -> jax.Array:
    return jnp.ones(encoder_BSD.shape[:2], bool) if segment_ids_BS is None else segment_ids_BS != 0


def _remember(cache: dict, new: dict, rows_B: jax.Array) -> dict:
    """The cache with new contents for the rows of this batch."""
    given, room = new["cross_real"].shape[1], cache["cross_real"].shape[1]
    if given > room:
        raise ValueError(
            f"the encoder has {given} tokens, but the cache has room for {room}; make it with encoder_length={given}."
        )
    written = {
        name: cache[name].at[rows_B, :given].set(new[name].astype(cache[name].dtype)) for name in cache
    }
    return written | {"cross_real": written["cross_real"].at[rows_B, given:].set(False)}

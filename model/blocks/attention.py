"""The attention mixer: grouped-query attention with rotary positions, cached decoding and packed segments.

Ainslie et al. 2023, arXiv:2305.13245; qk-norm: Dehghani et al. 2023, arXiv:2302.05442; sliding window: Beltagy et
al. 2020, arXiv:2004.05150.
"""

# B batch, T tokens, D model width, H query heads, K key/value heads, C head width
# N pages of the cache, Z slots a page, P pages a row, S = P * Z slots a row

from __future__ import annotations

import dataclasses
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, TokenInfo, fan_in_normal, param
from model.blocks.norms import RMSNorm
from model.blocks.positions import Rope
from model.kernels.attention import attention, causal_attention, sees
from model.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Attention:
    """Causal self-attention; `num_kv_heads` below `num_heads` shares keys and values among groups of heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope = Rope()
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: RMSNorm | None = None  # normalises each head's query and key before the rotation
    window: int | None = None  # a token sees itself and the window - 1 tokens before it; None: all before it

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}. "
                "Each key/value head serves a whole group of query heads."
            )
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window={self.window}: a token sees at least itself, so give 1 or more, or None."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rotary positions turn pairs, so use an even width."
            )

    def module(self, ctx: Context, name: str) -> nn.Module:
        return AttentionModule(self, ctx, name=name)

    def init_cache(self, num_pages: int, page_size: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Empty pages: {"k", "v"} of [N, Z, K, C]."""
        shape = (num_pages, page_size, self.num_kv_heads, self.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        axes = (None, None, "act_kv_heads", None)
        return {"k": axes, "v": axes}


class AttentionModule(nn.Module):
    spec: Attention
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, ctx = self.spec, self.ctx
        q_BTHC = self._project("q", x_BTD, spec.num_heads, "heads")
        k_BTKC = self._project("k", x_BTD, spec.num_kv_heads, "kv_heads")
        v_BTKC = self._project("v", x_BTD, spec.num_kv_heads, "kv_heads")
        if spec.qk_norm is not None:
            q_BTHC = spec.qk_norm.module(ctx, "q_norm", "head_dim")(q_BTHC)
            k_BTKC = spec.qk_norm.module(ctx, "k_norm", "head_dim")(k_BTKC)
        q_BTHC = spec.rope(q_BTHC, info.positions)
        k_BTKC = spec.rope(k_BTKC, info.positions)
        if cache is None:
            out_BTHC = causal_attention(q_BTHC, k_BTKC, v_BTKC, info.segment_ids, spec.window)
        else:
            cache = write_pages(cache, k_BTKC, v_BTKC, info)
            out_BTHC = _attend_pages(q_BTHC, cache, info, spec.window)
        return self._output(out_BTHC), cache

    def _project(self, name: str, x_BTD: jax.Array, heads: int, axis: str) -> jax.Array:
        D, C = x_BTD.shape[-1], self.spec.head_dim
        w_DHC = param(self, self.ctx, name, (D, heads, C), ("embed", axis, "head_dim"), fan_in_normal(D))
        y_BTHC = jnp.einsum("BTD,DHC->BTHC", x_BTD, w_DHC)
        if self.spec.qkv_bias:
            y_BTHC += param(
                self, self.ctx, f"{name}_bias", (heads, C), (axis, "head_dim"), nn.initializers.zeros
            )
        return constrain(y_BTHC, self.ctx.rules, "batch", "length", f"act_{axis}", None)

    def _output(self, out_BTHC: jax.Array) -> jax.Array:
        H, C, D = *out_BTHC.shape[2:], self.ctx.width
        init = fan_in_normal(H * C, scale=(2 * self.ctx.num_blocks) ** -0.5)
        w_HCD = param(self, self.ctx, "o", (H, C, D), ("heads", "head_dim", "embed"), init)
        y_BTD = jnp.einsum("BTHC,HCD->BTD", out_BTHC, w_HCD)
        if self.spec.out_bias:
            y_BTD += param(self, self.ctx, "o_bias", (D,), ("norm",), nn.initializers.zeros)
        return y_BTD


def write_pages(cache: dict, k_BTKC: jax.Array, v_BTKC: jax.Array, info: TokenInfo) -> dict:
    """Put each token's key and value into its page and slot; tokens whose page is out of range are not written."""
    where = (info.write_page, info.write_slot)
    return {
        "k": cache["k"].at[where].set(k_BTKC.astype(cache["k"].dtype), mode="drop"),
        "v": cache["v"].at[where].set(v_BTKC.astype(cache["v"].dtype), mode="drop"),
    }


def _attend_pages(q_BTHC: jax.Array, cache: dict, info: TokenInfo, window: int | None) -> jax.Array:
    """Slot s of a row holds position s, so a query at position p sees the slots up to p, from its window on."""
    page_table_BP = cast(jax.Array, info.page_table)  # set whenever there is a cache
    B, P = page_table_BP.shape
    Z, K, C = cache["k"].shape[1:]
    k_BSKC = jnp.take(cache["k"], page_table_BP, axis=0, mode="clip").reshape(B, P * Z, K, C)
    v_BSKC = jnp.take(cache["v"], page_table_BP, axis=0, mode="clip").reshape(B, P * Z, K, C)
    mask_BTS = sees(info.positions[:, :, None], jnp.arange(P * Z), window)
    return attention(q_BTHC, k_BSKC.astype(q_BTHC.dtype), v_BSKC.astype(q_BTHC.dtype), mask_BTS)

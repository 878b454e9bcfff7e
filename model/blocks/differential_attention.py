"""Differential attention: the output of one half of the heads minus lambda times that of the other half.

Ye et al. 2024, arXiv:2410.05258.
"""

# B batch, T tokens, D model width, H query heads, K key/value heads, C head width, E = 2 C width of a value
# P = H // 2 pairs of query heads, S slots of a row

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.attention import (
    KEY_VALUE_AXES,
    KEYS_VALUES,
    QUERIES,
    check_gathered_rows,
    combine_heads,
    key_value_pages,
    project_heads,
    read_pages,
    sees_slots,
    sow_weights,
    write_pages,
)
from model.blocks.common import Context, TokenInfo, in_float32, param
from model.blocks.norms import RMSNorm
from model.blocks.positions import Rope
from model.kernels.attention import Mask, Scores, self_attention
from model.kernels.attention.reference import attention


@dataclasses.dataclass(frozen=True)
class DifferentialAttention:
    """Causal self-attention; heads h and h + H/2 are a pair and share values, those of heads k and k + K/2."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    lambda_init: float  # the paper: 0.8 - 0.6 exp(-0.3 * layer), layers counted from 0
    rope: Rope = Rope()
    qkv_bias: bool = False
    out_bias: bool = False
    pair_norm: RMSNorm = RMSNorm(scale=False)  # norm of each pair's difference

    def __post_init__(self):
        if self.num_kv_heads % 2 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}: differential attention pairs heads, so "
                "num_kv_heads must be even and num_heads a multiple of it."
            )

    def module(self, ctx: Context, name: str) -> nn.Module:
        return DifferentialAttentionModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """Empty pages: {"k", "v"} of [num_pages, page_size, K * C]."""
        return key_value_pages(num_pages, page_size, self.num_kv_heads, self.head_dim, dtype)

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return KEY_VALUE_AXES

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """Mean FLOPs of the forward pass over a row of `seq_len` tokens."""
        projections = 2 * width * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return projections + 2 * 3 * (seq_len + 1) / 2 * self.num_heads * self.head_dim


class DifferentialAttentionModule(nn.Module):
    spec: DifferentialAttention
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec = self.spec
        projected = project_heads(self, x_BTD, QUERIES | KEYS_VALUES)
        q_BTHC, k_BTKC = (
            spec.rope(projected[name], info.rotary_positions, info.segment_ids) for name in "qk"
        )
        v_BTKC = projected["v"]
        if cache is None:
            v_BTKE = _shared_values(v_BTKC)
            sow_weights(self, q_BTHC, k_BTKC, info)
            out_BTHE = self_attention(
                q_BTHC, k_BTKC, v_BTKE, info.positions, info.segment_ids, rules=self.ctx.rules
            )
        else:
            check_gathered_rows("it does not support values that two heads share")
            cache = write_pages(cache, {"k": k_BTKC, "v": v_BTKC}, info)
            k_BSKC, v_BSKC = (
                read_pages(cache, name, info, spec.num_kv_heads, q_BTHC.dtype) for name in ("k", "v")
            )
            mask_BTS = sees_slots(info, Mask(), k_BSKC.shape[1])
            out_BTHE = attention(q_BTHC, k_BSKC, _shared_values(v_BSKC), mask_BTS, Scores())
        first_BTPE, second_BTPE = jnp.split(out_BTHE, 2, axis=2)
        difference_BTPE = first_BTPE - self._lambda().astype(out_BTHE.dtype) * second_BTPE
        norm = spec.pair_norm.module(self.ctx, "pair_norm", "head_dim", role="each pair's difference")
        found_BTPE = (1 - spec.lambda_init) * norm(difference_BTPE)
        return combine_heads(self, found_BTPE, "adds the pairs' outputs to the residual stream"), cache

    def _lambda(self) -> jax.Array:
        """exp(q1 . k1) - exp(q2 . k2) + lambda_init, float32 scalar."""
        declared = (self.spec.head_dim,), ("head_dim",), nn.initializers.normal(0.1)
        role = "how much of the second head of a pair is subtracted"
        q1, k1, q2, k2 = (
            param(self, in_float32(self.ctx), f"lambda_{name}", *declared, role=role)
            for name in ("q1", "k1", "q2", "k2")
        )
        return jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2)) + self.spec.lambda_init


def _shared_values(v_BSKC: jax.Array) -> jax.Array:
    """[B, S, K, 2 C]: heads k and k + K/2 both have the concatenated values of the two."""
    pairs = jnp.concatenate(jnp.split(v_BSKC, 2, axis=2), axis=-1)
    return jnp.concatenate([pairs, pairs], axis=2)

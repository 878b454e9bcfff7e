"""Multi-head latent attention: keys and values of all heads come from one small vector a token, and that is cached.

DeepSeek-AI 2024, arXiv:2405.04434. Beside the latent, one rotated key is shared by all heads.
"""

# B batch, T tokens, D model width, H heads, Q rank of the queries, L rank of keys and values (the latent)
# C channels of a query and a key: N without rotation, then R rotated; E channels of a value; S slots of a row

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.attention import attend_pages, sow_weights
from model.blocks.common import Context, TokenInfo
from model.blocks.linear import LinearMap, linear, linear_map, linear_out
from model.blocks.norms import Norm, RMSNorm
from model.blocks.positions import Rope
from model.kernels.attention import Mask, Scores, self_attention
from model.kernels.paged_attention import KVLayout
from model.kernels.paged_attention.pages import empty_pages, is_quantized
from model.sharding import constrain

KV_LAYOUT = KVLayout(1, ("latent", "k_rope"), "latent")


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Causal self-attention through a latent of `kv_rank` channels; the cache holds it and the rotated key."""

    num_heads: int
    nope_dim: int  # channels of a head's query and key without position
    rope_dim: int  # channels with position; of the key they are shared by all heads
    v_dim: int
    kv_rank: int
    q_rank: int | None = None  # queries come from a latent too; None: from the token itself
    rope: Rope = Rope(interleaved=True)
    norm: Norm = RMSNorm(1e-6)  # of both latents
    bias: bool = False  # of the maps from and to the model's width, save that of queries without a latent
    scale: float | None = None  # of the scores; None: (nope_dim + rope_dim) ** -0.5, without YaRN's factor

    def __post_init__(self):
        if self.rope is None:
            raise ValueError("latent attention has channels that are rotated: give it a Rope, not rope=None.")
        if self.rope.rotated(self.rope_dim) % 2:
            raise ValueError(
                f"rope_dim={self.rope_dim} is odd; rotary positions turn pairs, so use an even width."
            )

    def module(self, ctx: Context, name: str) -> nn.Module:
        return LatentAttentionModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """Empty pages: {"latent", "k_rope"}, [num_pages, page_size, kv_rank] and [num_pages, page_size, rope_dim].

        Of quantised ones the rotated key stays in bfloat16, as in DeepSeek's FlashMLA: it is small, and not normalised.
        """
        of_rope = jnp.dtype("bfloat16") if is_quantized(dtype) else dtype
        latent = empty_pages("latent", num_pages, page_size, 1, self.kv_rank, dtype)
        return latent | empty_pages("k_rope", num_pages, page_size, 1, self.rope_dim, of_rope)

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {"latent": ("pages", "slots", None), "k_rope": ("pages", "slots", None)}

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """Of the forward pass without a cache, in the mean over a row of `seq_len` tokens."""
        H, C = self.num_heads, self.nope_dim + self.rope_dim
        queries = width * H * C if self.q_rank is None else self.q_rank * (width + H * C)
        latent = width * (self.kv_rank + self.rope_dim)
        keys_values = self.kv_rank * H * (self.nope_dim + self.v_dim)
        seen = (seq_len + 1) / 2
        return 2 * (queries + latent + keys_values + H * self.v_dim * width + seen * H * (C + self.v_dim))


class LatentAttentionModule(nn.Module):
    spec: LatentAttention
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec = self.spec
        q_BTHC = self._queries(x_BTD)
        q_BTHN, q_BTHR = q_BTHC[..., : spec.nope_dim], q_BTHC[..., spec.nope_dim :]
        q_BTHR = spec.rope(q_BTHR, info.rotary_positions, info.segment_ids)
        latent_BTL, k_BTR = self._latent(x_BTD, info)
        heads = (spec.num_heads, spec.nope_dim + spec.v_dim)
        role = "the latent to each head's key and value"
        kv_b = linear_map(self, "kv_b", (spec.kv_rank,), heads, ("norm", "heads", "head_dim"), role)
        if cache is None:
            out_BTHE = self._attend(q_BTHN, q_BTHR, latent_BTL, k_BTR, kv_b, info)
        else:
            new = {"latent": latent_BTL, "k_rope": k_BTR}
            out_BTHE, cache = self._attend_pages(q_BTHN, q_BTHR, new, cache, kv_b, info)
        role = "adds the heads' findings to the residual stream"
        return linear_out(self, out_BTHE, ("heads", "head_dim"), role, bias=spec.bias), cache

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        spec, ctx = self.spec, self.ctx
        heads, axes = (spec.num_heads, spec.nope_dim + spec.rope_dim), ("heads", "head_dim")
        if spec.q_rank is None:
            q_BTHC = linear(self, "q", x_BTD, heads, axes, "queries: what each head looks for")
        else:
            latent_BTQ = self._linear("q_a", x_BTD, spec.q_rank, "the token to the queries' latent")
            latent_BTQ = spec.norm.module(ctx, "q_a_norm", role="the queries' latent")(latent_BTQ)
            role = "that latent to each head's query"
            q_BTHC = linear(self, "q_b", latent_BTQ, heads, axes, role, in_axes=("norm",))
        return constrain(q_BTHC, ctx.rules, "batch", "length", "act_heads", None)

    def _latent(self, x_BTD: jax.Array, info: TokenInfo) -> tuple[jax.Array, jax.Array]:
        """(the normalised latent, the rotated key)."""
        spec = self.spec
        role = "the token to the latent that is cached, and to the rotated key"
        both = self._linear("kv_a", x_BTD, spec.kv_rank + spec.rope_dim, role)
        norm = spec.norm.module(self.ctx, "kv_a_norm", role="the cached latent")
        latent_BTL = norm(both[..., : spec.kv_rank])
        k_BT1R = spec.rope(both[:, :, None, spec.kv_rank :], info.rotary_positions, info.segment_ids)
        return latent_BTL, k_BT1R[:, :, 0]

    def _attend(self, q_BTHN, q_BTHR, latent_BTL, k_BTR, kv_b: LinearMap, info: TokenInfo) -> jax.Array:
        """Keys and values of each head, made from the latent."""
        spec = self.spec
        kv = kv_b(latent_BTL)
        k_BTHR = jnp.broadcast_to(k_BTR[:, :, None], (*kv.shape[:3], spec.rope_dim))
        q_BTHC = jnp.concatenate([q_BTHN, q_BTHR], -1)
        k_BTHC = jnp.concatenate([kv[..., : spec.nope_dim], k_BTHR], -1)
        v_BTHE = kv[..., spec.nope_dim :]
        sow_weights(self, q_BTHC, k_BTHC, info, scores=self._scores())
        stretches = info.positions, info.segment_ids, Mask()
        return self_attention(q_BTHC, k_BTHC, v_BTHE, *stretches, self._scores(), self.ctx.rules)

    def _attend_pages(self, q_BTHN, q_BTHR, new: dict, cache: dict, kv_b: LinearMap, info: TokenInfo):
        """The same numbers without making keys and values: q . (W z) = (W^T q) . z, so heads look at latents."""
        spec = self.spec
        keys, values = kv_b.part(slice(0, spec.nope_dim)), kv_b.part(slice(spec.nope_dim, None))
        q_BTHX = jnp.concatenate([keys.einsum("BTHN,LHN->BTHL", q_BTHN), q_BTHR], -1)
        rest = info, Mask(), self._scores(), self.ctx.rules
        out_BTHL, cache = attend_pages(q_BTHX, new, cache, KV_LAYOUT, *rest)
        return values.einsum("BTHL,LHE->BTHE", out_BTHL), cache

    def _scores(self) -> Scores:
        spec = self.spec
        return Scores((spec.nope_dim + spec.rope_dim) ** -0.5 if spec.scale is None else spec.scale)

    def _linear(self, name: str, x_BTD: jax.Array, features: int, role: str) -> jax.Array:
        return linear(self, name, x_BTD, (features,), ("norm",), role, bias=self.spec.bias)

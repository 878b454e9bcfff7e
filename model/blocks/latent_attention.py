"""Multi-head latent attention (MLA): one small cached vector a token gives the keys and values of all heads.

DeepSeek-AI 2024, arXiv:2405.04434. All heads also share one rotated key. Grouped latent attention
(GLA) has several latents a token, each for a group of heads, which devices may split: Zadouri et al. 2025,
arXiv:2505.21487.
"""

# B batch, T tokens, D model width, H heads in G groups, Q rank of the queries, L rank of keys and values (the latent)
# C channels of a query and a key: N without rotation, then R rotated; E channels of a value; S slots of a row

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.attention import attend_pages, sow_weights, with_spans
from model.blocks.common import Context, TokenInfo
from model.blocks.linear import LinearMap, linear, linear_map, linear_out
from model.blocks.norms import Norm, RMSNorm
from model.blocks.positions import Rope
from model.kernels.attention import Mask, Scores, self_attention
from model.kernels.paged_attention import KVLayout
from model.kernels.paged_attention.pages import empty_pages, is_quantized
from model.sharding import constrain


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Causal self-attention through a latent of `kv_rank` channels; the cache holds it and the rotated key."""

    num_heads: int
    nope_dim: int  # channels of a head's query and key without position
    rope_dim: int  # channels with position; all heads share those of the key
    v_dim: int
    kv_rank: int
    q_rank: int | None = None  # rank of the queries' latent; None: queries are a map of the token
    rope: Rope = Rope(interleaved=True)
    norm: Norm = RMSNorm(1e-6)  # applied to both latents
    bias: bool = False  # biases of the maps from and to the model's width, except queries without a latent
    # multiplies the scores; None: (nope_dim + rope_dim) ** -0.5, without YaRN's factor
    scale: float | None = None
    groups: int = 1  # groups of heads, each with its own latent in the cache

    def __post_init__(self):
        if self.groups < 1 or self.num_heads % self.groups:
            raise ValueError(f"groups={self.groups} do not divide num_heads={self.num_heads}.")
        if self.rope is None:
            raise ValueError("latent attention rotates channels: give it a Rope, not rope=None.")
        if self.rope.rotated(self.rope_dim) % 2:
            raise ValueError(
                f"rope_dim={self.rope_dim} is odd; rotary positions rotate pairs of channels, so use an even width."
            )

    def module(self, ctx: Context, name: str) -> nn.Module:
        return LatentAttentionModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """Empty pages {"latent", "k_rope"}, [num_pages, page_size, G * kv_rank] and [.., G * rope_dim].

        In quantized pages the rotated key stays in bfloat16, as in DeepSeek's FlashMLA: it is small and not normalized.
        """
        rope_dtype = jnp.dtype("bfloat16") if is_quantized(dtype) else dtype
        latent = empty_pages("latent", num_pages, page_size, self.groups, self.kv_rank, dtype)
        return latent | empty_pages("k_rope", num_pages, page_size, self.groups, self.rope_dim, rope_dtype)

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        heads = "act_kv_heads" if self.groups > 1 else None
        return {"latent": ("pages", "slots", heads), "k_rope": ("pages", "slots", heads)}

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass without a cache, in the mean over a row of `seq_len` tokens."""
        H, C = self.num_heads, self.nope_dim + self.rope_dim
        queries = width * H * C if self.q_rank is None else self.q_rank * (width + H * C)
        latent = width * (self.groups * self.kv_rank + self.rope_dim)
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
        latents, k_BTR = self._latents(x_BTD, info)
        maps = [self._kv_map(name) for name in self._of_groups("kv_b")]
        if cache is None:
            out_BTHE = self._attend(q_BTHN, q_BTHR, latents, k_BTR, maps, info)
        else:
            out_BTHE, cache = self._attend_pages(q_BTHN, q_BTHR, latents, k_BTR, cache, maps, info)
        role = "adds the heads' outputs to the residual stream"
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

    def _of_groups(self, name: str) -> list[str]:
        """The parameter names of the groups."""
        groups = self.spec.groups
        return [name] if groups == 1 else [f"{name}_{group}" for group in range(groups)]

    def _latents(self, x_BTD: jax.Array, info: TokenInfo) -> tuple[list[jax.Array], jax.Array]:
        """(each group's normalized latent [B, T, L], the rotated key [B, T, R])."""
        spec = self.spec
        role = "the token to the cached latent and the rotated key"
        both = self._linear("kv_a", x_BTD, spec.groups * spec.kv_rank + spec.rope_dim, role)
        latents = []
        for group, name in enumerate(self._of_groups("kv_a_norm")):
            norm = spec.norm.module(self.ctx, name, role="the cached latent")
            latents.append(norm(both[..., group * spec.kv_rank : (group + 1) * spec.kv_rank]))
        k_BT1R = both[:, :, None, spec.groups * spec.kv_rank :]
        return latents, spec.rope(k_BT1R, info.rotary_positions, info.segment_ids)[:, :, 0]

    def _kv_map(self, name: str) -> LinearMap:
        spec = self.spec
        heads = (spec.num_heads // spec.groups, spec.nope_dim + spec.v_dim)
        role = "the latent to each head's key and value"
        return linear_map(self, name, (spec.kv_rank,), heads, ("norm", "heads", "head_dim"), role)

    def _attend(
        self, q_BTHN, q_BTHR, latents: list[jax.Array], k_BTR, maps: list[LinearMap], info: TokenInfo
    ) -> jax.Array:
        """Keys and values of each head, from its group's latent."""
        spec = self.spec
        kv = jnp.concatenate([kv_b(latent_BTL) for kv_b, latent_BTL in zip(maps, latents)], axis=2)
        k_BTHR = jnp.broadcast_to(k_BTR[:, :, None], (*kv.shape[:3], spec.rope_dim))
        q_BTHC = jnp.concatenate([q_BTHN, q_BTHR], -1)
        k_BTHC = jnp.concatenate([kv[..., : spec.nope_dim], k_BTHR], -1)
        v_BTHE = kv[..., spec.nope_dim :]
        sow_weights(self, q_BTHC, k_BTHC, info, with_spans(Mask(), info), self._scores())
        order = info.positions, info.segment_ids, with_spans(Mask(), info)
        return self_attention(q_BTHC, k_BTHC, v_BTHE, *order, self._scores(), self.ctx.rules)

    def _attend_pages(
        self,
        q_BTHN,
        q_BTHR,
        latents: list[jax.Array],
        k_BTR,
        cache: dict,
        maps: list[LinearMap],
        info: TokenInfo,
    ) -> tuple[jax.Array, dict]:
        """The same result without keys and values: q . (W z) = (W^T q) . z, so heads attend to latents."""
        spec, split = self.spec, lambda x_BTHX: jnp.split(x_BTHX, self.spec.groups, axis=2)
        keys = [kv_b.part(slice(0, spec.nope_dim)) for kv_b in maps]
        values = [kv_b.part(slice(spec.nope_dim, None)) for kv_b in maps]
        q_BTHL = [key.einsum("BTHN,LHN->BTHL", q) for key, q in zip(keys, split(q_BTHN))]
        q_BTHX = jnp.concatenate([jnp.concatenate(q_BTHL, axis=2), q_BTHR], -1)
        new = {"latent": latents[0], "k_rope": k_BTR}
        if spec.groups > 1:  # the layout has one head a group, each with the rotated key
            k_BTGR = jnp.broadcast_to(k_BTR[:, :, None], (*k_BTR.shape[:2], spec.groups, spec.rope_dim))
            new = {"latent": jnp.stack(latents, axis=2), "k_rope": k_BTGR}
        layout = KVLayout(spec.groups, ("latent", "k_rope"), "latent")
        rest = info, with_spans(Mask(), info), self._scores(), self.ctx.rules
        out_BTHL, cache = attend_pages(q_BTHX, new, cache, layout, *rest)
        found = [value.einsum("BTHL,LHE->BTHE", out) for value, out in zip(values, split(out_BTHL))]
        return jnp.concatenate(found, axis=2), cache

    def _scores(self) -> Scores:
        spec = self.spec
        return Scores((spec.nope_dim + spec.rope_dim) ** -0.5 if spec.scale is None else spec.scale)

    def _linear(self, name: str, x_BTD: jax.Array, features: int, role: str) -> jax.Array:
        return linear(self, name, x_BTD, (features,), ("norm",), role, bias=self.spec.bias)

"""Attention between bytes and patches, both ways. Pagnoni et al. 2024, arXiv:2412.09871, sections 3.2.2 and 3.3.1.

As in the released models, a patch attends only to its own bytes, and a byte only to the last complete patch. A patch is
several vectors of a byte's width.
"""

# B batch, T bytes, S bytes that a patch may look at, P patches, N vectors of a patch, D width of a byte, W width of the
# latent transformer, H query heads, K key/value heads, G = H // K, C head width

from __future__ import annotations

import dataclasses
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.attention import (
    KEY_VALUE_AXES,
    combine_heads,
    key_value_pages,
    project_heads,
    read_pages,
    write_pages,
)
from model.blocks.common import Context, TokenInfo, fan_in_normal, weight_param
from model.blocks.linear import linear
from model.blocks.norms import Norm, RMSNorm
from model.blocks.patches import Patches, by_patch
from model.blocks.recurrence import SegmentOrder
from model.weights import matmul


@dataclasses.dataclass(frozen=True)
class PatchPool:
    """Pools a patch's bytes: each channel's largest value is mapped to `vectors` queries, which attend to the bytes."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    vectors: int = 2
    norm: Norm = RMSNorm()  # norms before the queries, and before keys and values
    qkv_bias: bool = False
    out_bias: bool = False

    def module(self, ctx: Context, name: str, latent_width: int) -> nn.Module:
        """A module that maps (h_BTD, patches, order, info, cache or None) to ([B, P, W], new state)."""
        return PatchPoolModule(self, dataclasses.replace(ctx, adapters=None), latent_width, name=name)

    def init_cache(self, num_pages: int, page_size: int, num_rows: int, width: int, dtype: jnp.dtype) -> dict:
        """Keys and values of every byte, and the largest values of the open patch [R, D]."""
        pages = key_value_pages(num_pages, page_size, self.num_kv_heads, self.head_dim, dtype)
        return pages | {"pooled": jnp.zeros((num_rows, width), dtype)}

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return KEY_VALUE_AXES | {"pooled": ("rows", None)}

    def flops_per_byte(self, width: int, latent_width: int, patches: float) -> float:
        """FLOPs of the forward pass.

        Args:
          patches: patches a byte.
        """
        heads = self.num_heads * self.head_dim
        byte_flops = 2 * width * 2 * self.num_kv_heads * self.head_dim + 2 * 2 * self.vectors * heads
        has_map = self.vectors * width != latent_width
        vector_flops = 2 * width * (width + 2 * heads) + 2 * has_map * width * latent_width
        return byte_flops + patches * self.vectors * vector_flops


class PatchPoolModule(nn.Module):
    spec: PatchPool
    ctx: Context
    latent_width: int

    @nn.compact
    def __call__(
        self, h_BTD: jax.Array, patches: Patches, order: SegmentOrder, info: TokenInfo, cache: dict | None
    ):
        spec, ctx, (B, _, D) = self.spec, self.ctx, h_BTD.shape
        P, N = patches.segment_BP.shape[1], spec.vectors
        pooled_BPD, pooled_BD = _pool(h_BTD, patches, order)
        q_BPND = linear(
            self, "pooled", pooled_BPD, (N, D), (None, None), "a patch's largest values to its queries"
        )
        read_BTD = spec.norm.module(ctx, "k_norm", role="what a patch reads from its bytes")(h_BTD)
        bytes_ = project_heads(self, read_BTD, {"k": "keys of the bytes", "v": "values of the bytes"})
        patch_BS = patches.patch_BT
        if cache is not None:
            cache = write_pages({name: cache[name] for name in "kv"}, bytes_, info) | {"pooled": pooled_BD}
            bytes_ = {name: read_pages(cache, name, info, spec.num_kv_heads, h_BTD.dtype) for name in "kv"}
            patch_BS = _patch_of_slots(patches, order, bytes_["k"].shape[1])
        q_BPD = q_BPND.reshape(B, P * N, D)
        normed_BPD = spec.norm.module(ctx, "q_norm", role="a patch's queries")(q_BPD)
        q_BPHC = project_heads(self, normed_BPD, {"q": "queries of a patch to its bytes"})["q"]
        found_BPNHC = attend_own_bytes(
            q_BPHC.reshape(B, P, N, *q_BPHC.shape[2:]), bytes_["k"], bytes_["v"], patch_BS
        )
        role = "adds the heads' outputs to the patch"
        found_BPD = combine_heads(self, found_BPNHC.reshape(q_BPHC.shape), role)
        # the attention adds q, and the released models add it again
        y_BPND = (2 * q_BPD + found_BPD).reshape(B, P, N, D)
        return self._latent(y_BPND), cache

    def _latent(self, y_BPND: jax.Array) -> jax.Array:
        (B, P, N, D), W = y_BPND.shape, self.latent_width
        if N * D == W:
            return y_BPND.reshape(B, P, W)
        axes, init = (None, "embed", None), fan_in_normal(N * D)
        role = "a patch's vectors to the latent transformer"
        w_NDW = weight_param(self, self.ctx, "latent", (N, D, W), axes, init, 2, role)
        return matmul(y_BPND, w_NDW, "BPND,NDW->BPW")


def _pool(h_BTD: jax.Array, patches: Patches, order: SegmentOrder) -> tuple[jax.Array, jax.Array]:
    """The largest values of each patch [B, P, D], and of the last byte's patch [B, D]."""
    P = patches.segment_BP.shape[1]
    pooled_BPD = by_patch(jax.ops.segment_max, h_BTD, patches.patch_BT, P)
    was_open_B1 = patches.open_B[:, None] > 0
    so_far_BD = jnp.where(was_open_B1, order.state["pooled"].astype(h_BTD.dtype), -jnp.inf)
    pooled_BPD = pooled_BPD.at[:, 0].max(so_far_BD)
    pooled_BPD = jnp.where(pooled_BPD == -jnp.inf, 0, pooled_BPD)
    last_B = order.last(patches.patch_BT)
    return pooled_BPD, jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))(pooled_BPD, last_B)


def _patch_of_slots(patches: Patches, order: SegmentOrder, S: int) -> jax.Array:
    """[B, S]: as `patch_BT`, for a row's slots: the bytes of this call, and before them those of patch 0."""
    since_BS = jnp.arange(S) - order.positions_BT[:, :1]
    T, P = patches.patch_BT.shape[1], patches.segment_BP.shape[1]
    new_BS = jnp.take_along_axis(patches.patch_BT, jnp.clip(since_BS, 0, T - 1), axis=1)
    is_new_BS, is_open_BS = (since_BS >= 0) & (since_BS < T), -since_BS <= patches.open_B[:, None]
    return jnp.where(is_new_BS, new_BS, jnp.where((since_BS < 0) & is_open_BS, 0, P))


def attend_own_bytes(
    q_BPNHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, patch_BS: jax.Array
) -> jax.Array:
    """Attention of each patch's vectors to the bytes of the patch, softmax in float32. Zero for a patch without bytes.

    Work and memory grow with the bytes, not with bytes times patches, because weights are summed by patch.

    Args:
      patch_BS: int32, the patch of each byte; P or more: none.
    """
    (B, P, N, H, C), K = q_BPNHC.shape, k_BSKC.shape[2]
    own = lambda x_BP: jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))(x_BP, patch_BS)
    q_BSNKGC = own(q_BPNHC.reshape(B, P, N, K, H // K, C))
    scores_BSNKG = jnp.einsum("BSNKGC,BSKC->BSNKG", q_BSNKGC, k_BSKC, preferred_element_type=jnp.float32)
    scores_BSNKG *= C**-0.5
    top_BPNKG = jax.lax.stop_gradient(by_patch(jax.ops.segment_max, scores_BSNKG, patch_BS, P))
    top_BPNKG = jnp.where(top_BPNKG == -jnp.inf, 0, top_BPNKG)
    in_patch_BS111 = (patch_BS < P)[:, :, None, None, None]
    weights_BSNKG = jnp.exp(jnp.where(in_patch_BS111, scores_BSNKG - own(top_BPNKG), 0))
    total_BPNKG = by_patch(jax.ops.segment_sum, weights_BSNKG, patch_BS, P)
    values_BSNKGC = weights_BSNKG[..., None] * v_BSKC[:, :, None, :, None].astype(jnp.float32)
    out_BPNKGC = by_patch(jax.ops.segment_sum, values_BSNKGC, patch_BS, P)
    # not the largest of the sum and a tiny number, whose derivative in forward mode is no number
    out_BPNKGC /= jnp.where(total_BPNKG > 0, total_BPNKG, 1.0)[..., None]
    return out_BPNKGC.reshape(q_BPNHC.shape).astype(q_BPNHC.dtype)


@dataclasses.dataclass(frozen=True)
class PatchAttention:
    """A mixer of the local decoder: each byte attends only to the vectors of the last complete patch."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: Norm = RMSNorm()  # norm of the patch's vectors
    qkv_bias: bool = False
    out_bias: bool = False

    def module(self, ctx: Context, name: str) -> nn.Module:
        """Each byte reads `info.patch_vectors` at `info.patch_read`."""
        return PatchAttentionModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """Empty: the row's state has the last patch's vectors once for all blocks."""
        return {}

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {}

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass, without the patches' keys and values."""
        return 2 * 2 * width * self.num_heads * self.head_dim

    def flops_per_patch(self, width: int, vectors: int) -> float:
        """FLOPs of the forward pass of a patch: its keys and values."""
        return 2 * 2 * vectors * width * self.num_kv_heads * self.head_dim


class PatchAttentionModule(nn.Module):
    spec: PatchAttention
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, (B, T, D) = self.spec, x_BTD.shape
        vectors_BPND, read_BT = cast(jax.Array, info.patch_vectors), cast(jax.Array, info.patch_read)
        (_, P, N, _), K, C = vectors_BPND.shape, spec.num_kv_heads, spec.head_dim
        q_BTHC = project_heads(self, x_BTD, {"q": "queries to the last complete patch"})["q"]
        norm = spec.norm.module(self.ctx, "k_norm", role="what bytes read from a patch's vectors")
        read_BPD = norm(vectors_BPND).reshape(B, P * N, D)
        roles = {"k": "keys of a patch's vectors", "v": "values of a patch's vectors"}
        k_BTNKC, v_BTNKC = (
            jax.vmap(lambda x, i: jnp.take(x, i, axis=0))(x_BPKC.reshape(B, P, N, K, C), read_BT)
            for x_BPKC in project_heads(self, read_BPD, roles).values()
        )
        q_BTKGC = q_BTHC.reshape(B, T, K, spec.num_heads // K, C)
        scores_BTKGN = jnp.einsum("BTKGC,BTNKC->BTKGN", q_BTKGC, k_BTNKC, preferred_element_type=jnp.float32)
        weights_BTKGN = jax.nn.softmax(scores_BTKGN * C**-0.5).astype(v_BTNKC.dtype)
        out_BTKGC = jnp.einsum("BTKGN,BTNKC->BTKGC", weights_BTKGN, v_BTNKC)
        role = "adds the heads' outputs to the residual stream"
        return combine_heads(self, out_BTKGC.reshape(q_BTHC.shape), role), cache

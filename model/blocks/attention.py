"""The attention mixer: grouped-query attention with cached decoding and packed segments.

Ainslie et al. 2023, arXiv:2305.13245; qk-norm: Dehghani et al. 2023, arXiv:2302.05442; sliding window: Beltagy et
al. 2020, arXiv:2004.05150; chunks and temperature: Llama 4; gate: Qiu et al. 2025, arXiv:2505.06708; a cache that
layers share: Brandon et al. 2024, arXiv:2405.12981.
"""

# B batch, T tokens, D model width, H query heads, K key/value heads, C head width
# N pages of the cache, Z slots a page, P pages a row, S = P * Z slots a row

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Carry, Context, Report, TokenInfo, param
from model.blocks.linear import Outputs, linear_out, linears
from model.blocks.norms import Norm
from model.blocks.positions import Alibi, RelativeBias, Rope
from model.kernels import backend
from model.kernels.attention import Mask, Scores, self_attention
from model.kernels.attention.reference import attention, self_attention_weights
from model.kernels.paged_attention import PAGED_ATTENTION, KVLayout, pages, request_for
from model.kernels.paged_attention.sharded import attend_on_mesh
from model.sharding import ShardingRules, constrain

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Llama 4, layers without rope: multiplies queries by 1 + amount * ln(1 + floor((position + 1) / every))."""

    every: float
    amount: float

    def __call__(self, q_BTHC: jax.Array, positions_BT: jax.Array) -> jax.Array:
        steps_BT = jnp.floor((positions_BT + 1).astype(jnp.float32) / self.every)
        growth_BT = 1 + self.amount * jnp.log1p(steps_BT)
        return (q_BTHC * growth_BT[:, :, None, None]).astype(q_BTHC.dtype)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Self-attention; `num_kv_heads` below `num_heads` shares keys and values among groups of heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None = Rope()
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None  # applied to queries and keys
    # what qk_norm normalizes: each head with one shared scale, each head with its own scale, or all heads together
    qk_norm_over: Literal["head", "own head", "all heads"] = "head"
    qk_norm_first: bool = True  # before rotary positions
    window: int | None = None  # tokens that a token sees, itself included; None: all before it
    chunk: int | None = None  # a token sees only its own chunk of this many positions
    alibi: Alibi | None = None
    relative: RelativeBias | None = None
    causal: bool = True  # False: tokens also see later tokens (an encoder, without a cache)
    scale: float | None = None  # multiplies the scores; None: head_dim ** -0.5
    softcap: float | None = None
    sinks: bool = False
    clip_qkv: float | None = None  # queries, keys and values stay within +-clip_qkv
    clip_first: bool = True  # before qk_norm
    gate: bool = False  # multiplies each head's output by the sigmoid of a projection of x
    temperature: Temperature | None = None
    key_scale: float = 1.0  # muP: multiplies the keys
    # "provide": later layers may use this layer's keys and values; "reuse": uses those of the last providing layer
    kv_sharing: Literal["none", "provide", "reuse"] = "none"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}. "
                "Each key/value head serves a whole group of query heads."
            )
        for name in ("window", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: a token sees at least itself, so give 1 or more, or None.")
        if self.rope is not None and self.rope.rotated(self.head_dim) % 2:
            raise ValueError(
                f"head_dim={self.head_dim} leaves an odd number of channels to rotate; rotary positions rotate "
                "pairs, so use an even width."
            )

        if self.relative is not None and self.alibi is not None:
            raise ValueError("relative and alibi are two biases of the scores; give one.")

    def module(self, ctx: Context, name: str) -> nn.Module:
        return AttentionModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """Empty pages {"k", "v"} of [N, Z, K * C]; none if another layer's are reused."""
        if self.kv_sharing == "reuse":
            return {}
        return key_value_pages(num_pages, page_size, self.num_kv_heads, self.head_dim, dtype)

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {} if self.kv_sharing == "reuse" else KEY_VALUE_AXES

    def mask(self) -> Mask:
        return Mask(self.causal, self.window, self.chunk)

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """Mean FLOPs of the forward pass over a row of `seq_len` tokens."""
        kv_heads = 0 if self.kv_sharing == "reuse" else self.num_kv_heads
        projections = 2 * width * self.head_dim * ((2 + self.gate) * self.num_heads + 2 * kv_heads)
        span = min(self.mask().span() or seq_len, seq_len)
        if not self.causal:
            seen = float(min(2 * span - 1, seq_len))
        elif self.chunk is not None and span == self.chunk:
            seen = (span + 1) / 2
        else:  # token i sees min(i, span) tokens
            seen = span * (seq_len - (span - 1) / 2) / seq_len
        return projections + 2 * 2 * seen * self.num_heads * self.head_dim


class AttentionModule(nn.Module):
    spec: Attention
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, carry = self.spec, self._relative_bias(info)
        own = QUERIES if spec.kv_sharing == "reuse" else QUERIES | KEYS_VALUES
        projected = project_heads(self, x_BTD, own)
        q_BTHC, keys_values = self._queries(projected["q"], info), self._keys_values(projected, info)
        scores, mask = self._scores(carry), with_spans(spec.mask(), info)
        if cache is None:
            k_BTKC, v_BTKC = keys_values["k"], keys_values["v"]
            sow_weights(self, q_BTHC, k_BTKC, info, mask, scores)
            order = info.positions, info.segment_ids
            out_BTHC = self_attention(q_BTHC, k_BTKC, v_BTKC, *order, mask, scores, self.ctx.rules)
        else:
            kv_layout, rest = KVLayout(spec.num_kv_heads), (info, mask, scores, self.ctx.rules)
            if spec.kv_sharing == "reuse":
                out_BTHC, _ = attend_pages(q_BTHC, None, keys_values, kv_layout, *rest)
            else:
                out_BTHC, cache = attend_pages(q_BTHC, keys_values, cache, kv_layout, *rest)
                keys_values = cache
        if spec.kv_sharing == "provide":
            carry = carry.update(Carry(shared_kv=dict(keys_values)))
        if spec.gate:
            gates = {"gate": "gate: scales each head's output"}
            out_BTHC = out_BTHC * nn.sigmoid(project_heads(self, x_BTD, gates)["gate"])
        return combine_heads(self, out_BTHC), cache, Report(carry=carry)

    def _queries(self, q_BTHC: jax.Array, info: TokenInfo) -> jax.Array:
        q_BTHC, temperature = self._placed("q", q_BTHC, "heads", info), self.spec.temperature
        return q_BTHC if temperature is None else temperature(q_BTHC, info.positions)

    def _keys_values(self, projected: dict[str, jax.Array], info: TokenInfo) -> dict[str, jax.Array]:
        """{"k", "v"} of these tokens, or the reused ones of an earlier layer."""
        spec = self.spec
        if spec.kv_sharing == "reuse":
            if info.carry.shared_kv is None:
                raise ValueError(
                    'kv_sharing="reuse", but no attention before this one has kv_sharing="provide".'
                )
            return info.carry.shared_kv
        k_BTKC = self._placed("k", projected["k"] * spec.key_scale, "kv_heads", info)
        return {"k": k_BTKC, "v": self._clip(projected["v"])}

    def _placed(self, name: str, x_BTHC: jax.Array, axis: str, info: TokenInfo) -> jax.Array:
        """Queries or keys, clipped, normalized and rotated."""
        spec = self.spec
        if spec.clip_first:
            x_BTHC = self._clip(x_BTHC)
        if spec.qk_norm_first:
            x_BTHC = self._qk_norm(name, x_BTHC, axis)
        if not spec.clip_first:
            x_BTHC = self._clip(x_BTHC)
        if spec.rope is not None:
            x_BTHC = spec.rope(x_BTHC, info.rotary_positions, info.segment_ids)
        return x_BTHC if spec.qk_norm_first else self._qk_norm(name, x_BTHC, axis)

    def _clip(self, x: jax.Array) -> jax.Array:
        limit = self.spec.clip_qkv
        return x if limit is None else jnp.clip(x, -limit, limit)

    def _qk_norm(self, name: str, x_BTHC: jax.Array, axis: str) -> jax.Array:
        norm, over = self.spec.qk_norm, self.spec.qk_norm_over
        if norm is None:
            return x_BTHC
        axes = ("head_dim",) if over == "head" else (axis, "head_dim")
        reduced, what = 2 if over == "all heads" else 1, "query" if name == "q" else "key"
        return norm.module(self.ctx, f"{name}_norm", *axes, reduced=reduced, role=f"each head's {what}")(
            x_BTHC
        )

    def _relative_bias(self, info: TokenInfo) -> Carry:
        """The table of `spec.relative`, this block's own or an earlier block's."""
        spec = self.spec
        if spec.relative is None:
            return Carry()
        if not spec.relative.own:
            if info.carry.relative_bias is None:
                raise ValueError(
                    "RelativeBias(own=False), but no attention before this one has a table of its own."
                )
            return Carry(relative_bias=info.carry.relative_bias)
        shape, init = (spec.relative.buckets, spec.num_heads), nn.initializers.normal(self.ctx.width**-0.5)
        role = "what attention adds to its scores at each range of distances"
        declared = self.ctx, "relative", shape, ("norm", "heads"), init, 0, role
        return Carry(relative_bias=param(self, *declared, decay=False))

    def _scores(self, carry: Carry) -> Scores:
        spec, sinks_H, bias = self.spec, None, None
        if spec.sinks:
            role = "one score a head that takes a share of the attention and adds no value"
            declared = "sinks", (spec.num_heads,), ("heads",), nn.initializers.zeros
            sinks_H = param(self, self.ctx, *declared, role=role)
        if spec.alibi is not None:
            slopes_H = spec.alibi.slopes(spec.num_heads)
            bias = lambda distance: slopes_H[:, None, None] * distance[..., None, :, :].astype(jnp.float32)
        if spec.relative is not None:
            bias = functools.partial(spec.relative, cast(jax.Array, carry.relative_bias), spec.causal)
        return Scores(spec.scale, spec.softcap, sinks_H, bias)


QUERIES = {"q": "queries: what each head looks for"}
KEYS_VALUES = {
    "k": "keys: what each token offers to be found by",
    "v": "values: what a token passes on when looked at",
}


def project_heads(module: Any, x_BTD: jax.Array, roles: Mapping[str, str]) -> dict[str, jax.Array]:
    """Projects [B, T, D] to {name: [B, T, H or K, C]} for each name of `roles`.

    "k" and "v" have the key/value heads of the module's spec, the others its query heads.
    """
    spec, ctx = module.spec, module.ctx
    axes = {name: "kv_heads" if name in ("k", "v") else "heads" for name in roles}
    heads = {"heads": spec.num_heads, "kv_heads": spec.num_kv_heads}
    outs: Outputs = {
        name: ((heads[axis], spec.head_dim), (axis, "head_dim"), roles[name]) for name, axis in axes.items()
    }
    projected = linears(module, x_BTD, outs, spec.qkv_bias)
    return {
        name: constrain(y_BTHC, ctx.rules, "batch", "length", f"act_{axes[name]}", None)
        for name, y_BTHC in projected.items()
    }


def combine_heads(
    module: Any, out_BTHC: jax.Array, role: str = "adds the heads' outputs to the residual stream"
) -> jax.Array:
    """Projects the heads' outputs to the model's width."""
    return linear_out(module, out_BTHC, ("heads", "head_dim"), role, bias=module.spec.out_bias)


def sow_weights(
    module: nn.Module,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    info: TokenInfo,
    mask: Mask = Mask(),
    scores: Scores = Scores(),
) -> None:
    """Sows attention weights for `model.inspect.trace`; outside a trace it does nothing."""
    if module.is_mutable_collection("intermediates"):
        weights = self_attention_weights(q_BTHC, k_BTKC, info.positions, info.segment_ids, mask, scores)
        module.sow("intermediates", "attention", weights)


PAGES = ("pages", "slots", "act_kv_heads")
KEY_VALUE_AXES: dict[str, tuple[str | None, ...]] = {"k": PAGES, "v": PAGES}


def key_value_pages(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> dict[str, jax.Array]:
    """Empty pages of keys and values, [N, Z, K * C] each; see model.kernels.paged_attention.pages."""
    size = num_pages, page_size, num_kv_heads, head_dim, dtype
    return pages.empty_pages("k", *size) | pages.empty_pages("v", *size)


def write_pages(cache: dict, new: dict[str, jax.Array], info: TokenInfo) -> dict:
    """Write each token's [B, T, ...] values to its page and slot; a token with a page out of range is not written."""
    return pages.write(cache, new, cast(jax.Array, info.write_page), cast(jax.Array, info.write_slot))


def read_pages(cache: dict, name: str, info: TokenInfo, heads: int, dtype: jnp.dtype) -> jax.Array:
    """[B, S, K, C]: slot s of a row holds position s."""
    return pages.read(cache, name, cast(jax.Array, info.page_table), heads, dtype)


def with_spans(mask: Mask, info: TokenInfo) -> Mask:
    """The mask with the prefixes and spans of the inputs."""
    if info.prefix is None and info.spans is None:
        return mask
    return dataclasses.replace(mask, prefix=info.prefix, spans_BT=info.spans)


def sees_slots(info: TokenInfo, mask: Mask, num_slots: int) -> jax.Array:
    """Which slots of its row each token sees, [B, T, S] bool; slot s holds position s.

    One call must hold a whole prefix or span, because slots that are not yet written have no keys.
    """
    slot_S = jnp.arange(num_slots)
    mask_BTS = mask.allows(info.positions[:, :, None], slot_S)
    # padding has the position of a real token, and writes no slot
    written_BT = (
        info.positions if info.segment_ids is None else jnp.where(info.segment_ids != 0, info.positions, -1)
    )
    if mask.prefix is not None:
        prefix_BT = mask.prefix[:, None] if mask.prefix.ndim == 1 else mask.prefix
        end_BT = jnp.minimum(prefix_BT, jnp.max(written_BT, axis=1, keepdims=True) + 1)
        mask_BTS |= (info.positions < prefix_BT)[:, :, None] & (slot_S < end_BT[..., None])
    if mask.spans_BT is not None:
        rows_B1 = jnp.arange(len(info.positions))[:, None]
        spans_BS = jnp.zeros((len(info.positions), num_slots), jnp.int32)
        at_BT = jnp.where(written_BT < 0, num_slots, written_BT)
        spans_BS = spans_BS.at[rows_B1, at_BT].set(mask.spans_BT, mode="drop")
        same_BTS = mask.spans_BT[:, :, None] == spans_BS[:, None]
        mask_BTS |= same_BTS & (mask.spans_BT != 0)[:, :, None]
    return mask_BTS if info.slots_filled is None else mask_BTS & info.slots_filled[:, None]


def attend_pages(
    q_BTHC: jax.Array,
    new: dict[str, jax.Array] | None,
    cache: dict,
    kv_layout: KVLayout,
    info: TokenInfo,
    mask: Mask,
    scores: Scores,
    rules: ShardingRules | None,
) -> tuple[jax.Array, dict]:
    """Attention of new tokens to their rows of the cache: (output [B, T, H, E], the cache with the new tokens).

    TPUs run the kernel, and so does one CPU if it has the native one. Other platforms gather rows, as these do where
    the kernel cannot serve: scores with a bias, masks with a prefix or spans, and tokens that do not directly follow
    those in the cache.

    Args:
      new: the arrays that `kv_layout` names, for these tokens; None: the cache holds them already.
    """
    platform = backend.current().name
    if scores.bias is None and not mask.listed() and (platform == "tpu" or backend.for_one_cpu()):
        request = request_for(q_BTHC, cache, kv_layout, mask, scores)
        by_kernel = platform == "tpu" or PAGED_ATTENTION.chosen_name(request) == "native"
        if by_kernel and info.cached is not None and info.page_table is not None:
            T = q_BTHC.shape[1]
            first_B, count_B = None, jnp.full_like(info.cached, T)
            if info.segment_ids is not None:
                real_BT = info.segment_ids != 0
                first_B = jnp.argmax(real_BT, axis=1).astype(jnp.int32) if T > 1 else None
                count_B = jnp.sum(real_BT, axis=1, dtype=jnp.int32)
            rows = info.page_table, info.cached, count_B
            return attend_on_mesh(q_BTHC, new, cache, *rows, kv_layout, mask, scores, rules, first_B)
    check_gathered_rows(
        "it has no score biases, no prefix and no spans, and its tokens directly follow the cached ones"
    )
    if new is not None:
        cache = write_pages(cache, new, info)
    parts = {name: read_pages(cache, name, info, kv_layout.heads, q_BTHC.dtype) for name in kv_layout.names}
    k_BSKC = kv_layout.key_of(parts)
    distance_BTS = jnp.arange(k_BSKC.shape[1]) - info.positions[:, :, None]
    mask_BTS = sees_slots(info, mask, k_BSKC.shape[1])
    return attention(q_BTHC, k_BSKC, parts[kv_layout.values], mask_BTS, scores, distance_BTS), cache


def check_gathered_rows(reason: str) -> None:
    """For attention to a cache without a kernel: logs it once on a TPU.

    Args:
      reason: why a TPU's kernel can't serve, as a clause.

    Raises:
      ValueError: the config names a kernel.
    """
    platform = backend.current().name
    PAGED_ATTENTION.require_plain(
        reason if platform != "gpu" else "it runs on tpu and cpu, and kernels here are for gpu"
    )
    if platform == "tpu":
        _log_gathered_rows(reason)


@functools.cache
def _log_gathered_rows(reason: str) -> None:
    _log.warning(
        "Some attention to a cache gathers whole rows, which costs memory and time. The kernel can't serve: %s.",
        reason,
    )

"""Patchers: patches of bytes end at uncertain next bytes, after words, or at a fixed length.

Pagnoni et al. 2024, arXiv:2412.09871, section 2. Whether a patch ends with a byte depends only on this and earlier
bytes. The first byte of a document is a patch by itself.
"""

# B batch, T bytes, P patches, W width of the patcher, V vocabulary, R rows of the state

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from model.blocks.block import Block
from model.blocks.common import Context, TokenInfo, fan_in_normal, param, weight_param
from model.blocks.norms import Norm, RMSNorm
from model.blocks.recurrence import SegmentOrder
from model.stacks import Stack, run_stack
from model.weights import Weight, matmul


@flax.struct.dataclass
class Clues:
    """What a patcher reads, for each byte of a call."""

    token_BT: jax.Array
    token_before_BT: jax.Array  # of the same document; 0: none
    index_BT: jax.Array  # index of the byte in its document, from 0
    entropy_BT: jax.Array | None = None  # of the next byte, nats, float32
    entropy_before_BT: jax.Array | None = None  # of this byte's prediction


ENTROPY_RULES: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "above": lambda entropy, before, threshold: entropy > threshold,
    "rise": lambda entropy, before, threshold: entropy - before > threshold,
}


@dataclasses.dataclass(frozen=True)
class EntropyPatcher:
    """A patch ends if a small byte model's entropy of the next byte is above a threshold, or rises by more than it.

    Section 2.3; the defaults are those of the released models.
    """

    width: int
    blocks: tuple[Block, ...]
    final_norm: Norm | None = RMSNorm()
    tied_head: bool = False
    threshold: float = 1.335442066192627  # nats
    rule: Literal["above", "rise"] = "above"

    def __post_init__(self):
        if not self.blocks or self.width < 1:
            raise ValueError("an entropy patcher needs at least one block and channel.")
        if self.rule not in ENTROPY_RULES:
            raise ValueError(f"rule={self.rule!r} is not one of {', '.join(ENTROPY_RULES)}.")

    @property
    def stack(self) -> Stack:
        return Stack("patcher", self.blocks)

    def ends(self, clues: Clues) -> jax.Array:
        """bool [B, T]: whether a patch ends with this byte."""
        entropy_BT, before_BT = cast(jax.Array, clues.entropy_BT), cast(jax.Array, clues.entropy_before_BT)
        return ENTROPY_RULES[self.rule](entropy_BT, before_BT, self.threshold)


@dataclasses.dataclass(frozen=True)
class SpacePatcher:
    """A patch ends with the first byte after a word that is not a part of it (section 2.2).

    ASCII letters and digits and UTF-8 continuation bytes are parts of words. Every special id also ends a patch.
    """

    special_ids: int = 4  # the byte b is the token b + special_ids

    def ends(self, clues: Clues) -> jax.Array:
        """bool [B, T]: whether a patch ends with this byte."""
        is_special_BT = clues.token_BT < self.special_ids
        return is_special_BT | (self._between(clues.token_BT) & ~self._between(clues.token_before_BT))

    def _between(self, token_BT: jax.Array) -> jax.Array:
        byte_BT = token_BT - self.special_ids
        within = [(ord("0"), ord("9")), (ord("A"), ord("Z")), (ord("a"), ord("z")), (0x80, 0xBF)]
        return ~jnp.any(jnp.stack([(byte_BT >= low) & (byte_BT <= high) for low, high in within]), axis=0)


@dataclasses.dataclass(frozen=True)
class StaticPatcher:
    """Every patch has `length` bytes, except a document's first."""

    length: int

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length={self.length}: a patch has at least one byte.")

    def ends(self, clues: Clues) -> jax.Array:
        """bool [B, T]: whether a patch ends with this byte."""
        return clues.index_BT % self.length == 0


Patcher = EntropyPatcher | SpacePatcher | StaticPatcher


@flax.struct.dataclass
class Patches:
    """The patches of the bytes of one call, numbered from 0; a patch left open by an earlier call comes first."""

    patch_BT: jax.Array  # int32, the patch of a byte; P: none, for padding and beyond the most patches
    read_BT: jax.Array  # int32, the document's last complete patch up to this byte; -1: none in this call
    position_BP: jax.Array  # int32, index of the patch in its document
    # int32, the document of each patch, 0: none; with a cache, 1 for the patches that end in this call
    segment_BP: jax.Array
    open_B: jax.Array  # int32, bytes of earlier calls in patch 0


def lay_out(
    ends_BT: jax.Array,
    order: SegmentOrder,
    segment_ids_BT: jax.Array | None,
    longest: int | None,
    most: int | None,
    cached: bool,
) -> tuple[Patches, dict[str, jax.Array]]:
    """(patches from the places where they end, the new state); `order` has the old state.

    Args:
      longest: most bytes of a patch; a longer one is split into patches of this length and a rest.
      most: patches of a row; bytes beyond them have none.
    """
    B, T = ends_BT.shape
    P, at = T if most is None else min(T, most), jnp.arange(T)
    real_BT = jnp.ones((B, T), bool) if segment_ids_BT is None else segment_ids_BT != 0
    since_B, made_B, longest = order.state["since"], order.state["made"], longest or jnp.iinfo(jnp.int32).max

    ends_BT |= _index(order) == 0
    starts_BT = order.first_BT | _after(ends_BT, since_B == 0)
    start_BT = jax.lax.cummax(jnp.where(starts_BT, at, -1), axis=1)
    length_BT = 1 + jnp.where(start_BT >= 0, at - start_BT, since_B[:, None] + at)
    since_B = order.last(jnp.where(ends_BT, 0, length_BT))
    open_B = order.state["since"] % longest

    ends_BT = real_BT & (ends_BT | (length_BT % longest == 0))
    starts_BT = real_BT & (order.first_BT | _after(ends_BT, open_B == 0))
    patch_BT = jnp.cumsum(starts_BT, axis=1) - 1 + (open_B[:, None] > 0)
    room_B1 = jnp.full((B, 1), P) if most is None else jnp.clip(most - made_B, 0, P)[:, None]
    read_BT = jnp.minimum(patch_BT + ends_BT, room_B1) - 1
    patch_BT = jnp.where(real_BT & (patch_BT >= 0) & (patch_BT < room_B1), patch_BT, P)

    marks_BT = ends_BT if cached else real_BT if segment_ids_BT is None else segment_ids_BT
    segment_BP = _largest(marks_BT.astype(jnp.int32), patch_BT, P)
    if segment_ids_BT is not None and not cached:
        own_BT = jnp.take_along_axis(segment_BP, jnp.maximum(read_BT, 0), axis=1) == segment_ids_BT
        read_BT = jnp.where(own_BT, read_BT, -1)
    first_BP = _largest(order.first_BT.astype(jnp.int32), patch_BT, P)
    number_P = jnp.arange(P)
    position_BP = made_B[:, None] + number_P - jax.lax.cummax(number_P * first_BP, axis=1)
    state = {"since": since_B, "made": made_B + ends_BT.sum(axis=1)}
    return Patches(patch_BT, read_BT, position_BP, segment_BP, open_B), state


def clues(
    order: SegmentOrder, token_BT: jax.Array, token_before_BT: jax.Array, entropy_BT: jax.Array | None
) -> Clues:
    """What a patcher reads of bytes; `order.state["entropy"]` is the entropy after the byte before them."""
    before_BT = None if entropy_BT is None else _after(entropy_BT, order.state["entropy"])
    return Clues(token_BT, token_before_BT, _index(order), entropy_BT, before_BT)


class PatcherModule(nn.Module):
    """The small byte model of `EntropyPatcher`."""

    patcher: EntropyPatcher
    vocab_size: int
    ctx: Context

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, states: dict | None, info: TokenInfo) -> tuple[jax.Array, dict]:
        """(entropy of the next byte [B, T] float32 nats, the new states of the blocks).

        The patcher has no gradient here; it is trained separately (see `model.patcher`).
        """
        patcher, ctx = self.patcher, self.ctx
        shape, axes = (self.vocab_size, ctx.width), ("vocab", "embed")
        init, role = nn.initializers.normal(ctx.width**-0.5), "the patcher's vector for each byte"
        embedding_VW = param(self, ctx, "embedding", shape, axes, init, role=role)
        x_BTW = jnp.take(embedding_VW, tokens_BT, axis=0)
        x_BTW, states, _ = run_stack(ctx, patcher.stack, x_BTW, states, info)
        if patcher.final_norm is not None:
            norm = patcher.final_norm.module(ctx, "final_norm", role="the patcher's last hidden state")
            x_BTW = norm(x_BTW)
        head_VW: Weight = embedding_VW
        if not patcher.tied_head:
            init, role = fan_in_normal(ctx.width), "the patcher's logits of the next byte"
            head_VW = weight_param(self, ctx, "head", shape, axes, init, (1,), role)
        logits_BTV = matmul(x_BTW, head_VW, "BTW,VW->BTV", jnp.float32)
        logprobs_BTV = jax.nn.log_softmax(jax.lax.stop_gradient(logits_BTV))
        return -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1), states


def by_patch(reduce: Callable[..., jax.Array], x_BTF: jax.Array, patch_BT: jax.Array, P: int) -> jax.Array:
    """[B, P, F]: a `jax.ops.segment_...` over the bytes of each patch, without those of patch P."""
    return jax.vmap(lambda x, patch: reduce(x, patch, P + 1))(x_BTF, patch_BT)[:, :P]


def _largest(x_BT: jax.Array, patch_BT: jax.Array, P: int) -> jax.Array:
    """[B, P] int32: the maximum of numbers from 0; 0 for a patch without bytes."""
    return jnp.maximum(by_patch(jax.ops.segment_max, x_BT, patch_BT, P), 0)


def _index(order: SegmentOrder) -> jax.Array:
    """[B, T]: the index of each byte in its document; before the first document start of a call, its position."""
    at = jnp.arange(order.first_BT.shape[1])
    first_BT = jax.lax.cummax(jnp.where(order.first_BT, at, -1), axis=1)
    return jnp.where(first_BT >= 0, at - first_BT, order.positions_BT)


def _after(x_BT: jax.Array, before_B: jax.Array) -> jax.Array:
    """The value of the byte before each."""
    return jnp.concatenate([before_B[:, None], x_BT[:, :-1]], axis=1)

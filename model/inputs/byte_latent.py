"""Byte-latent transformers: most blocks run on patches of bytes instead of bytes.

A local encoder reads bytes, each patch becomes one vector of the latent transformer (`ModelConfig.blocks`), and a local
decoder gives logits of the next byte; each byte reads the last complete patch. Pagnoni et al. 2024,
arXiv:2412.09871; details as in the released models.
"""

# B batch, T bytes, D width of a byte, P patches, N vectors of a patch, W width of the latent transformer

from __future__ import annotations

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.block import Block
from model.blocks.common import Context, Report, TokenInfo, add_up, fan_in_normal, weight_param, write_places
from model.blocks.ngrams import NGrams
from model.blocks.patch_attention import PatchAttention, PatchPool
from model.blocks.patches import (
    EntropyPatcher,
    Patcher,
    PatcherModule,
    Patches,
    by_patch,
    clues,
    lay_out,
)
from model.blocks.recurrence import ConvContext, SegmentOrder, begin, conv_context, finish
from model.stacks import Stack, StackModule, StackOutput, run_stack
from model.weights import matmul

PAGES = ("k", "v")  # the part of the state that grows with a row


@dataclasses.dataclass(frozen=True)
class ByteLatent:
    """The parts between bytes and the latent transformer.

    Arrays have a fixed size, so the latent transformer runs over `max_patches` patches in each row. Later bytes are in
    no patch: they read the last patch of their document. In a document without patches, only the local encoder and
    decoder read them.
    """

    width: int  # width of the embedding, the local encoder and decoder, and the last hidden state
    encoder: tuple[Block, ...]
    decoder: tuple[Block, ...]  # blocks with `PatchAttention` read the patches
    pool: PatchPool
    patcher: Patcher
    ngrams: NGrams | None = NGrams()
    longest_patch: int | None = None  # most bytes of a patch; None: any number
    max_patches: int | None = None  # most patches of a row; None: as many as bytes

    def __post_init__(self):
        for name in ("longest_patch", "max_patches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more, or None.")
        if not self.encoder or not any(isinstance(block.mixer, PatchAttention) for block in self.decoder):
            raise ValueError("a local encoder needs a block, and a local decoder one with PatchAttention.")

    @property
    def local_encoder(self) -> Stack:
        return Stack("local_encoder", self.encoder)

    @property
    def local_decoder(self) -> Stack:
        return Stack("local_decoder", self.decoder)

    @property
    def before(self) -> tuple[Stack, ...]:
        """Stacks over bytes that run before the latent transformer."""
        patcher = (self.patcher.stack,) if isinstance(self.patcher, EntropyPatcher) else ()
        return *patcher, self.local_encoder

    @property
    def after(self) -> tuple[Stack, ...]:
        """Stacks over bytes that run after it."""
        return (self.local_decoder,)

    @property
    def span(self) -> int:
        """The number of earlier bytes that patcher and n-grams read."""
        return max(1, self.ngrams.span if self.ngrams else 1)

    def patches(self, length: int) -> int:
        """The most patches in a row of `length` bytes."""
        return length if self.max_patches is None else min(length, self.max_patches)

    def flops_per_byte(self, latent_width: int, length: int) -> float:
        """FLOPs of the forward pass outside the blocks: to patches and back, in a row of `length` bytes."""
        patches, vectors = self.patches(length) / length, self.pool.vectors
        readers = [block.mixer for block in self.decoder if isinstance(block.mixer, PatchAttention)]
        reading = sum(2 * 2 * vectors * mixer.num_heads * mixer.head_dim for mixer in readers)
        patch_flops = sum(mixer.flops_per_patch(self.width, vectors) for mixer in readers)
        patch_flops += 2 * latent_width * vectors * self.width
        return self.pool.flops_per_byte(self.width, latent_width, patches) + reading + patches * patch_flops

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """The state beside the blocks': keys and values for patches, the row's last bytes and last complete patch."""
        return {
            **self.pool.init_cache(num_pages, page_size, num_rows, self.width, dtype),
            "recent": jnp.zeros((num_rows, self.span), jnp.int32),
            "entropy": jnp.zeros((num_rows,), jnp.float32),
            "since": jnp.zeros((num_rows,), jnp.int32),  # bytes since the last patch ended
            "made": jnp.zeros((num_rows,), jnp.int32),  # patches that have ended
            "last": jnp.zeros((num_rows, self.pool.vectors, self.width), dtype),
        }

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        one = ("rows",)
        rows = {
            "recent": ("rows", None),
            "entropy": one,
            "since": one,
            "made": one,
            "last": ("rows", None, None),
        }
        return self.pool.cache_axes() | rows

    def run(
        self,
        module: nn.Module,
        ctx: Context,
        latent: Stack,
        vocab_size: int,
        x_BTD: jax.Array,
        layers: dict | None,
        info: TokenInfo,
    ) -> StackOutput:
        """Everything between embedded bytes and the final norm. Call it within a compact method of `module`.

        Args:
          ctx: the context of the latent transformer.
          latent: the latent transformer's blocks.
        """
        own = {} if layers is None else layers["bytes"]
        rows = None if layers is None else {name: value for name, value in own.items() if name not in PAGES}
        embedded_BTD = x_BTD
        x_BTD, order = begin(cast(Any, self), x_BTD, info, rows)
        info = _ordered(info, order)
        tokens_BT = cast(jax.Array, info.tokens)
        recent = conv_context(tokens_BT, order.state["recent"], order)
        if self.ngrams is not None:
            back_BT = [recent.back(steps) for steps in range(self.ngrams.span + 1)]
            x_BTD += self.ngrams.module(dataclasses.replace(ctx, width=self.width), "ngrams")(back_BT)

        patches, state, states = self._patches(ctx, vocab_size, recent, order, layers, info)
        encoder_ctx, decoder_ctx = (
            dataclasses.replace(ctx, width=self.width, num_blocks=len(blocks))
            for blocks in (self.encoder, self.decoder)
        )
        local_encoder, local_decoder = (
            StackModule(stack, stack_ctx, name=stack.name)
            for stack, stack_ctx in ((self.local_encoder, encoder_ctx), (self.local_decoder, decoder_ctx))
        )
        h_BTD, new, aux = local_encoder(x_BTD, self.local_encoder.part_of(layers), info)
        states |= self.local_encoder.as_part(new)
        pool = self.pool.module(encoder_ctx, "pool", ctx.width)
        x_BPW, pooled = pool(h_BTD, patches, order, info, None if layers is None else own)
        x_BPW, new, more = _run_latent(module, ctx, latent, x_BPW, patches, order, layers, info)
        states, aux = states | new, add_up(aux, more)

        vectors_BPND = _vectors(module, encoder_ctx, x_BPW, order.state["last"])
        info = dataclasses.replace(info, patch_vectors=vectors_BPND, patch_read=patches.read_BT + 1)
        y_BTD, new, more = local_decoder(h_BTD, self.local_decoder.part_of(layers), info)
        states, aux = states | self.local_decoder.as_part(new), add_up(aux, more)
        if rows is not None:
            last_BND = jax.vmap(lambda vectors, i: vectors[i])(vectors_BPND, order.last(patches.read_BT + 1))
            state |= {"recent": recent.tail(order), "pooled": pooled["pooled"], "last": last_BND}
            y_BTD, rows = finish(y_BTD, state, order, info, rows)
            states |= {"bytes": {name: pooled[name] for name in PAGES} | cast(dict, rows)}
        return StackOutput(embedded_BTD, y_BTD, states, Report(aux))

    def _patches(
        self,
        ctx: Context,
        vocab_size: int,
        recent: ConvContext,
        order: SegmentOrder,
        layers: dict | None,
        info: TokenInfo,
    ) -> tuple[Patches, dict, dict]:
        """(the patches of the call, the new state so far, the new state of the patcher's blocks)."""
        entropy_BT, states, patcher = None, {}, self.patcher
        tokens_BT = cast(jax.Array, info.tokens)
        if isinstance(patcher, EntropyPatcher):
            own = dataclasses.replace(ctx, width=patcher.width, num_blocks=len(patcher.blocks), adapters=None)
            module = PatcherModule(patcher, vocab_size, own, name="patcher")
            entropy_BT, states = module(tokens_BT, patcher.stack.part_of(layers), info)
            states = patcher.stack.as_part(states)
        ends_BT = self.patcher.ends(clues(order, tokens_BT, recent.back(1), entropy_BT))
        limits = self.longest_patch, self.max_patches
        patches, state = lay_out(ends_BT, order, info.segment_ids, *limits, cached=layers is not None)
        state["entropy"] = order.state["entropy"] if entropy_BT is None else order.last(entropy_BT)
        return patches, state, states


def _ordered(info: TokenInfo, order: SegmentOrder) -> TokenInfo:
    """`info` in a recurrence's order."""
    if order.permutation_BT is None:
        return info
    names = ("tokens", "positions", "segment_ids", "write_page", "write_slot", "weights")
    given = {name: getattr(info, name) for name in names if getattr(info, name) is not None}
    return dataclasses.replace(info, **{name: order.permute(value) for name, value in given.items()})


def _run_latent(
    module: nn.Module,
    ctx: Context,
    latent: Stack,
    x_BPW: jax.Array,
    patches: Patches,
    order: SegmentOrder,
    layers: dict | None,
    info: TokenInfo,
) -> tuple[jax.Array, dict, dict]:
    """The latent transformer; with a cache it is skipped in a call in which no patch ends."""
    patch_info = TokenInfo(patches.position_BP, patches.segment_BP, adapter=info.adapter)
    if info.weights is not None:
        weights_BPF = by_patch(jax.ops.segment_sum, info.weights[..., None], patches.patch_BT, x_BPW.shape[1])
        patch_info = dataclasses.replace(patch_info, weights=weights_BPF[..., 0])
    if layers is None:
        y_BPW, states, report = run_stack(ctx, latent, x_BPW, None, patch_info)
        return y_BPW, states, report.aux
    page_table, page_size = cast(jax.Array, info.page_table), layers["bytes"]["k"].shape[1]
    page, slot = write_places(page_table, page_size, patches.position_BP, patches.segment_BP == 0)
    patch_info = TokenInfo(
        patches.position_BP, patches.segment_BP, page_table, page, slot, rows=info.rows, adapter=info.adapter
    )
    old = {name: layers[name] for name, _, _ in latent.runs(ctx.scan)}
    y_BPW, new = nn.cond(
        jnp.any(patches.segment_BP != 0),
        lambda module, x: run_stack(ctx, latent, x, old, patch_info)[:2],
        lambda module, x: (x, old),
        module,
        x_BPW,
    )
    return y_BPW, new, {}


def _vectors(module: Any, ctx: Context, x_BPW: jax.Array, last_BND: jax.Array) -> jax.Array:
    """[B, 1 + P, N, D]: the vectors of the last patch of earlier calls, then those of each patch; zero: no patch."""
    shape, axes = (x_BPW.shape[-1], *last_BND.shape[1:]), ("embed", None, None)
    role = "what the local decoder reads from a patch"
    w_WND = weight_param(module, ctx, "from_latent", shape, axes, fan_in_normal(shape[0]), 1, role)
    vectors_BPND = matmul(x_BPW, w_WND, "BPW,WND->BPND")
    return jnp.concatenate([last_BND[:, None].astype(x_BPW.dtype), vectors_BPND], axis=1)

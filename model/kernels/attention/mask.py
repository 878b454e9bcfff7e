"""Attention masks, as a small algebra. An implementation may refuse parts of it by name."""

# B batch, T queries, S keys

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Mask:
    """The tokens of its own segment that a token sees.

    `causal`, `window` and `chunk` each hide keys by position. `prefix` and `spans_BT` then show keys again: tokens of
    one prefix, or of one span, see each other both ways. `tree_BTT` replaces all of them.
    """

    causal: bool = flax.struct.field(pytree_node=False, default=True)  # hides keys after the query
    # hides keys `window` or more positions away; a causal query sees at most `window` keys
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    # hides keys outside the query's chunk of positions
    chunk: int | None = flax.struct.field(pytree_node=False, default=None)
    # int32: tokens at smaller positions are the prefix; [B], or [B, T] for packed documents
    prefix: jax.Array | None = None
    spans_BT: jax.Array | None = None  # int32: the span of each token, for example an image; 0: none
    tree_BTT: jax.Array | None = (
        None  # bool [B, T, T]: the tokens that each token sees, for example in a tree of drafts
    )

    def allows(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """bool: `causal`, `window` and `chunk` for positions of any shapes that broadcast."""
        seen = (
            key <= query
            if self.causal
            else jnp.broadcast_to(True, jnp.broadcast_shapes(query.shape, key.shape))
        )
        if self.window is not None:
            seen &= query - key < self.window
            if not self.causal:
                seen &= key - query < self.window
        if self.chunk is not None:
            seen &= query // self.chunk == key // self.chunk
        return seen

    def within(
        self, queries: slice, keys: slice, positions_BT: jax.Array, segment_ids_BT: jax.Array | None
    ) -> jax.Array:
        """bool [B or 1, T, S]: the mask of self-attention between two parts of the row."""
        at_T, at_S = (jnp.arange(s.start, s.stop) for s in (queries, keys))
        mask_BTS = dataclasses.replace(self, chunk=None).allows(at_T[:, None], at_S[None])[None]
        if self.chunk is not None:
            mask_BTS = mask_BTS & _pairs(positions_BT // self.chunk, queries, keys)
        if self.prefix is not None:
            prefix_BT = self.prefix[:, None] if self.prefix.ndim == 1 else self.prefix
            inside_BT = positions_BT < prefix_BT
            mask_BTS = mask_BTS | (inside_BT[:, queries, None] & inside_BT[:, None, keys])
        if self.spans_BT is not None:
            inside_BT1 = (self.spans_BT != 0)[:, queries, None]
            mask_BTS = mask_BTS | (_pairs(self.spans_BT, queries, keys) & inside_BT1)
        if self.tree_BTT is not None:
            mask_BTS = self.tree_BTT[:, queries, keys]
        if segment_ids_BT is not None:
            mask_BTS = mask_BTS & _pairs(segment_ids_BT, queries, keys)
        return mask_BTS

    def span(self) -> int | None:
        """The most keys that a query sees to one side, itself included; None: all."""
        if self.listed():
            return None
        return min((n for n in (self.window, self.chunk) if n is not None), default=None)

    def listed(self) -> tuple[str, ...]:
        """The names of parts that are arrays, not rules of positions."""
        parts = {"prefix": self.prefix, "spans": self.spans_BT, "tree": self.tree_BTT}
        return tuple(name for name, array in parts.items() if array is not None)

    def without(self, *parts: str) -> str | None:
        """The refusal of an implementation without these parts; None: this mask has none of them."""
        has = {
            "window": self.window is not None,
            "window to both sides": self.window is not None and not self.causal,
            "keys ahead of a query": not self.causal,
            "chunks": self.chunk is not None,
            **{name: name in self.listed() for name in LISTED},
        }
        lacking = next((part for part in parts if has[part]), None)
        return None if lacking is None else f"its masks have no {lacking}"


LISTED = ("prefix", "spans", "tree")


def _pairs(ids_BT: jax.Array, queries: slice, keys: slice) -> jax.Array:
    """bool [B, T, S]: whether a query and a key have the same id."""
    return ids_BT[:, queries, None] == ids_BT[:, None, keys]


def chunk_segment_ids(
    positions_BT: jax.Array, segment_ids_BT: jax.Array | None, chunk: int | None
) -> jax.Array | None:
    """An id for each chunk of each segment, [B, T] int32; None if the row is one segment without chunks."""
    if chunk is None:
        return segment_ids_BT
    chunk_BT = positions_BT // chunk
    if segment_ids_BT is None:
        return chunk_BT
    return segment_ids_BT * (jnp.max(chunk_BT) + 1) + chunk_BT

"""What a model reads: token ids, and whatever else is given beside them."""

# B batch, T tokens, S tokens of the encoder, A axes of a position

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model.inputs.media import Media

__all__ = ["Inputs", "Media"]


@flax.struct.dataclass
class Inputs:
    """One pytree with everything that a forward pass reads beside parameters and cache; only `tokens` is needed."""

    tokens: jax.Array  # [B, T] int32
    # [B, T] int32; default: 0, 1, ... in each segment or, with a cache, of the real tokens, counted on from its length.
    # [B, T, A] int32 is for rotary positions of several axes (M-RoPE); masks and caches then go by the default
    positions: jax.Array | None = None
    # [B, T] int32; tokens see their own segment only, 0 is padding. With a cache, 0 keeps a token out of the cache and
    # any other number means a real token
    segment_ids: jax.Array | None = None
    token_types: jax.Array | None = None  # [B, T] int32, below `cfg.token_types`; default: 0
    # [B, S] int32, what an encoder-decoder answers. A cache remembers them: they are given with the first tokens of a
    # row and not again
    encoder_tokens: jax.Array | None = None
    encoder_positions: jax.Array | None = None  # [B, S] int32; default: 0, 1, ...
    # [B, S] int32; a token sees the encoder's tokens of its own segment (with a cache: of any segment), none of 0
    encoder_segment_ids: jax.Array | None = None
    adapter_ids: jax.Array | None = (
        None  # [B] int32, adapter of each row, -1 for none; default: the first for all rows
    )
    # [B, T] float32, weight of each token in the losses of `aux`; default: 1. Padding never counts
    loss_weights: jax.Array | None = None
    # int32: tokens of a document at positions before it see each other both ways; [B], or [B, T] for packed documents
    prefix: jax.Array | None = None
    spans: jax.Array | None = (
        None  # [B, T] int32: tokens of one span, as an image, see each other both ways; 0: none
    )
    media: dict[str, Media] = flax.struct.field(default_factory=dict)  # by the name of one of `cfg.media`

    @classmethod
    def of(cls, inputs: Inputs | jax.Array) -> Inputs:
        """`inputs` itself, or bare token ids [B, T] as Inputs. Raises TypeError or ValueError for anything else."""
        if isinstance(inputs, Inputs):
            return inputs
        if isinstance(inputs, dict):
            raise TypeError(
                f"inputs is a dict with {', '.join(map(str, inputs))}. Use Inputs.from_batch(batch), or "
                "Inputs(tokens=...)."
            )
        if jnp.ndim(inputs) != 2:
            raise ValueError(f"token ids have shape {jnp.shape(inputs)}. Give [batch, tokens].")
        return cls(inputs)

    @classmethod
    def from_batch(cls, batch: dict[str, jax.Array], **more: Any) -> Inputs:
        """The tokens, positions and segments of a packed batch; `more` are further fields."""
        return cls(batch["tokens"], batch.get("positions"), batch.get("segment_ids"), **more)

"""The inputs of a model: token ids and everything beside them."""

# B batch, T tokens, S tokens of the encoder, A axes of a position

from __future__ import annotations

from typing import Any

import flax.struct
import jax

from model.inputs.media import Media

__all__ = ["Inputs", "Media"]


@flax.struct.dataclass
class Inputs:
    """Everything that a forward pass reads beside parameters and cache; only `tokens` is required."""

    tokens: jax.Array  # [B, T] int32
    # [B, T] int32; default: 0, 1, ... in each segment or, with a cache, the next positions for the real tokens.
    # [B, T, A] int32 is for rotary positions of several axes (M-RoPE); masks and caches then use the default
    positions: jax.Array | None = None
    # [B, T] int32; tokens see only their own segment; 0 is padding. With a cache, tokens of segment 0 are not cached,
    # and all others are real
    segment_ids: jax.Array | None = None
    token_types: jax.Array | None = None  # [B, T] int32, below `cfg.token_types`; default: 0
    # [B, S] int32, the encoder's tokens. A cache stores the encoder's keys and values, so give them only with the first
    # tokens of a row
    encoder_tokens: jax.Array | None = None
    encoder_positions: jax.Array | None = None  # [B, S] int32; default: 0, 1, ...
    # [B, S] int32; a token sees encoder tokens of its own segment (with a cache: of any segment but 0)
    encoder_segment_ids: jax.Array | None = None
    # [B] int32, each row's adapter, -1: none; default: the first for all rows
    adapter_ids: jax.Array | None = None
    # [B, T] float32, each token's weight in the losses of `aux`; default: 1. Padding has weight 0
    loss_weights: jax.Array | None = None
    # int32: tokens at earlier positions of a document see each other both ways; [B], or [B, T] for packed documents
    prefix: jax.Array | None = None
    # [B, T] int32: tokens of one span, for example an image, see each other both ways; 0: no span
    spans: jax.Array | None = None
    embedding_noise: jax.Array | None = None  # [B, T, D], added to the embedding of tokens and media
    # name of one of `cfg.media` -> its media
    media: dict[str, Media] = flax.struct.field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs | jax.Array) -> Inputs:
        """`inputs` itself, or bare token ids [B, T] as Inputs. Raises TypeError or ValueError for anything else."""
        if isinstance(inputs, Inputs):
            _check_shape(inputs.tokens)
            return inputs
        if isinstance(inputs, dict):
            raise TypeError(
                f"inputs is a dict with {', '.join(map(str, inputs))}. Use Inputs.from_batch(batch), or "
                "Inputs(tokens=...)."
            )
        _check_shape(inputs)
        return cls(inputs)

    @classmethod
    def from_batch(cls, batch: dict[str, jax.Array], **more: Any) -> Inputs:
        """The tokens, positions and segments of a packed batch; `more` sets further fields."""
        return cls(batch["tokens"], batch.get("positions"), batch.get("segment_ids"), **more)


def _check_shape(tokens: jax.Array) -> None:
    if not hasattr(tokens, "shape"):
        raise TypeError(f"token ids are a {type(tokens).__name__}. Give an array: jnp.asarray(...).")
    if len(tokens.shape) != 2:
        raise ValueError(f"token ids have shape {tokens.shape}. Give [batch, tokens].")

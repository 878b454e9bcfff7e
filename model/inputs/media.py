"""Media among the tokens: vectors made of images, sound or actions take the places of some tokens' embeddings."""

# B batch, T tokens, N items a row, D model width

from __future__ import annotations

from typing import Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from model.blocks.common import Context


@flax.struct.dataclass
class Media:
    """Items of one kind (patches of images, frames of sound) and the tokens whose places they fill."""

    values: jax.Array  # [B, N, ...], as the kind's encoder reads them
    places: jax.Array  # [B, N] int32, index of a token in its row; -1: the item is padding


class MediaInput(Protocol):
    """A kind of media, one of `ModelConfig.media`; a frozen dataclass."""

    @property
    def name(self) -> str:
        """The key of `Inputs.media`, and of its parameters."""
        ...

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Of one item's values."""
        ...

    def module(self, ctx: Context, name: str) -> nn.Module:
        """Called with values [B, N, ...]; gives a vector for each item, [B, N, D]."""
        ...


def place_media(
    ctx: Context, kinds: tuple[MediaInput, ...], media: dict[str, Media], x_BTD: jax.Array
) -> jax.Array:
    """The embeddings with each item's vector in its place. Call it within a compact method.

    Raises:
      ValueError: media of a kind that the model does not read.
    """
    names = [kind.name for kind in kinds]
    if unknown := sorted(set(media) - set(names)):
        known = f"It reads {', '.join(names)}." if names else "It reads tokens alone."
        raise ValueError(f"inputs.media has {', '.join(unknown)}, which this model does not read. {known}")
    B, T, _ = x_BTD.shape
    for kind in kinds:
        if kind.name not in media:
            continue
        item = media[kind.name]
        vectors_BND = kind.module(ctx, kind.name)(item.values)
        at_BN = jnp.where(item.places < 0, T, item.places)  # beyond the row: dropped
        x_BTD = x_BTD.at[jnp.arange(B)[:, None], at_BN].set(vectors_BND.astype(x_BTD.dtype), mode="drop")
    return x_BTD


def example_media(kinds: tuple[MediaInput, ...]) -> dict[str, Media]:
    """One item of zeros of each kind."""
    place = jnp.zeros((1, 1), jnp.int32)
    return {kind.name: Media(jnp.zeros((1, 1, *kind.item_shape)), place) for kind in kinds}

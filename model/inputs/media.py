"""Media among the tokens: vectors of images, sound or actions replace the embeddings of some tokens."""

# B batch, T tokens, N media vectors a row, D model width

from __future__ import annotations

from typing import Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from model.blocks.common import Context


@flax.struct.dataclass
class Media:
    """Media of one kind (image patches, frames of sound) and the tokens that they replace."""

    values: jax.Array  # [B, N, ...], the input of the kind's encoder
    places: jax.Array  # [B, N] int32, index of a token in its row; -1: padding


class MediaInput(Protocol):
    """A kind of media, one of `ModelConfig.media`; a frozen dataclass."""

    @property
    def name(self) -> str:
        """The key in `Inputs.media` and in the parameters."""
        ...

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of the values of one vector."""
        ...

    def module(self, ctx: Context, name: str) -> nn.Module:
        """A module that maps values [B, N, ...] to vectors [B, N, D]."""
        ...


def place_media(
    ctx: Context, kinds: tuple[MediaInput, ...], media: dict[str, Media], x_BTD: jax.Array
) -> jax.Array:
    """The embeddings with each media vector in its place. Call it within a compact method.

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
        given = media[kind.name]
        vectors_BND = kind.module(ctx, kind.name)(given.values)
        at_BN = jnp.where(given.places < 0, T, given.places)  # beyond the row: dropped
        x_BTD = x_BTD.at[jnp.arange(B)[:, None], at_BN].set(vectors_BND.astype(x_BTD.dtype), mode="drop")
    return x_BTD


def example_media(kinds: tuple[MediaInput, ...]) -> dict[str, Media]:
    """One vector of zeros of each kind."""
    place = jnp.zeros((1, 1), jnp.int32)
    return {kind.name: Media(jnp.zeros((1, 1, *kind.item_shape)), place) for kind in kinds}

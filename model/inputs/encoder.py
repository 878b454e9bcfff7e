"""The encoder of an encoder-decoder; the decoder's blocks read its output by cross attention."""

# B batch, S tokens of the encoder, V vocabulary, D model width

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp

from model.blocks.block import Block
from model.blocks.common import Context, TokenInfo
from model.blocks.norms import Norm, RMSNorm
from model.stacks import Stack, StackModule
from model.weighted import WeightedSum
from model.weights import Weight, take_rows


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Blocks over the encoder's tokens; encoder and decoder share the embedding."""

    blocks: tuple[Block, ...]
    final_norm: Norm | None = RMSNorm()

    def __post_init__(self):
        if not self.blocks:
            raise ValueError("an encoder needs at least one block.")

    @property
    def stack(self) -> Stack:
        return Stack("encoder", self.blocks)

    def read(
        self, ctx: Context, embedding_VD: Weight, scale: float, info: TokenInfo
    ) -> tuple[jax.Array, dict[str, WeightedSum]]:
        """(hidden states after the final norm [B, S, D], the blocks' aux). Call it within a compact method.

        Args:
          scale: multiplies the embeddings.
          info: the `TokenInfo` of the encoder's tokens.
        """
        ctx = dataclasses.replace(ctx, num_blocks=len(self.blocks))
        x_BSD = take_rows(embedding_VD, cast(jax.Array, info.tokens), ctx.dtype) * jnp.asarray(
            scale, ctx.dtype
        )
        module = StackModule(self.stack, ctx, self.final_norm, "what the encoder gives", name="encoder")
        x_BSD, _, aux = module(x_BSD, None, info)
        return x_BSD, aux

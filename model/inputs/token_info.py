"""Builds `TokenInfo`: positions, segments and places in the cache."""

# B batch, T tokens

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from model.blocks.common import TokenInfo, write_places
from model.cache import Cache, page_size_of
from model.config import ModelConfig
from model.inputs import Inputs


def token_info(cfg: ModelConfig, inputs: Inputs, cache: Cache | None) -> TokenInfo:
    """The `TokenInfo` of the inputs' tokens, which follow those in the cache."""
    tokens, positions, segment_ids = inputs.tokens, inputs.positions, inputs.segment_ids
    B, T = tokens.shape
    in_order = cache is not None and positions is None and cfg.byte_latent is None
    several = positions is not None and positions.ndim == 3
    rope_positions = positions if several else None
    if positions is None or several:
        positions = jnp.broadcast_to(places_in_documents(segment_ids, T, cache), (B, T))
    info = TokenInfo(
        positions,
        segment_ids,
        tokens=tokens,
        rope_positions=rope_positions,
        adapter=inputs.adapter_ids,
        weights=inputs.loss_weights,
        prefix=inputs.prefix,
        spans=inputs.spans,
    )
    if cache is None:
        return info
    rows = jnp.arange(B, dtype=jnp.int32) if cache.rows is None else cache.rows
    page_size = page_size_of(cfg, cache.layers)
    info = dataclasses.replace(info, rows=rows)
    if page_size is None:
        return info
    skipped = None if segment_ids is None else segment_ids == 0
    page, slot = write_places(cache.page_table, page_size, positions, skipped)
    cached = cache.length if in_order or several else None
    return dataclasses.replace(
        info, page_table=cache.page_table, write_page=page, write_slot=slot, cached=cached
    )


def encoder_info(inputs: Inputs) -> TokenInfo:
    """The `TokenInfo` of the encoder's tokens."""
    tokens, positions, segment_ids = (
        inputs.encoder_tokens,
        inputs.encoder_positions,
        inputs.encoder_segment_ids,
    )
    assert tokens is not None
    if positions is None:
        positions = jnp.broadcast_to(places_in_documents(segment_ids, tokens.shape[1], None), tokens.shape)
    return TokenInfo(positions, segment_ids, tokens=tokens, adapter=inputs.adapter_ids)


def places_in_documents(segment_ids: jax.Array | None, T: int, cache: Cache | None) -> jax.Array:
    """[B or 1, T] int32: the index of each token in its document. Padding on either side does not count."""
    at_T = jnp.arange(T, dtype=jnp.int32)
    if cache is None:
        if segment_ids is None:
            return at_T[None]
        first_BT = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        return at_T - jax.lax.cummax(jnp.where(first_BT, at_T, 0), axis=1)
    if segment_ids is None:
        return cache.length[:, None] + at_T
    before_BT = jnp.cumsum(segment_ids != 0, axis=1, dtype=jnp.int32) - 1
    return cache.length[:, None] + jnp.maximum(before_BT, 0)

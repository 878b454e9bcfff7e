"""The embedding of tokens, with token types, positions and a norm if the config has them."""

# B batch, T tokens, V vocabulary, K kinds of tokens, D model width

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, TokenInfo, param, quantized_param
from model.config import ModelConfig
from model.sharding import constrain
from model.weights import Weight, take_rows


def embedding_table(module: nn.Module, cfg: ModelConfig, ctx: Context) -> Weight:
    """The embedding table [V, D], perhaps quantized. Call this and the other functions here within a compact method."""
    # With this scale tied logits start near 1, and the first blocks do not dominate the token's vector.
    init = nn.initializers.normal(ctx.width**-0.5)
    role = "a vector for each token" + (", in and out (tied head)" if cfg.tied_head else "")
    shape, axes = (cfg.vocab_size, ctx.width), ("vocab", "embed")
    found = quantized_param(module, "embedding", shape)
    return param(module, ctx, "embedding", shape, axes, init, role=role) if found is None else found


def embed_tokens(
    module: nn.Module,
    cfg: ModelConfig,
    ctx: Context,
    embedding_VD: Weight,
    tokens_BT: jax.Array,
    token_types_BT: jax.Array | None,
) -> jax.Array:
    """The token vectors [B, T, D], before media; `finish_embedding` adds the rest."""
    x_BTD = take_rows(embedding_VD, tokens_BT, ctx.dtype)
    x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, x_BTD.dtype)
    if cfg.token_types:
        shape, init = (cfg.token_types, ctx.width), nn.initializers.normal(0.1 * ctx.width**-0.5)
        role = "a vector for each kind of token"
        table_KD = param(module, ctx, "token_types", shape, ("norm", "embed"), init, role=role)
        x_BTD += table_KD[0] if token_types_BT is None else jnp.take(table_KD, token_types_BT, axis=0)
    elif token_types_BT is not None:
        raise ValueError("token_types were given to a model without token types.")
    return x_BTD


def finish_embedding(cfg: ModelConfig, ctx: Context, x_BTD: jax.Array, info: TokenInfo) -> jax.Array:
    """The embedding [B, T, D] with positions and norm."""
    if cfg.positions is not None:
        x_BTD += cfg.positions.module(ctx, "positions")(info.positions)
    if cfg.embed_norm is not None:
        x_BTD = cfg.embed_norm.module(ctx, "embed_norm", role="what the first block reads")(x_BTD)
    return constrain(x_BTD, ctx.rules, "batch", "length", "act_embed")

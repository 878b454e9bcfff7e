"""The pure function: every forward pass anywhere (loss, rollout, serving, evaluation, reward) is `apply`."""

# B batch, T tokens, S tokens of the encoder, D model width, V vocabulary, N chosen positions, L labels

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from model.blocks.block import run_part, run_stack
from model.blocks.common import Context, More, TokenInfo, add_up, fan_in_normal, param, write_places
from model.byte_latent import run_byte_latent
from model.cache import Cache, page_size_of
from model.config import ClassHead, Encoder, ModelConfig, ScalarHead
from model.kernels import backend
from model.logprobs import ScoreOptions, TokenScores
from model.readouts.mtp import Stream, look_ahead
from model.sharding import ShardingRules, constrain
from model.vocabulary_head import VocabularyHead

Params = dict[str, Any]


@flax.struct.dataclass
class Output:
    logits: jax.Array  # [B, T, V] float32 ([B, N, V] when `logits_at` was given); None when `targets` were
    hidden: jax.Array  # [B, T, D] after the final norm
    pooled: jax.Array | None = None  # [B, T, D] what the pooler makes of each token; BERT uses the first
    encoder: jax.Array | None = (
        None  # [B, S, D] what the encoder made of its tokens, where it has just read them
    )
    cache: Cache | None = None
    aux: dict = flax.struct.field(default_factory=dict)  # name -> WeightedSum
    heads: dict = flax.struct.field(default_factory=dict)  # name -> [B, T] float32, or [B, T, labels]
    # as `logits`, of the token after the next, of the one after that, ...; () with a cache. Under jit none of it is
    # computed for who does not use it
    mtp_logits: tuple[jax.Array, ...] = ()
    mtp_aux: dict = flax.struct.field(
        default_factory=dict
    )  # as `aux`, of the blocks of multi-token prediction alone
    scores: TokenScores | None = None  # of `targets`, [B, T] float32
    # as `scores`, in place of `mtp_logits`: module k's of the target k tokens ahead, of 0 beyond the row
    mtp_scores: tuple[TokenScores, ...] = ()


class Source(NamedTuple):
    """What the encoder reads."""

    tokens: jax.Array | None = None
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters, `cfg.param_dtype`; a nested dict of arrays."""
    return nn.meta.unbox(_init_boxed(cfg, key))


def apply(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    *,
    logits_at: jax.Array | None = None,
    targets: jax.Array | None = None,
    ask: ScoreOptions = ScoreOptions(),
    token_types: jax.Array | None = None,
    encoder_tokens: jax.Array | None = None,
    encoder_positions: jax.Array | None = None,
    encoder_segment_ids: jax.Array | None = None,
    adapter: jax.Array | None = None,
    rules: ShardingRules | None = None,
    train: bool = False,
    token_weights: jax.Array | None = None,
) -> Output:
    """Run the model.

    Args:
      tokens: [B, T] int32.
      positions: [B, T] int32; default: 0, 1, ... in each segment or, with a cache, of the real tokens, counted on
        from `cache.length`.
      segment_ids: [B, T] int32; tokens see their own segment only, 0 is padding. With a cache, 0 keeps a token
        out of the cache and any other number means a real token.
      cache: keys and values of what came before; the one in the output holds these tokens too.
      logits_at: [B, N] int32 indices into T: logits at these tokens only.
      targets: [B, T] int32 ([B, N] with `logits_at`): `out.scores`, their log-probabilities, in place of logits, which
        are not in memory where they would be large.
      score_options: what the scores of targets are to hold.
      token_types: [B, T] int32, below `cfg.token_types`; default: 0.
      encoder_tokens: [B, S] int32, what an encoder-decoder answers. A cache remembers them: they are given with the
        first tokens of a row and not again.
      encoder_positions: [B, S] int32; default: 0, 1, ...
      encoder_segment_ids: [B, S] int32; a token sees those of its own segment (with a cache: of any), none of 0.
      adapter: [B] int32, which of `cfg.adapters` each row has, -1 for none; default: all rows the first.
      rules: sharding of activations, for use under `jax.set_mesh`.
      train: routers with a capacity (mixture of depths or recursions, experts with slots) keep to it, which lets a
        token depend on others of its row. Without, each token decides by itself, as it does with a cache.
      token_weights: [B, T] float32, how much each token counts in the losses of `aux`; default: 1. Padding never does.
    """
    if encoder_tokens is not None and cfg.encoder is None:
        raise ValueError("encoder_tokens were given to a model without an encoder.")
    if encoder_tokens is None and cfg.encoder is not None and cache is None:
        raise ValueError("an encoder-decoder needs encoder_tokens, or a cache that has seen them.")
    if adapter is not None and cfg.adapters is None:
        raise ValueError("adapter was given to a model whose config has no adapters.")
    if targets is not None and logits_at is not None and cfg.mtp is not None and cache is None:
        raise ValueError(
            "targets at the tokens of logits_at say nothing of the later ones that multi-token prediction scores. "
            "Give targets of all tokens, or a config with mtp=None."
        )
    source = Source(encoder_tokens, encoder_positions, encoder_segment_ids)
    module = Transformer(cfg, rules, train)
    read = tokens, positions, segment_ids, cache, logits_at, token_types, source, adapter
    with backend.prefer(cfg.kernels):
        return cast(Output, module.apply({"params": params}, *read, targets, ask, token_weights))


def logical_axes(cfg: ModelConfig) -> Params:
    """The tree of `init` with a tuple of logical axis names at each leaf."""
    return jax.tree.map(lambda box: tuple(box.names), _boxed_shapes(cfg), is_leaf=_is_box)


def param_shapes(cfg: ModelConfig) -> Params:
    """The tree of `init` as ShapeDtypeStructs; allocates nothing."""
    return jax.tree.map(lambda box: box.value, _boxed_shapes(cfg), is_leaf=_is_box)


@functools.lru_cache(maxsize=16)
def _boxed_shapes(cfg: ModelConfig):
    return jax.eval_shape(lambda: _init_boxed(cfg, jax.random.key(0)))


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def init_arguments(cfg: ModelConfig) -> tuple:
    """What the module is called with to make parameters."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return tokens, *[None] * 5, Source(tokens if cfg.encoder else None)


def _init_boxed(cfg: ModelConfig, key: jax.Array):
    return Transformer(cfg).init(key, *init_arguments(cfg))["params"]


class Transformer(nn.Module):
    cfg: ModelConfig
    rules: ShardingRules | None = None
    train: bool = False

    @nn.compact
    def __call__(
        self,
        tokens,
        positions,
        segment_ids,
        cache,
        logits_at,
        token_types=None,
        source=Source(),
        adapter=None,
        targets=None,
        ask=ScoreOptions(),
        token_weights=None,
    ) -> Output:
        cfg = self.cfg
        ctx = self._context(len(cfg.blocks))
        info = _token_info(cfg, tokens, positions, segment_ids, cache, adapter)
        info = dataclasses.replace(info, weights=token_weights)
        embedding_VD = self._embedding(ctx)
        x_BTD = self._embed(ctx, jnp.take(embedding_VD, tokens, axis=0), info, token_types)
        self.sow("intermediates", "embedded", x_BTD)

        aux = {}
        if source.tokens is not None:
            encoded_BSD, aux = self._encode(embedding_VD, source, adapter)
            info = dataclasses.replace(info, encoder=encoded_BSD, encoder_segment_ids=source.segment_ids)
        layers, embedded_BTD = None if cache is None else cache.layers, x_BTD
        trunk_BTD, x_BTD, states, more = self._run_blocks(ctx, embedded_BTD, tokens, layers, info)
        final_norm = self._final_norm(ctx)
        hidden_BTD = final_norm(x_BTD)
        pooled_BTD = None if cfg.pooler is None else cfg.pooler.module(ctx, "pooler")(hidden_BTD)
        head = self._vocabulary_head(ctx, embedding_VD, logits_at)
        ahead_BTD, mtp_aux = [], {}
        if cfg.mtp is not None and cache is None:
            stream = Stream(embedded_BTD, trunk_BTD, hidden_BTD, final_norm)
            after_blocks = dataclasses.replace(info, shared=more.shared)
            ahead_BTD, mtp_aux = cfg.mtp.read(ctx, stream, after_blocks)
        ahead = [] if targets is None else [look_ahead(targets, k) for k in range(1, len(ahead_BTD) + 1)]
        return Output(
            logits=head.logits(hidden_BTD) if targets is None else cast(jax.Array, None),
            hidden=hidden_BTD,
            pooled=pooled_BTD,
            encoder=info.encoder,
            cache=_advance(cache, states, tokens, segment_ids),
            aux=add_up(aux, more.aux),
            heads={head.name: self._head(ctx, head, hidden_BTD, pooled_BTD) for head in cfg.heads},
            mtp_logits=tuple(map(head.logits, ahead_BTD)) if targets is None else (),
            mtp_aux=mtp_aux,
            scores=None if targets is None else head.scores(hidden_BTD, targets, ask),
            mtp_scores=tuple(head.scores(*pair, ask) for pair in zip(ahead_BTD, ahead)),
        )

    def _run_blocks(self, ctx: Context, x_BTD: jax.Array, tokens, layers: dict | None, info: TokenInfo):
        """What the last block reads, what comes out of it, each group's new state, and what the blocks give beside."""
        if self.cfg.byte_latent is not None:
            latent = dataclasses.replace(ctx, width=self.cfg.width)
            y_BTD, states, aux = run_byte_latent(self, latent, x_BTD, tokens, layers, info)
            return x_BTD, y_BTD, states, More(aux)
        runs = self.cfg.runs()
        trunk_BTD, states, more = run_part(ctx, runs[:-1], x_BTD, layers, info)
        info = dataclasses.replace(info, shared=more.shared)
        x_BTD, last_state, last_more = run_part(ctx, runs[-1:], trunk_BTD, layers, info)
        return trunk_BTD, x_BTD, states | last_state, more.join(last_more)

    def _context(self, num_blocks: int) -> Context:
        cfg = self.cfg
        dtypes = jnp.dtype(cfg.dtype), jnp.dtype(cfg.param_dtype)
        modes = self.rules, cfg.scan, cfg.remat, self.train
        return Context(cfg.token_width, num_blocks, *dtypes, *modes, cfg.adapters)

    def _encode(self, embedding_VD: jax.Array, source: Source, adapter) -> tuple[jax.Array, dict]:
        encoder = cast(Encoder, self.cfg.encoder)
        ctx, tokens_BS = self._context(len(encoder.blocks)), cast(jax.Array, source.tokens)
        info = _token_info(self.cfg, tokens_BS, source.positions, source.segment_ids, None, adapter)
        x_BSD = jnp.take(embedding_VD, tokens_BS, axis=0) * jnp.asarray(self.cfg.embed_scale, ctx.dtype)
        x_BSD, _, aux = run_stack(ctx, self.cfg.runs("encoder_"), x_BSD, None, info)
        if encoder.final_norm is not None:
            x_BSD = encoder.final_norm.module(ctx, "encoder_final_norm")(x_BSD)
        return x_BSD, aux

    def _embedding(self, ctx: Context) -> jax.Array:
        # Tied logits start at order 1, and the token's own vector is not drowned by what the first blocks add to it.
        init = nn.initializers.normal(ctx.width**-0.5)
        return param(self, ctx, "embedding", (self.cfg.vocab_size, ctx.width), ("vocab", "embed"), init)

    def _final_norm(self, ctx: Context) -> Callable[[jax.Array], jax.Array]:
        norm = self.cfg.final_norm
        return (lambda x_BTD: x_BTD) if norm is None else norm.module(ctx, "final_norm")

    def _embed(self, ctx: Context, x_BTD: jax.Array, info: TokenInfo, token_types) -> jax.Array:
        cfg = self.cfg
        x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, x_BTD.dtype)
        if cfg.token_types:
            shape, init = (cfg.token_types, ctx.width), nn.initializers.normal(0.1 * ctx.width**-0.5)
            table_SD = param(self, ctx, "token_types", shape, ("norm", "embed"), init)
            x_BTD += table_SD[0] if token_types is None else jnp.take(table_SD, token_types, axis=0)
        elif token_types is not None:
            raise ValueError("token_types were given to a model whose config has none.")
        if cfg.positions is not None:
            x_BTD += cfg.positions.module(ctx, "positions")(info.positions)
        if cfg.embed_norm is not None:
            x_BTD = cfg.embed_norm.module(ctx, "embed_norm")(x_BTD)
        return constrain(x_BTD, ctx.rules, "batch", "length", "act_embed")

    def _vocabulary_head(
        self, ctx: Context, embedding_VD: jax.Array | None, logits_at: jax.Array | None = None
    ) -> VocabularyHead:
        cfg, bias_V = self.cfg, None
        transform = None if cfg.head_transform is None else cfg.head_transform.module(ctx, "head_transform")
        if cfg.tied_head:
            head_VD = cast(jax.Array, embedding_VD)
        else:
            shape = (cfg.vocab_size, ctx.width)
            head_VD = param(self, ctx, "head", shape, ("vocab", "embed"), fan_in_normal(ctx.width))
        if cfg.head_bias:
            bias_V = param(self, ctx, "head_bias", (cfg.vocab_size,), ("vocab",), nn.initializers.zeros)
        return VocabularyHead(
            head_VD, bias_V, cfg.logit_scale, cfg.logit_softcap, transform, logits_at, ctx.rules
        )

    def _head(self, ctx: Context, head: ScalarHead | ClassHead, hidden_BTD, pooled_BTD) -> jax.Array:
        if isinstance(head, ScalarHead):
            return self._scalar_head(ctx, head.name, hidden_BTD)
        return self._class_head(ctx, head, pooled_BTD if head.pooled else hidden_BTD)

    def _class_head(self, ctx: Context, head: ClassHead, read_BTD: jax.Array) -> jax.Array:
        name, L = f"{head.name}_head", len(head.labels)
        w_DL = param(self, ctx, name, (ctx.width, L), ("embed", None), nn.initializers.zeros)
        y_BTL = jnp.einsum("BTD,DL->BTL", read_BTD, w_DL, preferred_element_type=jnp.float32)
        return (
            y_BTL + param(self, ctx, f"{name}_bias", (L,), (None,), nn.initializers.zeros)
            if head.bias
            else y_BTL
        )

    def _scalar_head(self, ctx: Context, name: str, hidden_BTD: jax.Array) -> jax.Array:
        w_D = param(self, ctx, f"{name}_head", (ctx.width,), ("norm",), nn.initializers.zeros)
        bias = param(self, ctx, f"{name}_head_bias", (), (), nn.initializers.zeros)
        return jnp.einsum("BTD,D->BT", hidden_BTD, w_D, preferred_element_type=jnp.float32) + bias


def _token_info(cfg: ModelConfig, tokens, positions, segment_ids, cache: Cache | None, adapter) -> TokenInfo:
    B, T = tokens.shape
    cached = None if cache is None or positions is not None or cfg.byte_latent is not None else cache.length
    if positions is None:
        positions = jnp.broadcast_to(_places(segment_ids, T, cache), (B, T))
    if cache is None:
        return TokenInfo(positions, segment_ids, adapter=adapter)
    rows = jnp.arange(B, dtype=jnp.int32) if cache.rows is None else cache.rows
    page_size = page_size_of(cfg, cache.layers)
    if page_size is None:
        return TokenInfo(positions, segment_ids, rows=rows, adapter=adapter)
    skipped = None if segment_ids is None else segment_ids == 0
    page, slot = write_places(cache.page_table, page_size, positions, skipped)
    return TokenInfo(
        positions, segment_ids, cache.page_table, page, slot, rows=rows, adapter=adapter, cached=cached
    )


def _places(segment_ids: jax.Array | None, T: int, cache: Cache | None) -> jax.Array:
    """[B or 1, T] int32: of each token in its document. Padding, on whichever side, counts for nothing."""
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


def _advance(cache: Cache | None, states: dict, tokens, segment_ids) -> Cache | None:
    if cache is None:
        return None
    added = tokens.shape[1] if segment_ids is None else jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
    return dataclasses.replace(cache, layers=states, length=cache.length + added)

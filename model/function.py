"""The pure function: every forward pass anywhere (loss, rollout, serving, evaluation, reward) is `apply`."""

# B batch, T tokens, D model width, V vocabulary, N chosen positions

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from model.blocks.common import Context, FeedForward, TokenInfo, fan_in_normal, param
from model.blocks.norms import Norm
from model.cache import Cache, page_size_of
from model.config import Block, ModelConfig
from model.sharding import ShardingRules, constrain

Params = dict[str, Any]

NO_PAGE = 2**30  # of a token that is not written; beyond any number of pages


@flax.struct.dataclass
class Output:
    logits: jax.Array  # [B, T, V] float32 ([B, N, V] when `logits_at` was given)
    hidden: jax.Array  # [B, T, D] after the final norm
    cache: Cache | None = None
    aux: dict = flax.struct.field(default_factory=dict)  # name -> WeightedSum
    heads: dict = flax.struct.field(default_factory=dict)  # name -> [B, T] float32


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
    rules: ShardingRules | None = None,
) -> Output:
    """Run the model.

    Args:
      tokens: [B, T] int32.
      positions: [B, T] int32; default: 0, 1, ... or, with a cache, counted on from `cache.length`.
      segment_ids: [B, T] int32; tokens see their own segment only, 0 is padding. With a cache, 0 keeps a token
        out of the cache and any other number means a real token.
      cache: keys and values of what came before; the one in the output holds these tokens too.
      logits_at: [B, N] int32 indices into T: logits at these tokens only.
      rules: sharding of activations, for use under `jax.set_mesh`.
    """
    module = Transformer(cfg, rules)
    return cast(Output, module.apply({"params": params}, tokens, positions, segment_ids, cache, logits_at))


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


def _init_boxed(cfg: ModelConfig, key: jax.Array):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Transformer(cfg).init(key, tokens, None, None, None, None)["params"]


class BlockModule(nn.Module):
    spec: Block
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, state: dict | None, info: TokenInfo):
        spec = self.spec
        if spec.ffn is not None and spec.parallel != "no":
            x_BTD, more = self._parallel(spec.ffn, x_BTD, state, info)
        else:
            x_BTD, more = self._one_after_the_other(x_BTD, state, info)
        self.sow("intermediates", "residual", x_BTD)
        return x_BTD, more

    def _one_after_the_other(self, x_BTD: jax.Array, state: dict | None, info: TokenInfo):
        spec = self.spec
        y_BTD, state, shared = self._mix(self._norm(spec.norm, "mixer_norm", x_BTD), state, info)
        x_BTD, aux = self._add("mixer", x_BTD, y_BTD), {}
        if spec.ffn is not None:
            y_BTD, aux = spec.ffn.module(self.ctx, "ffn")(self._norm(spec.norm, "ffn_norm", x_BTD), info)
            x_BTD = self._add("ffn", x_BTD, y_BTD)
        return x_BTD, (state, aux, shared)

    def _parallel(self, ffn: FeedForward, x_BTD: jax.Array, state: dict | None, info: TokenInfo):
        spec = self.spec
        read_BTD = self._norm(spec.norm, "mixer_norm", x_BTD)
        y_BTD, state, shared = self._mix(read_BTD, state, info)
        if spec.parallel == "two norms":
            read_BTD = self._norm(spec.norm, "ffn_norm", x_BTD)
        z_BTD, aux = ffn.module(self.ctx, "ffn")(read_BTD, info)
        return self._add("mixer", x_BTD, y_BTD + z_BTD), (state, aux, shared)

    def _mix(self, read_BTD: jax.Array, state: dict | None, info: TokenInfo):
        y_BTD, state, *shared = self.spec.mixer.module(self.ctx, "mixer")(read_BTD, info, state)
        return y_BTD, state, shared[0] if shared else {}

    def _norm(self, norm: Norm | None, name: str, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if norm is None else norm.module(self.ctx, name)(x_BTD)

    def _add(self, part: str, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        spec = self.spec
        y_BTD = self._norm(spec.post_norm, f"{part}_post_norm", y_BTD)
        x_BTD = x_BTD * spec.skip_scale + y_BTD * spec.residual_scale
        x_BTD = self._norm(spec.sum_norm, f"{part}_sum_norm", x_BTD)
        return constrain(x_BTD, self.ctx.rules, "batch", "length", "act_embed")


class Transformer(nn.Module):
    cfg: ModelConfig
    rules: ShardingRules | None = None

    @nn.compact
    def __call__(self, tokens, positions, segment_ids, cache, logits_at) -> Output:
        cfg, ctx = self.cfg, self._context()
        info = _token_info(cfg, tokens, positions, segment_ids, cache)
        embedding_VD = self._embedding(ctx)
        x_BTD = self._embed(ctx, jnp.take(embedding_VD, tokens, axis=0), info)
        self.sow("intermediates", "embedded", x_BTD)

        states, aux = {}, {}
        for name, block, numbers in cfg.runs():
            run = self._run(ctx, name, block, len(numbers))
            x_BTD, (states[name], run_aux, shared) = run(
                x_BTD, cache.layers[name] if cache is not None else None, info
            )
            if cfg.scan:
                run_aux = jax.tree.map(lambda a: a.sum(0), run_aux)
                shared = jax.tree.map(lambda s: s[-1], shared)
            info = dataclasses.replace(info, shared=info.shared | shared)
            for key, value in run_aux.items():
                aux[key] = aux[key] + value if key in aux else value

        hidden_BTD = self._final_norm(ctx, x_BTD)
        return Output(
            logits=self._logits(ctx, embedding_VD, hidden_BTD, logits_at),
            hidden=hidden_BTD,
            cache=_advance(cache, states, tokens, segment_ids),
            aux=aux,
            heads={head.name: self._scalar_head(ctx, head.name, hidden_BTD) for head in cfg.heads},
        )

    def _context(self) -> Context:
        cfg = self.cfg
        dtypes = jnp.dtype(cfg.dtype), jnp.dtype(cfg.param_dtype)
        return Context(cfg.width, len(cfg.blocks), *dtypes, self.rules)

    def _embedding(self, ctx: Context) -> jax.Array:
        # Tied logits start at order 1, and the token's own vector is not drowned by what the first blocks add to it.
        init = nn.initializers.normal(ctx.width**-0.5)
        return param(self, ctx, "embedding", (self.cfg.vocab_size, ctx.width), ("vocab", "embed"), init)

    def _final_norm(self, ctx: Context, x_BTD: jax.Array) -> jax.Array:
        norm = self.cfg.final_norm
        return x_BTD if norm is None else norm.module(ctx, "final_norm")(x_BTD)

    def _embed(self, ctx: Context, x_BTD: jax.Array, info: TokenInfo) -> jax.Array:
        cfg = self.cfg
        x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, x_BTD.dtype)
        if cfg.positions is not None:
            x_BTD += cfg.positions.module(ctx, "positions")(info.positions)
        if cfg.embed_norm is not None:
            x_BTD = cfg.embed_norm.module(ctx, "embed_norm")(x_BTD)
        return constrain(x_BTD, ctx.rules, "batch", "length", "act_embed")

    def _run(self, ctx: Context, name: str, block: Block, count: int):
        module = BlockModule
        if self.cfg.remat == "full":
            module = nn.remat(module, prevent_cse=not self.cfg.scan)
        if not self.cfg.scan:
            return module(block, ctx, name=name)
        scanned = nn.scan(
            module,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # flax takes a tuple too
            length=count,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(block, ctx, name=name)

    def _logits(self, ctx: Context, embedding_VD, hidden_BTD, logits_at) -> jax.Array:
        if logits_at is not None:
            hidden_BTD = jnp.take_along_axis(hidden_BTD, logits_at[:, :, None], axis=1)
        if self.cfg.tied_head:
            head_VD = embedding_VD
        else:
            shape = (self.cfg.vocab_size, self.cfg.width)
            head_VD = param(self, ctx, "head", shape, ("vocab", "embed"), fan_in_normal(self.cfg.width))
        logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
        if self.cfg.head_bias:
            logits_BTV += param(
                self, ctx, "head_bias", (self.cfg.vocab_size,), ("vocab",), nn.initializers.zeros
            )
        logits_BTV *= self.cfg.logit_scale
        if (cap := self.cfg.logit_softcap) is not None:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        return constrain(logits_BTV, ctx.rules, "batch", "length", "act_vocab")

    def _scalar_head(self, ctx: Context, name: str, hidden_BTD: jax.Array) -> jax.Array:
        w_D = param(self, ctx, f"{name}_head", (ctx.width,), ("norm",), nn.initializers.zeros)
        bias = param(self, ctx, f"{name}_head_bias", (), (), nn.initializers.zeros)
        return jnp.einsum("BTD,D->BT", hidden_BTD, w_D, preferred_element_type=jnp.float32) + bias


def _token_info(cfg: ModelConfig, tokens, positions, segment_ids, cache: Cache | None) -> TokenInfo:
    B, T = tokens.shape
    if positions is None:
        start = jnp.zeros((B,), jnp.int32) if cache is None else cache.length
        positions = start[:, None] + jnp.arange(T, dtype=jnp.int32)
    if cache is None:
        return TokenInfo(positions, segment_ids)
    rows = jnp.arange(B, dtype=jnp.int32) if cache.rows is None else cache.rows
    page_size = page_size_of(cfg, cache.layers)
    if page_size is None:
        return TokenInfo(positions, segment_ids, rows=rows)
    column = jnp.minimum(positions // page_size, cache.page_table.shape[1] - 1)
    page = jnp.take_along_axis(cache.page_table, column, axis=1)
    beyond = positions >= cache.page_table.shape[1] * page_size
    skipped = beyond if segment_ids is None else beyond | (segment_ids == 0)
    page = jnp.where(skipped, NO_PAGE, page)
    return TokenInfo(positions, segment_ids, cache.page_table, page, positions % page_size, rows)


def _advance(cache: Cache | None, states: dict, tokens, segment_ids) -> Cache | None:
    if cache is None:
        return None
    added = tokens.shape[1] if segment_ids is None else jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
    return dataclasses.replace(cache, layers=states, length=cache.length + added)

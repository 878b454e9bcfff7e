"""The pure function: every forward pass (loss, rollout, serving, evaluation, reward) is `apply`.

model/inputs embeds tokens and media, model/stacks runs the blocks, and model/readouts gives logits, scores and other
outputs.
"""

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

from model.blocks.common import Context, TokenInfo, add_up
from model.cache import Cache
from model.config import ModelConfig
from model.inputs import Inputs
from model.inputs.media import example_media, place_media
from model.inputs.token_info import encoder_info, token_info
from model.inputs.tokens import embed_tokens, embedding_table, finish_embedding
from model.kernels import backend
from model.logprobs import ScoreOptions, TokenScores
from model.readouts.hidden_states import HiddenStates
from model.readouts.mtp import look_ahead
from model.readouts.vocabulary import vocabulary_head
from model.sharding import ShardingRules
from model.stacks import StackOutput, run_decoder
from model.weights import Weight

Params = dict[str, Any]
POOLED = "the vector of the whole text, from its first token"


@flax.struct.dataclass
class Output:
    logits: jax.Array  # [B, T, V] float32 ([B, N, V] with `logits_at`); None with `targets`
    hidden: jax.Array  # [B, T, D] after the final norm
    pooled: jax.Array | None = None  # [B, T, D], the pooler's output for each token; BERT uses the first
    # [B, S, D], the encoder's hidden states, in the call that runs the encoder
    encoder: jax.Array | None = None
    cache: Cache | None = None
    aux: dict = flax.struct.field(default_factory=dict)  # name -> WeightedSum
    heads: dict = flax.struct.field(default_factory=dict)  # name of a readout of `cfg.heads` -> its output
    # as `logits`, for the token after the next, the one after that, and so on; () with a cache. jit computes them only
    # if they are used
    mtp_logits: tuple[jax.Array, ...] = ()
    mtp_aux: dict = flax.struct.field(default_factory=dict)  # as `aux`, for the blocks of the MTP modules
    scores: TokenScores | None = None  # of `targets`, [B, T] float32
    # as `scores`, instead of `mtp_logits`: module k scores the target k tokens ahead, or target 0 beyond the row
    mtp_scores: tuple[TokenScores, ...] = ()


class Requested(NamedTuple):
    """The requested logits or scores; see `apply`."""

    targets: jax.Array | None = None
    logits_at: jax.Array | None = None
    score_options: ScoreOptions = ScoreOptions()


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """New parameters in `cfg.param_dtype`, a nested dict of arrays."""
    return nn.meta.unbox(_init_boxed(cfg, key))


def apply(
    cfg: ModelConfig,
    params: Params,
    inputs: Inputs | jax.Array,
    cache: Cache | None = None,
    *,
    targets: jax.Array | None = None,
    logits_at: jax.Array | None = None,
    score_options: ScoreOptions = ScoreOptions(),
    rules: ShardingRules | None = None,
    train: bool = False,
) -> Output:
    """Run the model.

    Args:
      inputs: `Inputs`, or bare token ids [B, T].
      cache: the state of earlier tokens; the cache in the output also has these tokens.
      targets: [B, T] int32 ([B, N] with `logits_at`): returns `out.scores`, their log-probabilities, instead of logits.
        Large logits are then never in memory.
      logits_at: [B, N] int32 indices into T: returns logits at these tokens only.
      score_options: what the scores of targets include.
      rules: sharding of activations, for use under `jax.set_mesh`.
      train: routers (mixture of depths or recursions, experts with slots) apply their capacity, so a token depends on
        others of its row. Otherwise each token is routed by itself, as with a cache.

    Raises:
      TypeError, ValueError: inputs that this model does not support, or that do not fit together.
    """
    inputs = Inputs.of(inputs)
    _check(cfg, inputs, cache)
    _check_layout(cfg, params)
    _check_requested(inputs, targets, logits_at)
    if targets is not None and logits_at is not None and cfg.mtp is not None and cache is None:
        raise ValueError(
            "targets at the tokens of logits_at lack the later targets that multi-token prediction scores. "
            "Give targets of all tokens, or a config with mtp=None."
        )
    module = Transformer(cfg, rules, train)
    with backend.prefer(cfg.kernels):
        return cast(
            Output,
            module.apply({"params": params}, inputs, cache, Requested(targets, logits_at, score_options)),
        )


def logical_axes(cfg: ModelConfig) -> Params:
    """The tree of `init` with a tuple of logical axis names at each leaf."""
    return jax.tree.map(lambda box: tuple(box.names), _boxed_shapes(cfg), is_leaf=_is_box)


def param_shapes(cfg: ModelConfig) -> Params:
    """The tree of `init` as ShapeDtypeStructs; allocates nothing."""
    return jax.tree.map(lambda box: box.value, _boxed_shapes(cfg), is_leaf=_is_box)


def example_inputs(cfg: ModelConfig) -> Inputs:
    """The smallest inputs that use every parameter."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    encoder_tokens = tokens if cfg.encoder is not None else None
    return Inputs(tokens, encoder_tokens=encoder_tokens, media=example_media(cfg.media))


@functools.lru_cache(maxsize=16)
def _boxed_shapes(cfg: ModelConfig):
    return jax.eval_shape(lambda: _init_boxed(cfg, jax.random.key(0)))


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _init_boxed(cfg: ModelConfig, key: jax.Array):
    return Transformer(cfg).init(key, example_inputs(cfg))["params"]


def _check(cfg: ModelConfig, inputs: Inputs, cache: Cache | None) -> None:
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(
            f"cache is a {type(cache).__name__}. Give a model.Cache; positions and segment ids go into "
            "Inputs(tokens, positions, segment_ids)."
        )
    if inputs.encoder_tokens is not None and cfg.encoder is None:
        raise ValueError("encoder_tokens were given to a model without an encoder.")
    if inputs.encoder_tokens is None and cfg.encoder is not None and cache is None:
        raise ValueError("an encoder-decoder needs encoder_tokens, or a cache that has seen them.")
    if inputs.prefix is not None or inputs.spans is not None:
        mixers = {type(block.mixer).__name__ for block in cfg.blocks if block.mixer is not None}
        if cfg.byte_latent is not None or (unable := mixers - {"Attention", "LatentAttention"}):
            what = "byte-latent models" if cfg.byte_latent is not None else ", ".join(sorted(unable))
            raise ValueError(f"inputs.prefix and inputs.spans are only for attention, not for {what}.")
    if inputs.adapter_ids is not None and cfg.adapters is None:
        raise ValueError("adapter_ids were given to a model without adapters.")


def _check_layout(cfg: ModelConfig, params: Params) -> None:
    """Parameters are in the layout of `cfg.scan`: one group a block, or stacked."""
    names = [run.name for run in cfg.runs()]
    other = [run.name for run in cfg.stack().runs(not cfg.scan)]
    if not set(names) <= params.keys() and set(other) <= params.keys():
        raise ValueError(
            f"the parameters have the groups {', '.join(other[:3])}, and with scan={cfg.scan} the model has "
            f"{', '.join(names[:3])}. Use model.layout.relayout, or the config with scan={not cfg.scan}."
        )


def _check_requested(inputs: Inputs, targets: jax.Array | None, logits_at: jax.Array | None) -> None:
    rows, tokens = inputs.tokens.shape
    if not rows or not tokens:
        raise ValueError(f"tokens have shape {inputs.tokens.shape}. Give at least one row of one token.")
    if logits_at is not None and (jnp.ndim(logits_at) != 2 or len(logits_at) != rows):
        raise ValueError(
            f"logits_at has shape {jnp.shape(logits_at)}. Give [{rows}, N], indices of tokens for each row."
        )
    wanted = (rows, tokens) if logits_at is None else jnp.shape(logits_at)
    if targets is not None and jnp.shape(targets) != wanted:
        raise ValueError(
            f"targets have shape {jnp.shape(targets)}. Give one for each scored token, {wanted}."
        )


class Transformer(nn.Module):
    cfg: ModelConfig
    rules: ShardingRules | None = None
    train: bool = False

    @nn.compact
    def __call__(
        self, inputs: Inputs, cache: Cache | None = None, requested: Requested = Requested()
    ) -> Output:
        cfg = self.cfg
        ctx = model_context(cfg, self.rules, self.train)
        info = token_info(cfg, inputs, cache)
        embedding_VD = embedding_table(self, cfg, ctx)
        embedded_BTD = self._embed(ctx, embedding_VD, inputs, info)
        info, encoder_aux = self._encode(ctx, embedding_VD, inputs, info)

        stack_output = self._run_blocks(ctx, embedded_BTD, None if cache is None else cache.layers, info)
        final_norm = final_norm_of(cfg, ctx)
        hidden_BTD = final_norm(stack_output.x_BTD)
        pooled_BTD = None if cfg.pooler is None else cfg.pooler.module(ctx, "pooler", POOLED)(hidden_BTD)
        hidden_states = HiddenStates(
            embedded_BTD, stack_output.before_last, hidden_BTD, pooled_BTD, final_norm
        )

        head = vocabulary_head(self, cfg, ctx, embedding_VD, requested.logits_at)
        mtp_hidden, mtp_aux = [], {}
        if cfg.mtp is not None and cache is None:
            after_blocks = dataclasses.replace(info, carry=stack_output.report.carry)
            mtp_hidden, mtp_aux = cfg.mtp.read(ctx, hidden_states, after_blocks)
        out = Output(
            logits=cast(jax.Array, None),
            hidden=hidden_BTD,
            pooled=pooled_BTD,
            encoder=info.encoder,
            cache=_advance(cache, stack_output.states, inputs),
            aux=add_up(encoder_aux, stack_output.report.aux),
            heads={readout.name: readout.read(self, ctx, hidden_states) for readout in cfg.heads},
            mtp_aux=mtp_aux,
        )
        if requested.targets is None:
            mtp_logits = tuple(map(head.logits, mtp_hidden))
            return dataclasses.replace(out, logits=head.logits(hidden_BTD), mtp_logits=mtp_logits)
        targets, options = requested.targets, requested.score_options
        return dataclasses.replace(
            out,
            scores=head.scores(hidden_BTD, targets, options),
            mtp_scores=tuple(
                head.scores(h_BTD, look_ahead(targets, k), options) for k, h_BTD in enumerate(mtp_hidden, 1)
            ),
        )

    def _embed(self, ctx: Context, embedding_VD: Weight, inputs: Inputs, info: TokenInfo) -> jax.Array:
        cfg = self.cfg
        x_BTD = embed_tokens(self, cfg, ctx, embedding_VD, inputs.tokens, inputs.token_types)
        x_BTD = place_media(ctx, cfg.media, inputs.media, x_BTD)
        if inputs.embedding_noise is not None:
            x_BTD += inputs.embedding_noise.astype(x_BTD.dtype)
        x_BTD = finish_embedding(cfg, ctx, x_BTD, info)
        self.sow("intermediates", "embedded", x_BTD)
        return x_BTD

    def _encode(
        self, ctx: Context, embedding_VD: Weight, inputs: Inputs, info: TokenInfo
    ) -> tuple[TokenInfo, dict]:
        """`info` with the encoder's output, if the inputs have encoder tokens."""
        tokens_BS, encoder = inputs.encoder_tokens, self.cfg.encoder
        if tokens_BS is None or encoder is None:
            return info, {}
        token_info = encoder_info(inputs)
        encoded_BSD, aux = encoder.read(ctx, embedding_VD, self.cfg.embed_scale, token_info)
        return dataclasses.replace(
            info, encoder=encoded_BSD, encoder_segment_ids=inputs.encoder_segment_ids
        ), aux

    def _run_blocks(
        self, ctx: Context, x_BTD: jax.Array, layers: dict | None, info: TokenInfo
    ) -> StackOutput:
        cfg = self.cfg
        if cfg.byte_latent is None:
            return run_decoder(ctx, cfg.stack(), x_BTD, layers, info)
        latent = dataclasses.replace(ctx, width=cfg.width)
        return cfg.byte_latent.run(self, latent, cfg.stack(), cfg.vocab_size, x_BTD, layers, info)


def model_context(cfg: ModelConfig, rules: ShardingRules | None = None, train: bool = False) -> Context:
    """The context of a model's blocks."""
    dtypes = jnp.dtype(cfg.dtype), jnp.dtype(cfg.param_dtype)
    modes = rules, cfg.scan, cfg.remat, train
    return Context(cfg.token_width, len(cfg.blocks), *dtypes, *modes, cfg.adapters)


def final_norm_of(cfg: ModelConfig, ctx: Context) -> Callable[[jax.Array], jax.Array]:
    """The norm of the last hidden state, or the identity. Call it within a compact method."""
    if cfg.final_norm is None:
        return lambda x_BTD: x_BTD
    return cfg.final_norm.module(ctx, "final_norm", role="the last hidden state")


def _advance(cache: Cache | None, states: dict, inputs: Inputs) -> Cache | None:
    if cache is None:
        return None
    segment_ids = inputs.segment_ids
    added = inputs.tokens.shape[1]
    if segment_ids is not None:
        added = jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
    return dataclasses.replace(cache, layers=states, length=cache.length + added)

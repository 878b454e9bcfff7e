"""The functions that an engine compiles: a step of several tokens a row, and several decode steps in one loop."""

# R rows, C tokens of a chunk, N places with logits, P pages a row, S decode steps at most, V vocabulary
# H tokens of history, W words of a packed mask

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from model import Cache, Inputs, ModelConfig, ShardingRules, apply, cache_axes, init_pages
from model.kernels import backend
from model.kernels.paged_attention.pages import row_by_row
from model.layout import relayout
from serve.engine_config import EngineSizes
from serve.logits import RowEdits, all_allowed, edit_logits
from serve.request import MAX_BIASES, MAX_LOGPROBS, MAX_STOP_TOKENS
from serve.sampling import RowSampling, Sampled, sample


class CompilationAfterWarmup(RuntimeError):
    """A shape came up that `warmup` did not compile; a bug in the buckets."""


@flax.struct.dataclass
class Rows:
    """What a program must know of each row."""

    page_table: Any  # [R, P] int32
    length: Any  # [R] int32, tokens in the cache
    number: Any  # [R] int32, the row of the recurrent state that is its own
    stop_ids: Any  # [R, 16] int32, filled up with -1
    sampling: RowSampling
    edits: RowEdits
    history: Any  # [R, H] int32, prompt and output of rows with edits, and what is computed now
    allowed: Any  # [R, W] uint32 ([R, C, W] when drafts are verified), tokens that may come next
    adapter: Any  # [R] int32, -1: none


@flax.struct.dataclass
class PromptScores:
    """Of the tokens of a chunk, given those before."""

    logprob: jax.Array  # [R, C] float32, of the next token, at temperature 1
    top_token: jax.Array  # [R, C, 20] int32
    top_logprob: jax.Array  # [R, C, 20] float32


class Steps:
    """What an engine compiles: its steps, traced for a shape. Needs no array, so it also serves machines that are not
    here."""

    def __init__(self, cfg: ModelConfig, params: Any, config: EngineSizes, vocab_size: int):
        """`params`: arrays, or their shapes with shardings."""
        self._cfg, self._config, self._vocab_size = cfg, config, vocab_size
        self.backend = backend.current()
        # A kernel is given whole arrays: the pages of a layer among stacked ones would be copied for it.
        self._of_pages = cfg.replace(scan=cfg.scan and self.backend.name == "plain")
        self._sharding = jax.tree.leaves(params)[0].sharding
        self._inputs, self.places = _placement(self._of_pages, self._sharding, config.cache_dtype)
        self._params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        )
        self.pages = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(self.new_pages),
            self.places,
        )

    def new_pages(self) -> Any:
        """Empty ones, and states of rows."""
        # One more than is handed out: it stays zero, and page tables point to it where a row has no page.
        # One row of recurrent state more as well, for what pads a batch.
        config = self._config
        sizes = config.num_pages + 1, config.page_size, config.cache_dtype, config.max_rows + 1
        return init_pages(self._of_pages, *sizes)

    def lower(self, kind: str, R: int, C: int, P: int) -> jax.stages.Lowered:
        """For the back end of the engine, in whatever thread, and on its mesh where kernels ask for it."""
        on_mesh = contextlib.nullcontext()
        if self.backend.name == "tpu" and isinstance(self._sharding, NamedSharding):
            on_mesh = jax.set_mesh(cast(Mesh, self._sharding.mesh))
        with on_mesh, backend.use(*dataclasses.astuple(self.backend)):
            return self._lower_here(kind, R, C, P)

    def _lower_here(self, kind: str, R: int, C: int, P: int) -> jax.stages.Lowered:
        def array(dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._inputs)

        if kind == "clean":
            clean = functools.partial(_clean, cache_axes(self._of_pages, self._config.cache_dtype))
            jitted = jax.jit(clean, donate_argnums=0, out_shardings=self.places)
            return jitted.lower(self.pages, array(np.int32, P))
        floats, ints = array(np.float32, R), array(np.int32, R)
        sampling = RowSampling(floats, ints, floats, floats, floats, array(np.uint32, R, 2), ints)
        biases = array(np.int32, R, MAX_BIASES), array(np.float32, R, MAX_BIASES)
        edits = RowEdits(array(np.bool_, R), floats, floats, floats, ints, ints, *biases)
        W = all_allowed(vocab_size=self._cfg.vocab_size).shape[-1]
        allowed = array(np.uint32, R, C, W) if kind == "verify" else array(np.uint32, R, W)
        stop_ids, history = (
            array(np.int32, R, MAX_STOP_TOKENS),
            array(np.int32, R, P * self._config.page_size),
        )
        rows = Rows(array(np.int32, R, P), ints, ints, stop_ids, sampling, edits, history, allowed, ints)
        tokens = array(np.int32, R, C)
        functions = {
            "prefill": (_prefill, (tokens, ints), 1),
            "score": (_score, (tokens, ints, tokens), 2),
            "verify": (_verify, (tokens, ints), 1),
            "decode": (
                functools.partial(_decode, self._config.decode_steps),
                (ints, ints, array(np.int32)),
                2,
            ),
        }
        function, more, results = functions[kind]
        step = functools.partial(
            function, _Model(self._cfg, self._of_pages.scan, self._vocab_size, self._config.adapter_slots > 0)
        )
        out_shardings = (self.places, *[self._inputs] * results)
        return jax.jit(step, donate_argnums=1, out_shardings=out_shardings).lower(
            self._params, self.pages, rows, *more
        )


@dataclasses.dataclass(frozen=True)
class _Model:
    """The model as the steps run it."""

    cfg: ModelConfig
    scan: bool  # of the cache, and so of the blocks
    vocab_size: int
    adapters_by_row: bool  # otherwise all rows have the first adapter, if there is one

    def laid_out(self, params) -> tuple[_Model, Any]:
        """With the parameters in the layout of the cache."""
        cfg, params = relayout(self.cfg, params, scan=self.scan)
        return dataclasses.replace(self, cfg=cfg), params

    def sample(self, rows: Rows, logits_RV, history_RH, length_R) -> Sampled:
        """The token after the first `length_R` of each row."""
        edited_RV = edit_logits(logits_RV, rows.edits, rows.stop_ids, history_RH, length_R, rows.allowed)
        return sample(logits_RV, rows.sampling, length_R, self.vocab_size, edited_RV)


def _forward(model: _Model, params, pages, rows: Rows, tokens_RC, count_R, length_R, logits_at=None):
    """(logits [R, N, V], pages) of the first `count_R` tokens of each row, after `length_R` in the cache."""
    real_RC = (jnp.arange(tokens_RC.shape[1]) < count_R[:, None]).astype(jnp.int32)
    cache = Cache(pages, rows.page_table, length_R, rows.number)
    adapter_R = rows.adapter if model.adapters_by_row else None
    inputs = Inputs(tokens_RC, segment_ids=real_RC, adapter_ids=adapter_R)
    out = apply(model.cfg, params, inputs, cache, logits_at=logits_at)
    assert out.cache is not None  # one went in
    return out.logits, out.cache.layers


def _prefill(model: _Model, params, pages, rows: Rows, tokens_RC, count_R):
    model, params = model.laid_out(params)
    last_R1 = jnp.maximum(count_R - 1, 0)[:, None]
    logits_R1V, pages = _forward(model, params, pages, rows, tokens_RC, count_R, rows.length, last_R1)
    sampled = model.sample(rows, logits_R1V[:, 0], rows.history, rows.length + count_R)
    return pages, jax.tree.map(lambda x: x[:, None], sampled)


def _score(model: _Model, params, pages, rows: Rows, tokens_RC, count_R, targets_RC):
    """A prefill that also scores the token after each."""
    model, params = model.laid_out(params)
    logits_RCV, pages = _forward(model, params, pages, rows, tokens_RC, count_R, rows.length)
    last_R11 = jnp.maximum(count_R - 1, 0)[:, None, None]
    last_RV = jnp.take_along_axis(logits_RCV, last_R11, axis=1)[:, 0]
    sampled = model.sample(rows, last_RV, rows.history, rows.length + count_R)
    log_z_RC = jax.nn.logsumexp(logits_RCV, axis=-1)
    target_RC = jnp.take_along_axis(logits_RCV, targets_RC[:, :, None], axis=2)[:, :, 0]
    shape = (*logits_RCV.shape[:2], min(MAX_LOGPROBS, logits_RCV.shape[2]))
    values_RCK, tokens_RCK = jax.lax.cond(
        jnp.any(rows.sampling.alternatives > 0),
        lambda: tuple(jax.lax.top_k(logits_RCV, shape[2])),
        lambda: (jnp.zeros(shape), jnp.zeros(shape, jnp.int32)),
    )
    scores = PromptScores(target_RC - log_z_RC, tokens_RCK, values_RCK - log_z_RC[:, :, None])
    return pages, jax.tree.map(lambda x: x[:, None], sampled), scores


def _verify(model: _Model, params, pages, rows: Rows, tokens_RC, count_R):
    """The model's token after each of these, drawn as if those before it were the output."""
    model, params = model.laid_out(params)
    R, C = tokens_RC.shape
    logits_RCV, pages = _forward(model, params, pages, rows, tokens_RC, count_R, rows.length)
    length_RC = rows.length[:, None] + 1 + jnp.arange(C)
    flat = lambda x: x.reshape(R * C, *x.shape[2:])
    rows_of_places = jax.tree.map(
        lambda x: jnp.repeat(x, C, axis=0), dataclasses.replace(rows, allowed=rows.number)
    )
    rows_of_places = dataclasses.replace(rows_of_places, allowed=flat(rows.allowed))
    sampled = model.sample(rows_of_places, flat(logits_RCV), rows_of_places.history, flat(length_RC))
    return pages, jax.tree.map(lambda x: x.reshape(R, C, *x.shape[1:]), sampled)


def _decode(max_steps: int, model: _Model, params, pages, rows: Rows, token_R, budget_R, steps):
    model, params = model.laid_out(params)
    R = len(token_R)
    # The buffers have the shapes of what a step gives; the compiler drops this sample.
    one = jax.eval_shape(
        model.sample,
        rows,
        jax.ShapeDtypeStruct((R, model.cfg.vocab_size), jnp.float32),
        rows.history,
        rows.length,
    )
    empty = jax.tree.map(lambda x: jnp.zeros((R, max_steps, *x.shape[1:]), x.dtype), one)

    def more(carry):
        i, _, _, _, active_R, _, _, _ = carry
        return (i < steps) & jnp.any(active_R)

    def step(carry):
        i, pages, length_R, token_R, active_R, count_R, history_RH, all_sampled = carry
        logits_R1V, pages = _forward(
            model, params, pages, rows, token_R[:, None], active_R.astype(jnp.int32), length_R
        )
        length_R += active_R
        sampled = model.sample(rows, logits_R1V[:, 0], history_RH, length_R)
        history_RH = history_RH.at[jnp.arange(R), length_R].set(sampled.token, mode="drop")
        all_sampled = jax.tree.map(lambda buffer, x: buffer.at[:, i].set(x), all_sampled, sampled)
        count_R += active_R
        stopped_R = jnp.any(sampled.token[:, None] == rows.stop_ids, axis=1)
        active_R &= ~stopped_R & (count_R < budget_R)
        return i + 1, pages, length_R, sampled.token, active_R, count_R, history_RH, all_sampled

    start = (
        jnp.int32(0),
        pages,
        rows.length,
        token_R,
        budget_R > 0,
        jnp.zeros(R, jnp.int32),
        rows.history,
        empty,
    )
    _, pages, _, _, _, count_R, _, all_sampled = jax.lax.while_loop(more, step, start)
    return pages, count_R, all_sampled


def _clean(all_axes, pages, index_P):
    def clean(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        if "pages" not in axes:
            return x  # each request starts a recurrent state of its own
        return x.at[(slice(None),) * axes.index("pages") + (index_P,)].set(0, mode="drop")

    return jax.tree.map(clean, pages, all_axes)


def _placement(cfg: ModelConfig, sharding: Sharding, dtype: str) -> tuple[Sharding, Any]:
    """Where inputs and pages go: to the device of the parameters, or on their mesh with the pages split over "tensor"
    where the key/value heads divide. Of pages also how they lie there."""
    shapes = jax.eval_shape(lambda: init_pages(cfg, 1, 1, dtype))
    if not isinstance(sharding, NamedSharding):
        return sharding, jax.tree.map(lambda x: row_by_row(x, sharding), shapes)
    mesh, rules = sharding.mesh, ShardingRules()
    ways = dict(mesh.shape).get("tensor", 1)
    divides = all(heads % ways == 0 for block in cfg.blocks for heads in _kv_heads(block))
    whole = NamedSharding(mesh, PartitionSpec())

    def place(array, axes) -> Format:
        heads = axes.index("act_kv_heads") if "act_kv_heads" in axes else None
        splits = ways > 1 and divides and heads is not None and array.shape[heads] % ways == 0
        return row_by_row(array, NamedSharding(mesh, rules.spec(axes)) if splits else whole)

    return whole, jax.tree.map(place, shapes, cache_axes(cfg, dtype))


def _kv_heads(part: Any) -> Iterator[int]:
    """The numbers of key/value heads of a block, wherever in it they are."""
    if isinstance(part, tuple):
        for member in part:
            yield from _kv_heads(member)
    if dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            yield from (value,) if field.name == "num_kv_heads" else _kv_heads(value)

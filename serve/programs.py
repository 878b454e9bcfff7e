"""The compiled steps: a prefill of one chunk a row, and several decode steps in one loop.

Each is compiled ahead of time for one shape of `EngineSizes.shapes`; after `warmup` a shape that is not there yet is
an error, so that a server never stops to compile.
"""

# R rows, C tokens of a chunk, P pages a row, S decode steps at most, V vocabulary

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
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
from serve.request import MAX_LOGPROBS, MAX_STOP_TOKENS
from serve.sampling import RowSampling, Sampled, sample

# Compiled programs of this process. A second engine of the same model and sizes compiles nothing.
_COMPILED: dict[tuple, Any] = {}
_COMPILERS = 4  # threads of `warmup`; each compilation takes one core and some memory


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


class Programs:
    """The programs of one engine, and the cache pages that they pass on."""

    def __init__(self, cfg: ModelConfig, params: Any, config: EngineSizes, vocab_size: int):
        self._config = config
        self.param_shardings = jax.tree.map(lambda x: x.sharding, params)
        self._steps = Steps(cfg, params, config, vocab_size)
        self._new_pages = jax.jit(self._steps.new_pages, out_shardings=self._steps.places)
        self.pages = self._new_pages()
        leaves, treedef = jax.tree.flatten(params)
        signature = tuple((x.shape, x.dtype, x.sharding) for x in leaves)
        sizes = (
            config.num_pages,
            config.max_rows,
            config.page_size,
            config.cache_dtype,
            config.decode_steps,
            vocab_size,
        )
        self._key = (cfg, treedef, signature, sizes, self._steps.backend)
        self._mine: dict[tuple, Any] = {}
        self._sealed = False

    def reset(self) -> None:
        """Empty pages, for when a failed call has lost them."""
        self.pages = self._new_pages()

    def clean(self, pages: list[int]) -> None:
        """Zero these pages. A masked slot has weight 0, but 0 * NaN is NaN: what is not finite must not be reused."""
        width = self._config.page_buckets[-1]
        index_P = np.full(width, self._config.num_pages + 1, np.int32)
        index_P[: len(pages)] = pages
        self.pages = self._program("clean", 1, 1, width)(self.pages, index_P)

    def warmup(self, progress: Callable[[int, int, float], None] | None = None) -> None:
        """Compile every shape, several at once; after that none may be missing.

        `progress(done, all, seconds)` is called after each.
        """
        shapes, start = self._config.shapes(), time.monotonic()
        pool = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, _COMPILERS))
        try:
            futures = [pool.submit(self._program, *shape) for shape in shapes]
            for i, future in enumerate(concurrent.futures.as_completed(futures)):
                future.result()
                if progress is not None:
                    progress(i + 1, len(shapes), time.monotonic() - start)
        finally:
            pool.shutdown(cancel_futures=True)
        self._sealed = True

    def prefill(self, params: Any, rows: Rows, tokens_RC: np.ndarray, count_R: np.ndarray) -> Sampled:
        """Compute the first `count_R` tokens of each row's chunk and sample what follows them.

        Returns: device arrays [R, 1, ...], without waiting for them.
        """
        R, C = tokens_RC.shape
        program = self._program("prefill", R, C, rows.page_table.shape[1])
        self.pages, sampled = program(params, self.pages, rows, tokens_RC, count_R)
        return sampled

    def decode(
        self, params: Any, rows: Rows, token_R: np.ndarray, budget_R: np.ndarray, steps: int
    ) -> tuple[jax.Array, Sampled]:
        """Up to `steps` tokens more for each row, at most `budget_R` of them, up to a stop token.

        Returns: how many each row got, [R], and the tokens [R, S, ...]; device arrays, without waiting for them.
        """
        program = self._program("decode", len(token_R), 1, rows.page_table.shape[1])
        self.pages, count_R, sampled = program(params, self.pages, rows, token_R, budget_R, np.int32(steps))
        return count_R, sampled

    @property
    def compiled(self) -> int:
        return len(self._mine)

    def _program(self, kind: str, R: int, C: int, P: int) -> Any:
        shape = (kind, R, C, P)
        if shape not in self._mine:
            if self._sealed:
                raise CompilationAfterWarmup(
                    f"{kind} with {R} rows, {C} tokens a row and {P} pages a row was not compiled by warmup. "
                    f"Known shapes: {sorted(self._mine)}."
                )
            key = (*self._key, shape)
            if key not in _COMPILED:
                _COMPILED[key] = self._steps.lower(*shape).compile()
            self._mine[shape] = _COMPILED[key]
        return self._mine[shape]


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
        sampling = RowSampling(floats, ints, floats, floats, array(np.uint32, R, 2), ints)
        rows = Rows(array(np.int32, R, P), ints, ints, array(np.int32, R, MAX_STOP_TOKENS), sampling)
        if kind == "prefill":
            function, more = _prefill, (array(np.int32, R, C), ints)
            out_shardings, static = (self.places, self._inputs), ()
        else:
            function, more = _decode, (ints, ints, array(np.int32))
            out_shardings = (self.places, self._inputs, self._inputs)
            static = (self._config.decode_steps,)
        step = functools.partial(function, self._cfg, self._of_pages.scan, self._vocab_size, *static)
        jitted = jax.jit(step, donate_argnums=1, out_shardings=out_shardings)
        return jitted.lower(self._params, self.pages, rows, *more)


def _prefill(cfg, scan, vocab_size, params, pages, rows: Rows, tokens_RC, count_R):
    cfg, params = relayout(cfg, params, scan=scan)
    real_RC = (jnp.arange(tokens_RC.shape[1]) < count_R[:, None]).astype(jnp.int32)
    cache = Cache(pages, rows.page_table, rows.length, rows.number)
    last_R1 = jnp.maximum(count_R - 1, 0)[:, None]
    out = apply(cfg, params, Inputs(tokens_RC, segment_ids=real_RC), cache, logits_at=last_R1)
    sampled = sample(out.logits[:, 0], rows.sampling, rows.length + count_R, vocab_size)
    assert out.cache is not None  # one went in
    return out.cache.layers, jax.tree.map(lambda x: x[:, None], sampled)


def _decode(cfg, scan, vocab_size, max_steps, params, pages, rows: Rows, token_R, budget_R, steps):
    cfg, params = relayout(cfg, params, scan=scan)
    R = len(token_R)
    count = min(MAX_LOGPROBS, cfg.vocab_size)
    floats, ints = jnp.zeros((R, max_steps)), jnp.zeros((R, max_steps), jnp.int32)
    empty = Sampled(
        ints, floats, floats, *(jnp.zeros((R, max_steps, count), t) for t in (jnp.int32, jnp.float32))
    )

    def more(carry):
        i, _, _, _, active_R, _, _ = carry
        return (i < steps) & jnp.any(active_R)

    def step(carry):
        i, pages, length_R, token_R, active_R, count_R, all_sampled = carry
        cache = Cache(pages, rows.page_table, length_R, rows.number)
        inputs = Inputs(token_R[:, None], segment_ids=active_R[:, None].astype(jnp.int32))
        out = apply(cfg, params, inputs, cache)
        assert out.cache is not None  # one went in
        length_R = out.cache.length
        sampled = sample(out.logits[:, 0], rows.sampling, length_R, vocab_size)
        all_sampled = jax.tree.map(lambda buffer, x: buffer.at[:, i].set(x), all_sampled, sampled)
        count_R += active_R
        stopped_R = jnp.any(sampled.token[:, None] == rows.stop_ids, axis=1)
        active_R &= ~stopped_R & (count_R < budget_R)
        return i + 1, out.cache.layers, length_R, sampled.token, active_R, count_R, all_sampled

    start = (jnp.int32(0), pages, rows.length, token_R, budget_R > 0, jnp.zeros(R, jnp.int32), empty)
    _, pages, _, _, _, count_R, all_sampled = jax.lax.while_loop(more, step, start)
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

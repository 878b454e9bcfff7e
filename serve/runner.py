"""The compiled programs of an engine and the cache that they pass on.

Each program is compiled ahead of time for one shape of `EngineSizes.shapes`; after `warmup` a shape that is not there
yet is an error, so that a server never stops to compile.
"""

# R rows, C tokens of a chunk, P pages a row, S decode steps at most

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from model import ModelConfig
from serve.engine_config import EngineSizes
from serve.plan import DecodeBatch, PrefillBatch, VerifyBatch
from serve.programs import CompilationAfterWarmup, PromptScores, Steps
from serve.sampling import Sampled

# Programs of this process, compiled or under way. A second engine of the same model and sizes compiles nothing.
_COMPILED: dict[tuple, concurrent.futures.Future] = {}
_COMPILED_LOCK = threading.Lock()
Progress = Callable[[int, int, float], None]
log = logging.getLogger("crucible.serve")
_COMPILERS = 4  # threads of `warmup`; each compilation takes one core and some memory


class Runner:
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
            config.adapter_slots,
            vocab_size,
        )
        self._key = (cfg, treedef, signature, sizes, self._steps.backend)
        self._mine: dict[tuple, Any] = {}
        self._sealed, self._warming = False, False

    def reset(self) -> None:
        """Empty pages, for when a failed call has lost them."""
        self.pages = self._new_pages()

    def clean(self, pages: list[int]) -> None:
        """Zero these pages. A masked slot has weight 0, but 0 * NaN is NaN: what is not finite must not be reused."""
        width = self._config.page_buckets[-1]
        index_P = np.full(width, self._config.num_pages + 1, np.int32)
        index_P[: len(pages)] = pages
        self.pages = self._program("clean", 1, 1, width)(self.pages, index_P)

    def warmup(self, progress: Progress | None = None) -> None:
        """Compile every shape, several at once; after that none may be missing.

        `progress(done, all, seconds)` is called after each.
        """
        self._compile_all(min(os.cpu_count() or 1, _COMPILERS), progress)

    def warmup_behind(self, progress: Progress | None = None) -> None:
        """`warmup` in a thread, the smallest programs first; meanwhile `is_ready` says which are there."""
        self._warming = True

        def compile_all():
            try:
                self._compile_all(1, progress)
            except Exception:
                log.exception("compiling ahead ended; programs are compiled when they are needed")
            finally:
                self._warming = False

        threading.Thread(target=compile_all, name="warmup", daemon=True).start()

    def is_ready(self, kind: str, R: int, C: int, P: int) -> bool:
        """Whether a step need not wait for this program, or nothing compiles it ahead."""
        return not self._warming or self.has(kind, R, C, P)

    def has(self, kind: str, R: int, C: int, P: int) -> bool:
        """Whether a step with this program measures its computation alone, without compiling it first."""
        return (kind, R, C, P) in self._mine

    def _compile_all(self, threads: int, progress: Progress | None) -> None:
        shapes, start = self._config.shapes(), time.monotonic()
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        try:
            futures = [pool.submit(self._program, *shape) for shape in shapes]
            for i, future in enumerate(concurrent.futures.as_completed(futures)):
                future.result()
                if progress is not None:
                    progress(i + 1, len(shapes), time.monotonic() - start)
        finally:
            pool.shutdown(cancel_futures=True)
        self._sealed = True

    def prefill(self, params: Any, batch: PrefillBatch) -> tuple[Sampled, PromptScores | None]:
        """Compute the batch's tokens and sample what follows them.

        Returns: device arrays [R, 1, ...], and the scores of the prompts if they are wanted, without waiting for them.
        """
        targets = () if batch.targets is None else (batch.targets,)
        program = self._program(*batch.shape)
        self.pages, sampled, *scores = program(
            params, self.pages, batch.rows, batch.tokens, batch.count, *targets
        )
        return sampled, scores[0] if scores else None

    def decode(self, params: Any, batch: DecodeBatch) -> tuple[jax.Array, Sampled]:
        """Up to `batch.steps` tokens more for each row, at most its budget, up to a stop token.

        Returns: how many each row got, [R], and the tokens [R, S, ...]; device arrays, without waiting for them.
        """
        program = self._program(*batch.shape)
        self.pages, count_R, sampled = program(
            params, self.pages, batch.rows, batch.token, batch.budget, np.int32(batch.steps)
        )
        return count_R, sampled

    def verify(self, params: Any, batch: VerifyBatch) -> Sampled:
        """The model's token after each of the batch's, [R, C, ...]; device arrays, without waiting for them."""
        program = self._program(*batch.shape)
        self.pages, sampled = program(params, self.pages, batch.rows, batch.tokens, batch.count)
        return sampled

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
            self._mine[shape] = self._compiled(shape)
        return self._mine[shape]

    def _compiled(self, shape: tuple[str, int, int, int]) -> Any:
        """The program of this process, compiled by one thread while others wait for it."""
        key = (*self._key, shape)
        with _COMPILED_LOCK:
            known = _COMPILED.get(key)
            future = _COMPILED.setdefault(key, concurrent.futures.Future())
        if known is None:
            try:
                future.set_result(self._steps.lower(*shape).compile())
            except BaseException as error:
                del _COMPILED[key]
                future.set_exception(error)
        return future.result()

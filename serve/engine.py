"""The engine: many requests at once over one paged cache (continuous batching).

Yu et al. 2022 (Orca, OSDI); Kwon et al. 2023 (vLLM), arXiv:2309.06180; chunked prefill: Agrawal et al. 2023,
arXiv:2308.16369. The HTTP server, rollouts and evaluations all drive this one.
"""

from __future__ import annotations

import dataclasses
import time
from collections import abc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from data import Tokenizer
from model import ModelConfig
from model.weights import in_whole_bytes
from serve.engine_config import EngineConfig
from serve.programs import Programs
from serve.request import MAX_STOP_TOKENS, FinishReason, Output, Request, RequestError, Sequence
from serve.sampling import Sampled
from serve.scheduler import DecodeBatch, PrefillBatch, Scheduler
from serve.text import TextStream


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, and its state now."""

    running: int
    waiting: int
    pages: int
    pages_free: int
    preemptions: int
    prompt_tokens: int  # of admitted requests, each once
    generated_tokens: int
    steps: int  # calls of `step` that had work
    programs: int  # shapes compiled or taken over


class Engine:
    """Generates for many requests at once. Not thread-safe: one thread makes all calls.

    Args:
      cfg, params: the model, on one device or sharded over a mesh; the engine runs where the parameters are.
      tokenizer: for its vocab_size, its eos_ids and for text; None for a vocabulary without text.
      config: an `EngineConfig`; `options` override its fields.
      version: number of these parameters; every sampled token records the version that sampled it.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Any,
        tokenizer: Tokenizer | None,
        config: EngineConfig = EngineConfig(),
        *,
        version: int = 0,
        **options: Any,
    ):
        self.config = dataclasses.replace(config, **options).resolve(cfg)
        self.cfg, self.tokenizer, self.version = cfg, tokenizer, version
        self.vocab_size = cfg.vocab_size if tokenizer is None else tokenizer.vocab_size
        if self.vocab_size > cfg.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} tokens and the model {cfg.vocab_size}: "
                "they do not belong together."
            )
        self._eos_ids = () if tokenizer is None else tuple(tokenizer.eos_ids)
        params = in_whole_bytes(params)
        self._programs = Programs(cfg, params, self.config, self.vocab_size)
        self._params = self._placed(params)
        self._scheduler = Scheduler(self.config)
        self._sequences: dict[str, Sequence] = {}  # not finished, or finished and not reported yet
        self._touched: dict[str, Sequence] = {}  # has new tokens for the next outputs
        self._number = 0
        self._prompt_tokens, self._generated_tokens, self._steps = 0, 0, 0
        self._seconds_per_step: float | None = None

    def submit(self, request: Request) -> str:
        """Queue a request; returns its id.

        Raises:
          RequestError: a token outside the vocabulary, a prompt or max_tokens beyond max_length, an id in use.
        """
        limit, stop_ids = self.check(request)
        sampling = request.sampling
        number = self._number
        id = request.id if request.id is not None else f"request-{number}"
        if id in self._sequences:
            raise RequestError("id", f"a request with id {id!r:.100} is being served; ids must differ.")
        self._number += 1
        stream = None
        if self.tokenizer is not None and (request.detokenize or sampling.stop):
            stream = TextStream(self.tokenizer, sampling.stop, request.continuation)
        seed = sampling.seed
        if seed is None:
            seed = int(np.random.SeedSequence([self.config.seed, number]).generate_state(1, np.uint64)[0])
        sequence = Sequence(request, id, number, seed, limit, stop_ids, stream)
        self._sequences[id] = sequence
        self._scheduler.add(sequence)
        self._prompt_tokens += len(request.prompt)
        return id

    def check(self, request: Request) -> tuple[int, tuple[int, ...]]:
        """Whether this engine can serve the request: (most new tokens, stop ids) or RequestError.

        Reads only what never changes, so any thread may call it.
        """
        prompt, sampling = request.prompt, request.sampling
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.vocab_size:
            raise RequestError(
                "prompt",
                f"token id {low if low < 0 else high} is outside the vocabulary, 0 to {self.vocab_size - 1}.",
            )
        limit = self._limit(len(prompt), sampling.max_tokens)
        eos_ids = () if sampling.ignore_eos else self._eos_ids
        stop_ids = tuple(dict.fromkeys((*eos_ids, *sampling.stop_token_ids)))
        if len(stop_ids) > MAX_STOP_TOKENS:
            raise RequestError(
                "stop_token_ids",
                f"{len(stop_ids)} stop tokens with the tokenizer's own; at most {MAX_STOP_TOKENS}.",
            )
        if any(not 0 <= token < self.vocab_size for token in stop_ids):
            raise RequestError(
                "stop_token_ids", f"stop_token_ids={stop_ids} must lie in 0 to {self.vocab_size - 1}."
            )
        if self.tokenizer is None and (request.detokenize or sampling.stop):
            raise RequestError(
                "stop", "this engine has no tokenizer: neither stop strings nor text can be had."
            )
        return limit, stop_ids

    def step(self) -> list[Output]:
        """One round: admit, one chunk of prefill, then decode. Returns an output for each request with new tokens
        or an end.
        """
        if not self.has_work:
            return []
        self._scheduler.admit()
        if (batch := self._scheduler.next_prefill()) is not None:
            self._prefill(batch)
        steps = 1 if self._scheduler.catching_up() else self._burst()
        if (batch := self._scheduler.next_decode(steps)) is not None:
            self._decode(batch)
        self._steps += 1
        return self._report()

    def cancel(self, id: str) -> bool:
        """Stop a request; the next `step` reports it as "cancelled". False: there is none, or it has finished."""
        sequence = self._sequences.get(id)
        if sequence is None or sequence.finish_reason is not None:
            return False
        self._finish(sequence, "cancelled")
        return True

    def generate(
        self, requests: abc.Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[Output]:
        """Serve these requests to the end; outputs in the order given. `progress(finished, all)` as it changes.

        Raises:
          RequestError: names the first request that can't be served; none is left behind.
          RuntimeError: other requests are under way, whose outputs would be lost.
        """
        if self.has_work:
            raise RuntimeError(
                "generate needs an idle engine; other requests are under way. Use submit and step."
            )
        ids: list[str] = []
        done: dict[str, Output] = {}
        try:
            for request in requests:
                ids.append(self.submit(request))
            while len(done) < len(ids):
                finished = {out.id: out for out in self.step() if out.finished}
                done |= finished
                if progress is not None and finished:
                    progress(len(done), len(ids))
        except BaseException:
            self.abort("generate was interrupted")
            raise
        return [done[id] for id in ids]

    def update_params(self, params: Any, version: int) -> None:
        """Take over new parameters of the same model, between steps. What is cached of running requests came from
        the old ones, so it is computed again from their tokens; sampled tokens stay.

        Raises:
          ValueError: another tree, shape or dtype than the engine was made with.
        """
        params = in_whole_bytes(params)
        _check_same(self._params, params)
        self._scheduler.preempt_all()
        self._params, self.version = self._placed(params), version

    def warmup(self, progress: Callable[[int, int, float], None] | None = None) -> None:
        """Compile every program there is; from then on a need to compile raises `CompilationAfterWarmup`."""
        self._programs.warmup(progress)

    def abort(self, error: str) -> list[Output]:
        """End every request with "error" and empty the cache; the engine can go on with new ones.

        For a step that raised: whether its donated cache survived is unknown.
        """
        for sequence in [a for a in self._sequences.values() if a.finish_reason is None]:
            sequence.error = error
            self._finish(sequence, "error")
        self._programs.reset()
        return self._report()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to report."""
        return bool(self._sequences)

    @property
    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.active),
            waiting=len(scheduler.waiting),
            pages=scheduler.pool.total,
            pages_free=scheduler.pool.free,
            preemptions=scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            programs=self._programs.compiled,
        )

    def _limit(self, prompt: int, max_tokens: int | None) -> int:
        longest = self.config.max_length
        if prompt >= longest:
            raise RequestError(
                "prompt",
                f"the prompt has {prompt} tokens; with at least one to sequence it may have {longest - 1}.",
            )
        if max_tokens is not None and prompt + max_tokens > longest:
            raise RequestError(
                "max_tokens",
                f"a prompt of {prompt} tokens and max_tokens={max_tokens} are more than the {longest} tokens of the "
                f"context; give max_tokens of at most {longest - prompt}.",
            )
        return longest - prompt if max_tokens is None else max_tokens

    def _placed(self, params: Any) -> Any:
        may_alias = False if self.config.copy_params else None
        return jax.device_put(params, self._programs.param_shardings, may_alias=may_alias)

    def _burst(self) -> int:
        """Decode steps of one dispatch, fewer when they are slow and someone watches."""
        steps, limit = self.config.decode_steps, self.config.burst_seconds
        if limit is None or self._seconds_per_step is None:
            return steps if limit is None else 1
        return max(1, min(steps, int(limit / self._seconds_per_step)))

    def _prefill(self, batch: PrefillBatch) -> None:
        sampled = self._programs.prefill(self._params, batch.rows, batch.tokens, batch.count)
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            sequence.cached += count
        complete = np.array([int(sequence.cached == sequence.length) for sequence in batch.sequences])
        self._take(batch.sequences, complete, sampled)

    def _decode(self, batch: DecodeBatch) -> None:
        start = time.monotonic()
        device_count, sampled = self._programs.decode(
            self._params, batch.rows, batch.token, batch.budget, batch.steps
        )
        counts = np.asarray(device_count)[: len(batch.sequences)]
        for sequence, count in zip(batch.sequences, counts.tolist(), strict=True):
            sequence.cached += count
        seconds = (time.monotonic() - start) / max(int(counts.max()), 1)
        known = self._seconds_per_step
        self._seconds_per_step = seconds if known is None else 0.8 * known + 0.2 * seconds
        self._take(batch.sequences, counts, sampled)

    def _take(self, sequences: list[Sequence], counts: np.ndarray, sampled: Sampled) -> None:
        """Add `counts` new tokens to each sequence; one copy from the device for all."""
        tokens, logprobs, model_logprobs = jax.device_get(
            (sampled.token, sampled.logprob, sampled.model_logprob)
        )
        wanted = any(sequence.request.sampling.logprobs for sequence in sequences)
        top = (
            jax.device_get((sampled.top_token, sampled.top_logprob)) if wanted else (np.empty(0), np.empty(0))
        )
        finite = np.isfinite(logprobs).tolist()
        now = time.monotonic()
        for i, (sequence, count) in enumerate(zip(sequences, counts.tolist(), strict=True)):
            good = (finite[i][: max(count, 1)] + [False]).index(False)
            if good < max(count, 1):  # of a chunk too, before its pages can pass to another row
                self._programs.clean(sequence.pages)
            kept = self._extend(sequence, tokens[i, : min(good, count)].tolist())
            if good < max(count, 1) and sequence.finish_reason is None:
                sequence.error = "the model's logits are not finite; its parameters may be damaged"
                self._finish(sequence, "error")
            if not kept:
                continue
            self._touched[sequence.id] = sequence
            sequence.first_token_at = sequence.first_token_at or now
            sequence.logprobs += logprobs[i, :kept].tolist()
            sequence.versions += [self.version] * kept
            self._generated_tokens += kept
            if sequence.request.sampling.logprobs is not None:
                sequence.model_logprobs += model_logprobs[i, :kept].tolist()
            if sequence.request.sampling.logprobs:
                n = sequence.request.sampling.logprobs
                ids, values = top[0][i, :kept, :n].tolist(), top[1][i, :kept, :n].tolist()
                sequence.top_logprobs += [
                    list(zip(*place, strict=True)) for place in zip(ids, values, strict=True)
                ]

    def _extend(self, sequence: Sequence, new: list[int]) -> int:
        """Add tokens up to the first that ends the sequence; returns how many were kept."""
        if not new:
            return 0
        kept = len(new)
        reason: FinishReason | None = None
        if new[-1] in sequence.stop_ids:  # the device stops a row there, so it can only be the last
            reason, sequence.stop_reason = "stop", new[-1]
        if sequence.stream is not None:
            for i, token in enumerate(new[:-1] if reason else new):
                if sequence.stream.push(token):
                    kept, reason, sequence.stop_reason = i + 1, "stop", sequence.stream.matched
                    break
        sequence.tokens += new[:kept]
        if reason is None and len(sequence.tokens) >= sequence.limit:
            reason = "length"
        if reason is not None:
            self._finish(sequence, reason)
        return kept

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason, sequence.finished_at = reason, time.monotonic()
        if sequence.stream is not None:
            sequence.stream.finish()
            if sequence.stream.matched is not None and reason == "length":
                sequence.finish_reason, sequence.stop_reason = "stop", sequence.stream.matched
        self._scheduler.remove(sequence)
        self._touched[sequence.id] = sequence

    def _report(self) -> list[Output]:
        outputs = [sequence.output() for sequence in self._touched.values()]
        for out in outputs:
            if out.finished:
                del self._sequences[out.id]
        self._touched = {}
        return outputs


def _check_same(old: Any, new: Any) -> None:
    old_tree, new_tree = jax.tree.structure(old), jax.tree.structure(new)
    if old_tree != new_tree:
        raise ValueError(f"the new parameters are another tree: {new_tree} instead of {old_tree}.")

    def check(path, a, b):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)} is {b.dtype}{list(b.shape)}; the engine was made with "
                f"{a.dtype}{list(a.shape)}. Make a new engine for another model, or cast to the old dtype."
            )

    jax.tree_util.tree_map_with_path(check, old, new)

"""The engine: many requests at once over one paged cache (continuous batching).

Yu et al. 2022 (Orca, OSDI); Kwon et al. 2023 (vLLM), arXiv:2309.06180; chunked prefill: Agrawal et al. 2023,
arXiv:2308.16369. The HTTP server, rollouts and evaluations all drive this one.
"""

from __future__ import annotations

import dataclasses
import time
from collections import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data import Tokenizer
from model import ModelConfig
from model.quantization import packed_for_decoding
from serve.adapters import AdapterSlots
from serve.blocks import chain_root
from serve.checks import RequestChecks
from serve.drafters import Speculation
from serve.engine_config import EngineConfig, bucket_of
from serve.plan import PrefillBatch, VerifyBatch
from serve.request import FinishReason, Output, Request, RequestError
from serve.results import fetch, keep, take_scores
from serve.runner import Runner
from serve.sampling import Sampled
from serve.scheduler import Scheduler
from serve.sequence import Sequence
from serve.text import TextStream

_ALONE = 5.0  # times `burst_seconds` for a chunk while no other request decodes; a cancel waits for it


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, and its state now."""

    running: int
    waiting: int
    pages: int
    pages_free: int  # those that a new request can have, cached ones among them
    pages_cached: int  # held by no request, and kept for one that begins with their tokens
    preemptions: int
    prompt_tokens: int  # of admitted requests, each once
    generated_tokens: int
    steps: int  # calls of `step` that had work
    programs: int  # shapes compiled or taken over
    prefix_queries: int = 0  # tokens of prompts that were looked up in the prefix cache
    prefix_hits: int = 0  # those that were found
    drafts: int = 0  # guesses that were verified, of one or more tokens each
    draft_tokens: int = 0  # tokens of these
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()  # how often the first, second, ... token of a draft was right


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
        shape_of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        self._given, sizes = jax.tree.map(shape_of, params), self.config
        cfg, params = packed_for_decoding(cfg, params)
        self._adapters = None
        if sizes.adapter_slots:
            self._adapters = AdapterSlots(cfg, sizes.adapter_slots, sizes.adapter_rank, sizes.adapter_targets)
            cfg, params = self._adapters.extend(params)
        self._checks = RequestChecks(sizes, tokenizer, self.vocab_size, cfg.vocab_size, self._adapters)
        self._runner = Runner(cfg, params, self.config, self.vocab_size)
        self._params = self._placed(params)
        self._scheduler = Scheduler(self.config, cfg.vocab_size)
        self._sequences: dict[str, Sequence] = {}  # not finished, or finished and not reported yet
        self._touched: dict[str, Sequence] = {}  # has new tokens for the next outputs
        self._number = 0
        self._prompt_tokens, self._generated_tokens, self._steps = 0, 0, 0
        self._updates = 0  # how often the parameters were replaced
        self._seconds_per_step: float | None = None  # of decoding
        self._seconds_per_token: float | None = None  # of prefill, padding included
        self._speculation = Speculation(self.config.draft_tokens)

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
        sequence.cache_root = self._cache_root(request)
        if self._adapters is not None:
            sequence.adapter = self._adapters.slot(request.adapter)
        sequence.matcher = self._checks.matcher(sampling, stop_ids)
        self._speculation.start(sequence)
        self._sequences[id] = sequence
        self._scheduler.add(sequence)
        self._prompt_tokens += len(request.prompt)
        return id

    def check(self, request: Request) -> tuple[int, tuple[int, ...]]:
        """Whether this engine can serve the request: (most new tokens, stop ids) or RequestError.

        Any thread may call it. It compiles a new grammar, which can take a second: call it off the hot path.
        """
        return self._checks.check(request)

    def step(self) -> list[Output]:
        """One round: admit, then one chunk of prefill and one burst of decoding, both under way together. Returns an
        output for each request with new tokens or an end.
        """
        if not self.has_work:
            return []
        self._scheduler.admit()
        # Rows that decode get their pages first: for them the youngest may lose its row, and needs no chunk then.
        decoding = self._scheduler.decoding()
        prefill = self._scheduler.next_prefill(self._most_prefill_tokens(bool(decoding)))
        start = time.monotonic()
        finish_decode = self._start_decode(decoding, 1 if prefill else self._burst()) if decoding else None
        finish_prefill = self._start_prefill(prefill) if prefill else None
        for finish in (finish_decode, finish_prefill):
            if finish is not None:
                finish(start)
                start = time.monotonic()
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
        _check_same(self._given, params)
        _, params = packed_for_decoding(self.cfg, params)
        if self._adapters is not None:
            params = self._adapters.join(params, self._params)
        self._scheduler.forget_all()
        self._params, self.version = self._placed(params), version
        self._updates += 1
        for sequence in self._sequences.values():
            sequence.hashes, sequence.cache_root = [], self._cache_root(sequence.request)

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Let requests name the LoRA adapter of a PEFT folder; between steps, while others run.

        Raises:
          ValueError: the engine has no slots, or none is free, the name is taken, or the folder does not fit.
        """
        if self._adapters is None:
            raise ValueError("this engine has no slots for adapters; make it with adapter_slots=1 or more.")
        self._params = self._adapters.load(name, folder, self._params)

    def drop_adapter(self, name: str) -> None:
        """Free the slot of an adapter. ValueError: a request under way uses it, or there is none of this name."""
        users = [id for id, sequence in self._sequences.items() if sequence.request.adapter == name]
        if users:
            raise ValueError(
                f"the adapter {name!r} is in use by {len(users)} requests, {users[0]!r} among them."
            )
        if self._adapters is None:
            raise ValueError(f"this engine has no adapter named {name!r}.")
        self._adapters.drop(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return [] if self._adapters is None else self._adapters.names

    def warmup(self, progress: Callable[[int, int, float], None] | None = None, *, wait: bool = True) -> None:
        """Compile every program there is; from then on a need to compile raises `CompilationAfterWarmup`.

        wait=False: in a thread, while the engine serves with what is compiled so far. The first answer needs one
        program, and is slow until more are there.
        """
        (self._runner.warmup if wait else self._runner.warmup_behind)(progress)

    def abort(self, error: str) -> list[Output]:
        """End every request with "error" and empty the cache; the engine can go on with new ones.

        For a step that raised: whether its donated cache survived is unknown.
        """
        for sequence in [a for a in self._sequences.values() if a.finish_reason is None]:
            sequence.error = error
            self._finish(sequence, "error")
        self._scheduler.forget_all()
        self._runner.reset()
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
            pages_free=scheduler.pool.available,
            pages_cached=scheduler.pool.cached,
            preemptions=scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            programs=self._runner.compiled,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            drafts=self._speculation.drafts,
            draft_tokens=self._speculation.tokens,
            accepted_tokens=sum(self._speculation.accepted_per_position),
            accepted_per_position=tuple(self._speculation.accepted_per_position),
        )

    def _cache_root(self, request: Request) -> bytes:
        adapter = 0 if self._adapters is None else self._adapters.identity(request.adapter)
        return chain_root(request.cache_salt, adapter, self._updates)

    def _placed(self, params: Any) -> Any:
        may_alias = False if self.config.copy_params else None
        return jax.device_put(params, self._runner.param_shardings, may_alias=may_alias)

    def _burst(self) -> int:
        """Decode steps of one dispatch, fewer when they are slow and someone watches."""
        steps, limit = self.config.decode_steps, self.config.burst_seconds
        if limit is None or self._seconds_per_step is None:
            return steps if limit is None else 1
        return max(1, min(steps, int(limit / self._seconds_per_step)))

    def _most_prefill_tokens(self, others_wait: bool) -> int | None:
        """Tokens of a chunk that take as long as a burst may; more when no answer waits for its next token."""
        limit = self.config.burst_seconds
        if limit is None:
            return None
        if self._seconds_per_token is None:
            return self.config.chunk_buckets[0]
        return int((limit if others_wait else _ALONE * limit) / self._seconds_per_token)

    def _start_prefill(self, batch: PrefillBatch) -> Callable[[float], None]:
        """Dispatch; what is returned takes the results, given the time when the device began with it."""
        if not self._runner.is_ready(*batch.shape):
            batch = self._scheduler.next_alone(batch.sequences)
        measured = self._runner.has(*batch.shape)
        sampled, scores = self._runner.prefill(self._params, batch)

        def finish(start: float) -> None:
            fetched = fetch(sampled, batch.sequences)
            seconds = (time.monotonic() - start) / batch.tokens.size
            if measured:
                self._seconds_per_token = _mean(self._seconds_per_token, seconds)
            if scores is not None:
                take_scores(batch, scores)
            for i, (sequence, count) in enumerate(zip(batch.sequences, batch.counts, strict=True)):
                complete = sequence.computed + count == sequence.length
                self._take(sequence, i, count, int(complete and sequence.limit > 0), fetched)
                if complete and sequence.limit == 0 and sequence.finish_reason is None:
                    self._finish(sequence, "length")

        return finish

    def _start_decode(self, sequences: list[Sequence], steps: int) -> Callable[[float], None]:
        rows = bucket_of(len(sequences), self.config.row_buckets)
        if (drafts := self._speculation.draft(sequences, rows)) is not None:
            verify = self._scheduler.next_verify(sequences, drafts)
            if self._runner.is_ready(*verify.shape):
                return self._start_verify(verify)
        batch = self._scheduler.next_decode(sequences, steps)
        if not self._runner.is_ready(*batch.shape):
            return self._start_prefill(self._scheduler.next_alone(sequences))
        measured = self._runner.has(*batch.shape)
        device_count, sampled = self._runner.decode(self._params, batch)

        def finish(start: float) -> None:
            counts = np.asarray(device_count)[: len(batch.sequences)].tolist()
            fetched = fetch(sampled, batch.sequences)
            seconds = (time.monotonic() - start) / max(*counts, 1)
            if measured:
                self._seconds_per_step = _mean(self._seconds_per_step, seconds)
                self._speculation.payoff.record("decode", len(batch.token), seconds)
            for i, (sequence, count) in enumerate(zip(batch.sequences, counts, strict=True)):
                self._take(sequence, i, count, count, fetched)

        return finish

    def _start_verify(self, batch: VerifyBatch) -> Callable[[float], None]:
        measured = self._runner.has(*batch.shape)
        sampled = self._runner.verify(self._params, batch)

        def finish(start: float) -> None:
            fetched = fetch(sampled, batch.sequences)
            if measured:
                self._speculation.payoff.record("verify", len(batch.tokens), time.monotonic() - start)
            for i, (sequence, draft) in enumerate(zip(batch.sequences, batch.drafts, strict=True)):
                accepted = self._speculation.accept(sequence, draft, fetched.token[i].tolist())
                self._take(sequence, i, accepted + 1, accepted + 1, fetched)

        return finish

    def _take(self, sequence: Sequence, i: int, computed: int, count: int, fetched: Sampled) -> None:
        """`computed` more tokens of a sequence, row `i` of the batch, are in the cache; the first `count` sampled
        ones are its next."""
        finite = np.isfinite(fetched.logprob[i, : max(count, 1)]).tolist()
        good = [*finite, False].index(False)
        reason = None
        if new := fetched.token[i, : min(good, count)].tolist():
            kept, reason = sequence.extend(new)
            keep(sequence, i, kept, fetched, self.version)
            self._touched[sequence.id] = sequence
            self._generated_tokens += kept
            if sequence.matcher is not None:
                sequence.matcher.accept(sequence.tokens[-kept:])
        if good == max(count, 1):
            self._scheduler.advance(sequence, computed)
        else:  # of a chunk too, before its pages can pass to another row
            self._runner.clean(self._scheduler.own_pages(sequence))
        if sequence.matcher is not None and sequence.matcher.error is not None:
            sequence.error = f"the grammar ended: {sequence.matcher.error:.500}"
            self._finish(sequence, "error")
        elif reason is not None:
            self._finish(sequence, reason)
        elif good < max(count, 1):
            sequence.error = "the model's logits are not finite; its parameters may be damaged"
            self._finish(sequence, "error")

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


def _mean(known: float | None, new: float) -> float:
    return new if known is None else 0.8 * known + 0.2 * new


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

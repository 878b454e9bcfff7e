"""The engine: many requests at once over one paged cache (continuous batching).

Yu et al. 2022 (Orca, OSDI); Kwon et al. 2023 (vLLM), arXiv:2309.06180; chunked prefill: Agrawal et al. 2023,
arXiv:2308.16369. The HTTP server, rollouts and evaluations all drive this one.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import abc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from data import Tokenizer
from model import ModelConfig
from model.weights import in_whole_bytes
from serve.adapters import AdapterSlots
from serve.blocks import chain_root
from serve.drafters import NgramIndex, Payoff
from serve.engine_config import EngineConfig, bucket_of
from serve.plan import PrefillBatch, VerifyBatch
from serve.programs import PromptScores
from serve.request import MAX_STOP_TOKENS, FinishReason, Output, Request, RequestError, SamplingParams
from serve.runner import Runner
from serve.sampling import Sampled
from serve.scheduler import Scheduler
from serve.sequence import Sequence
from serve.text import TextStream

if TYPE_CHECKING:
    from serve.grammar import GrammarCompiler

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
        self._eos_ids = () if tokenizer is None else tuple(tokenizer.eos_ids)
        params, sizes = in_whole_bytes(params), self.config
        self._adapters = None
        if sizes.adapter_slots:
            self._adapters = AdapterSlots(cfg, sizes.adapter_slots, sizes.adapter_rank, sizes.adapter_targets)
            cfg, params = self._adapters.extend(params)
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
        self._payoff = Payoff()
        self._drafts, self._draft_tokens = 0, 0
        self._accepted_per_position = [0] * self.config.draft_tokens

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
        if sampling.grammar is not None:
            sequence.matcher = self._grammars.compile(sampling.grammar)
        if self.config.draft_tokens:
            sequence.draft_index = NgramIndex()
        self._sequences[id] = sequence
        self._scheduler.add(sequence)
        self._prompt_tokens += len(request.prompt)
        return id

    def check(self, request: Request) -> tuple[int, tuple[int, ...]]:
        """Whether this engine can serve the request: (most new tokens, stop ids) or RequestError.

        Any thread may call it. It compiles a new grammar, which can take a second: call it off the hot path.
        """
        prompt, sampling = request.prompt, request.sampling
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.vocab_size:
            raise RequestError(
                "prompt",
                f"token id {low if low < 0 else high} is outside the vocabulary, 0 to {self.vocab_size - 1}.",
            )
        limit = self._limit(len(prompt), sampling.max_tokens)
        # A grammar ends with one of the tokenizer's own stop tokens.
        eos_ids = () if sampling.ignore_eos and sampling.grammar is None else self._eos_ids
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
        if self._adapters is not None:
            self._adapters.slot(request.adapter)
        elif request.adapter is not None:
            raise RequestError(
                "adapter",
                f"this engine has no adapter named {request.adapter!r:.100}; it was made without adapter_slots.",
            )
        self._check_edits(sampling)
        return limit, stop_ids

    def _check_edits(self, sampling: SamplingParams) -> None:
        biased = [token for token, _ in sampling.logit_bias]
        for field, tokens in (("logit_bias", biased), ("bad_words_ids", sum(sampling.bad_words_ids, ()))):
            if outside := [token for token in tokens if not 0 <= token < self.vocab_size]:
                raise RequestError(
                    field, f"{field} names the token {outside[0]}; wanted 0 to {self.vocab_size - 1}."
                )
        if sampling.prompt_logprobs is not None and not self.config.prompt_logprobs:
            raise RequestError(
                "prompt_logprobs", "this engine was made without EngineConfig.prompt_logprobs."
            )
        if sampling.grammar is not None:
            if not self._eos_ids:
                raise RequestError("grammar", "a grammar needs a tokenizer with a token that ends the text.")
            if sampling.min_tokens or sampling.bad_words_ids:
                raise RequestError(
                    "grammar", "min_tokens and bad_words_ids could forbid every token that a grammar allows."
                )
            self._grammars.compile(sampling.grammar)

    @functools.cached_property
    def _grammars(self) -> GrammarCompiler:
        from serve.grammar import GrammarCompiler

        assert self.tokenizer is not None  # `check` has seen its stop tokens
        return GrammarCompiler(self.tokenizer, self.cfg.vocab_size)

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
        params = in_whole_bytes(params)
        _check_same(self._params if self._adapters is None else self._adapters.without(self._params), params)
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

    def warmup(self, progress: Callable[[int, int, float], None] | None = None) -> None:
        """Compile every program there is; from then on a need to compile raises `CompilationAfterWarmup`."""
        self._runner.warmup(progress)

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
            drafts=self._drafts,
            draft_tokens=self._draft_tokens,
            accepted_tokens=sum(self._accepted_per_position),
            accepted_per_position=tuple(self._accepted_per_position),
        )

    def _cache_root(self, request: Request) -> bytes:
        adapter = 0 if self._adapters is None else self._adapters.identity(request.adapter)
        return chain_root(request.cache_salt, adapter, self._updates)

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
        sampled, scores = self._runner.prefill(self._params, batch)

        def finish(start: float) -> None:
            fetched = _fetch(sampled, batch.sequences)
            seconds = (time.monotonic() - start) / batch.tokens.size
            self._seconds_per_token = _mean(self._seconds_per_token, seconds)
            if scores is not None:
                _take_scores(batch, scores)
            for i, (sequence, count) in enumerate(zip(batch.sequences, batch.counts, strict=True)):
                complete = sequence.computed + count == sequence.length
                self._take(sequence, i, count, int(complete and sequence.limit > 0), fetched)
                if complete and sequence.limit == 0 and sequence.finish_reason is None:
                    self._finish(sequence, "length")

        return finish

    def _start_decode(self, sequences: list[Sequence], steps: int) -> Callable[[float], None]:
        drafts = [self._draft(sequence) for sequence in sequences]
        if any(drafts):
            rows = bucket_of(len(sequences), self.config.row_buckets)
            expected = [
                min(len(draft), sequence.draft_index.mean_accepted)
                for sequence, draft in zip(sequences, drafts, strict=True)
                if sequence.draft_index is not None
            ]
            if self._payoff.pays(rows, len(sequences), expected):
                return self._start_verify(self._scheduler.next_verify(sequences, drafts))
        batch = self._scheduler.next_decode(sequences, steps)
        device_count, sampled = self._runner.decode(self._params, batch)

        def finish(start: float) -> None:
            counts = np.asarray(device_count)[: len(batch.sequences)].tolist()
            fetched = _fetch(sampled, batch.sequences)
            seconds = (time.monotonic() - start) / max(*counts, 1)
            self._seconds_per_step = _mean(self._seconds_per_step, seconds)
            self._payoff.record("decode", len(batch.token), seconds)
            for i, (sequence, count) in enumerate(zip(batch.sequences, counts, strict=True)):
                self._take(sequence, i, count, count, fetched)

        return finish

    def _start_verify(self, batch: VerifyBatch) -> Callable[[float], None]:
        sampled = self._runner.verify(self._params, batch)

        def finish(start: float) -> None:
            fetched = _fetch(sampled, batch.sequences)
            self._payoff.record("verify", len(batch.tokens), time.monotonic() - start)
            for i, (sequence, draft) in enumerate(zip(batch.sequences, batch.drafts, strict=True)):
                model_tokens = fetched.token[i].tolist()
                pairs = enumerate(zip(draft, model_tokens, strict=False))
                accepted = next((j for j, (guess, token) in pairs if guess != token), len(draft))
                if draft:
                    self._record_draft(sequence, len(draft), accepted)
                self._take(sequence, i, accepted + 1, accepted + 1, fetched)

        return finish

    def _draft(self, sequence: Sequence) -> list[int]:
        if (index := sequence.draft_index) is None:
            return []
        index.extend(sequence.slice(len(index), sequence.length))
        guess = index.propose(min(self.config.draft_tokens, sequence.limit - len(sequence.tokens) - 1))
        ends = (j for j, token in enumerate(guess) if token in sequence.stop_ids)
        guess = guess[: next(ends, len(guess))]
        return guess if sequence.matcher is None else guess[: sequence.matcher.valid(guess)]

    def _record_draft(self, sequence: Sequence, tokens: int, accepted: int) -> None:
        self._drafts, self._draft_tokens = self._drafts + 1, self._draft_tokens + tokens
        for j in range(accepted):
            self._accepted_per_position[j] += 1
        if sequence.draft_index is not None:
            sequence.draft_index.record(accepted)

    def _take(self, sequence: Sequence, i: int, computed: int, count: int, fetched: Sampled) -> None:
        """`computed` more tokens of a sequence, row `i` of the batch, are in the cache; the first `count` sampled
        ones are its next."""
        finite = np.isfinite(fetched.logprob[i, : max(count, 1)]).tolist()
        good = [*finite, False].index(False)
        reason = None
        if new := fetched.token[i, : min(good, count)].tolist():
            kept, reason = sequence.extend(new)
            self._keep(sequence, i, kept, fetched)
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

    def _keep(self, sequence: Sequence, i: int, kept: int, fetched: Sampled) -> None:
        """Record what belongs to the `kept` new tokens of row `i`."""
        self._touched[sequence.id] = sequence
        sequence.first_token_at = sequence.first_token_at or time.monotonic()
        sequence.logprobs += fetched.logprob[i, :kept].tolist()
        sequence.processed_logprobs += fetched.processed_logprob[i, :kept].tolist()
        sequence.kept_mass += fetched.kept_mass[i, :kept].tolist()
        sequence.versions += [self.version] * kept
        self._generated_tokens += kept
        alternatives = sequence.request.sampling.logprobs
        if alternatives is not None:
            sequence.model_logprobs += fetched.model_logprob[i, :kept].tolist()
        if alternatives:
            places = fetched.top_token[i, :kept, :alternatives], fetched.top_logprob[i, :kept, :alternatives]
            sequence.top_logprobs += _pairs(*places)

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


def _fetch(sampled: Sampled, sequences: list[Sequence]) -> Sampled:
    """In numpy, by one copy from the device; the alternatives only where one of the sequences wants them."""
    if not any(sequence.request.sampling.logprobs for sequence in sequences):
        sampled = dataclasses.replace(sampled, top_token=cast(Any, None), top_logprob=cast(Any, None))
    return jax.device_get(sampled)


def _take_scores(batch: PrefillBatch, device_scores: PromptScores) -> None:
    scores = jax.device_get(device_scores)
    for i, (sequence, count) in enumerate(zip(batch.sequences, batch.counts, strict=True)):
        start = sequence.computed
        stop = min(start + count, len(sequence.request.prompt) - 1)
        if start >= stop or not sequence.wants_prompt_scores:
            continue
        # A chunk that is computed again after a preemption replaces what it said before.
        sequence.prompt_logprobs[start:stop] = scores.logprob[i, : stop - start].tolist()
        if wanted := sequence.request.sampling.prompt_logprobs:
            places = (
                scores.top_token[i, : stop - start, :wanted],
                scores.top_logprob[i, : stop - start, :wanted],
            )
            sequence.prompt_top_logprobs[start:stop] = _pairs(*places)


def _pairs(tokens: Any, logprobs: Any) -> list[list[tuple[int, float]]]:
    return [list(zip(*place, strict=True)) for place in zip(tokens.tolist(), logprobs.tolist(), strict=True)]


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

"""Whether an engine can serve a request, from what never changes while requests run."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from data import Tokenizer
from serve.adapters import AdapterSlots
from serve.engine_config import EngineSizes
from serve.request import MAX_STOP_TOKENS, Request, RequestError, SamplingParams

if TYPE_CHECKING:
    from serve.grammar import GrammarCompiler, Matcher
    from serve.thinking import ThoughtMatcher, Vocabulary


class RequestChecks:
    """The limits of one engine. Any thread may call it."""

    def __init__(
        self,
        sizes: EngineSizes,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        model_vocab_size: int,
        adapters: AdapterSlots | None,
    ):
        self._sizes, self._tokenizer, self._adapters = sizes, tokenizer, adapters
        self._vocab_size, self._model_vocab_size = vocab_size, model_vocab_size
        self._eos_ids = () if tokenizer is None else tuple(tokenizer.eos_ids)

    def check(self, request: Request) -> tuple[int, tuple[int, ...]]:
        """(most new tokens, stop ids) of a request that the engine can serve, or RequestError."""
        prompt, sampling = request.prompt, request.sampling
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self._vocab_size:
            raise RequestError(
                "prompt",
                f"token id {low if low < 0 else high} is outside the vocabulary, 0 to {self._vocab_size - 1}.",
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
        if any(not 0 <= token < self._vocab_size for token in stop_ids):
            raise RequestError(
                "stop_token_ids", f"stop_token_ids={stop_ids} must lie in 0 to {self._vocab_size - 1}."
            )
        if self._tokenizer is None and (request.detokenize or sampling.stop):
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
            if outside := [token for token in tokens if not 0 <= token < self._vocab_size]:
                raise RequestError(
                    field, f"{field} names the token {outside[0]}; wanted 0 to {self._vocab_size - 1}."
                )
        if sampling.prompt_logprobs is not None and not self._sizes.prompt_logprobs:
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
            self.grammars.compile(sampling.grammar)
        if (thinking := sampling.thinking) is not None:
            if self._tokenizer is None:
                raise RequestError(
                    "thinking", "this engine has no tokenizer, so a thought's end can't be read."
                )
            if sampling.bad_words_ids:
                raise RequestError("thinking", "bad_words_ids could forbid the tokens that close a thought.")
            if outside := [t for t in (*thinking.start, *thinking.end) if not 0 <= t < self._vocab_size]:
                raise RequestError(
                    "thinking", f"thinking names the token {outside[0]}; wanted 0 to {self._vocab_size - 1}."
                )

    def matcher(self, sampling: SamplingParams, stop_ids: tuple[int, ...]) -> Matcher | ThoughtMatcher | None:
        """What an output must match from its start on, if anything."""
        grammar = None if sampling.grammar is None else self.grammars.compile(sampling.grammar)
        if sampling.thinking is None:
            return grammar
        from serve.thinking import ThoughtMatcher

        return ThoughtMatcher(sampling.thinking, self._vocabulary, grammar, stop_ids)

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        from serve.thinking import Vocabulary

        assert self._tokenizer is not None  # `check` has seen it
        return Vocabulary(self._tokenizer, self._model_vocab_size)

    @functools.cached_property
    def grammars(self) -> GrammarCompiler:
        from serve.grammar import GrammarCompiler

        assert self._tokenizer is not None  # `check` has seen its stop tokens
        return GrammarCompiler(self._tokenizer, self._model_vocab_size)

    def _limit(self, prompt: int, max_tokens: int | None) -> int:
        longest = self._sizes.max_length
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

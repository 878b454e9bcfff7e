"""What goes into the engine and what comes out: Request, SamplingParams, Output. Token ids in, token ids out."""

from __future__ import annotations

import dataclasses
import math
from collections import abc
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from serve.sequence import Sequence

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 16  # a request's own and the tokenizer's together
MAX_LOGPROBS = 20  # alternatives a token
MAX_SEED = 2**64 - 1
MAX_BIASES = 300  # of one request, as in OpenAI's API
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 16


class RequestError(ValueError):
    """A request that can't be served: `field` is the one at fault."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an output must match, as llguidance reads it (github.com/guidance-ai/llguidance)."""

    kind: Literal["json_schema", "regex", "lark", "choice"]
    source: (
        str | tuple[str, ...]
    )  # the schema as JSON text, the expression, the grammar; of "choice" the texts

    def __post_init__(self):
        if self.kind not in ("json_schema", "regex", "lark", "choice"):
            raise RequestError(
                "grammar", f"kind={self.kind!r:.100}; wanted json_schema, regex, lark or choice."
            )
        if self.kind == "choice":
            source = self.source
            if isinstance(source, str) or not source or not all(isinstance(text, str) for text in source):
                raise RequestError(
                    "grammar", f"choice of {source!r:.100}; wanted a list of at least one text."
                )
            object.__setattr__(self, "source", tuple(source))
        elif not isinstance(self.source, str):
            raise RequestError("grammar", f"the source is {type(self.source).__name__}; wanted text.")


@dataclasses.dataclass(frozen=True)
class Thinking:
    """A thought before the answer. A grammar is met by what follows the thought.

    Attributes:
      end: the tokens that close it; it ends as well where their text comes in other tokens.
      start: the tokens that open it at the start of the output, where it may also be missing; (): the prompt did.
      budget: most tokens of the thought; then the tokens of its end come next. None: no limit.
    """

    end: tuple[int, ...]
    start: tuple[int, ...] = ()
    budget: int | None = None

    def __post_init__(self):
        for name in ("end", "start"):
            object.__setattr__(self, name, _checked_tokens(f"thinking.{name}", getattr(self, name)))
        if not self.end:
            raise RequestError("thinking", "thinking.end is empty; wanted the tokens that close a thought.")
        _check_int("thinking.budget", self.budget, 0, optional=True)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. RequestError for a value of the wrong type or range.

    Logits are changed in the order repetition_penalty, frequency_penalty and presence_penalty, logit_bias; then what
    bad_words_ids, min_tokens and grammar forbid gets no probability. Filters apply in the order temperature, top_k,
    top_p (of what top_k kept), min_p, typical_p (of what all others kept); ties at a limit are kept.
    """

    max_tokens: int | None = None  # None: until the engine's max_length; 0: only with prompt_logprobs
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = (
        0.0  # least probability relative to the likeliest token's (Nguyen et al. 2024, arXiv:2407.01082)
    )
    typical_p: float = (
        1.0  # mass of the tokens closest to the entropy (Meister et al. 2022, arXiv:2202.00666)
    )
    # divides positive logits of tokens in prompt and output, multiplies negative ones (Keskar et al. 2019,
    # arXiv:1909.05858)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # taken from the logit of each token in the output
    frequency_penalty: float = 0.0  # taken as often as the token is in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added); a dict is taken too
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # token sequences that the output must not contain
    min_tokens: int = 0  # no stop token is sampled before the output has so many
    grammar: Grammar | None = None  # what the output must match
    thinking: Thinking | None = None  # a thought before it, and its budget
    seed: int | None = None  # None: derived from the engine's seed and the request's number
    stop: tuple[str, ...] = ()  # strings; the text ends before the first that appears
    stop_token_ids: tuple[int, ...] = ()  # beside the tokenizer's eos_ids
    ignore_eos: bool = False  # do not stop at the tokenizer's eos_ids
    logprobs: int | None = None  # model log-probabilities (temperature 1), with so many alternatives a token
    prompt_logprobs: int | None = None  # the same of the prompt's tokens after the first

    def __post_init__(self):
        _check_int("max_tokens", self.max_tokens, 0 if self.prompt_logprobs is not None else 1, optional=True)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        if 0 < self.temperature < 1e-3:
            raise RequestError(
                "temperature",
                f"temperature={self.temperature} is too close to 0; give 0 for greedy or at least 0.001.",
            )
        _check_int("top_k", self.top_k, 0)
        _check_float("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("typical_p", self.typical_p, 0.0, 1.0, above=True)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_float("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_float("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_int("seed", self.seed, 0, MAX_SEED, optional=True)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos", f"ignore_eos={self.ignore_eos!r}; wanted True or False.")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise RequestError("grammar", f"grammar is {type(self.grammar).__name__}; wanted serve.Grammar.")
        if self.thinking is not None and not isinstance(self.thinking, Thinking):
            raise RequestError(
                "thinking", f"thinking is {type(self.thinking).__name__}; wanted serve.Thinking."
            )
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_tokens("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "bad_words_ids", _checked_bad_words(self.bad_words_ids))
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise RequestError(
                "stop_token_ids",
                f"{len(self.stop_token_ids)} stop_token_ids; at most {MAX_STOP_TOKENS} can be given.",
            )

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed before the temperature."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or bool(self.logit_bias) or self.min_tokens > 0


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    prompt: abc.Sequence[int]  # token ids, at least one
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    id: str | None = None  # None: the engine makes one
    detokenize: bool = False  # fill in `Output.text` (always so when there are stop strings)
    continuation: bool = False  # the text goes on from the prompt's: a SentencePiece prefix space is kept
    cache_salt: str = ""  # only requests of the same salt share cached prefixes
    adapter: str | None = None  # name of a loaded adapter; None: the model without adapters

    def __post_init__(self):
        if not isinstance(self.cache_salt, str):
            raise RequestError("cache_salt", f"cache_salt={self.cache_salt!r:.100}; wanted a string.")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise RequestError("adapter", f"adapter={self.adapter!r:.100}; wanted the name of one.")
        if not isinstance(self.sampling, SamplingParams):
            raise RequestError(
                "sampling", f"sampling is {type(self.sampling).__name__}; wanted SamplingParams."
            )
        if self.id is not None and not isinstance(self.id, str):
            raise RequestError("id", f"id={self.id!r}; wanted a string.")
        object.__setattr__(self, "prompt", _checked_tokens("prompt", self.prompt))
        if not self.prompt:
            raise RequestError(
                "prompt", "the prompt has no tokens; begin with tokenizer.bos_id when there is no text."
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """News of one request. `tokens`, `logprobs` ... are all so far; `new_...` only those since the last output.

    `finish_reason` None: goes on; "stop": a stop token (kept in `tokens`) or stop string (its tokens are kept,
    `text` ends before it); "length": max_tokens; "cancelled"; "error": see `error`.
    """

    id: str
    finish_reason: FinishReason | None
    _sequence: Sequence
    _start: int
    _stop: int
    _text_start: int
    _text_stop: int

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        return self._stop

    @property
    def new_tokens(self) -> list[int]:
        return self._sequence.tokens[self._start : self._stop]

    @property
    def new_logprobs(self) -> list[float]:
        return self._sequence.logprobs[self._start : self._stop]

    @property
    def tokens(self) -> list[int]:
        return self._sequence.tokens[: self._stop]

    @property
    def logprobs(self) -> list[float]:
        """log p(token) in nats at the sampling temperature (1 when greedy), over the full vocabulary, unfiltered."""
        return self._sequence.logprobs[: self._stop]

    @property
    def model_logprobs(self) -> list[float]:
        """log p(token) in nats at temperature 1; empty unless `SamplingParams.logprobs` was given."""
        return self._sequence.model_logprobs[: self._stop]

    @property
    def top_logprobs(self) -> list[list[tuple[int, float]]]:
        """(token id, log p at temperature 1) of the likeliest tokens at each place; empty unless asked for."""
        return self._sequence.top_logprobs[: self._stop]

    @property
    def processed_logprobs(self) -> list[float]:
        """log p(token) in nats under the distribution that it was drawn from: after edits, temperature and filters."""
        return self._sequence.processed_logprobs[: self._stop]

    @property
    def kept_mass(self) -> list[float]:
        """The share of the distribution after edits and temperature that the filters kept; greedy: the token's own."""
        return self._sequence.kept_mass[: self._stop]

    @property
    def cumulative_logprob(self) -> float:
        """The sum of `logprobs`, by which the best of several outputs is chosen."""
        return sum(self.logprobs)

    @property
    def prompt_logprobs(self) -> list[float]:
        """log p in nats at temperature 1 of the prompt's tokens from the second on; empty unless asked for."""
        return list(self._sequence.prompt_logprobs)

    @property
    def prompt_top_logprobs(self) -> list[list[tuple[int, float]]]:
        """As `top_logprobs`, for the places of `prompt_logprobs`."""
        return list(self._sequence.prompt_top_logprobs)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found in the prefix cache."""
        return self._sequence.prefix_hits

    @property
    def versions(self) -> list[int]:
        """The version of the parameters that sampled each token."""
        return self._sequence.versions[: self._stop]

    @property
    def version(self) -> int | None:
        """That of the last token; None when there is none yet."""
        return self._sequence.versions[self._stop - 1] if self._stop else None

    @property
    def text(self) -> str:
        return self._sequence.stream.text[: self._text_stop] if self._sequence.stream is not None else ""

    @property
    def new_text(self) -> str:
        return (
            self._sequence.stream.text[self._text_start : self._text_stop]
            if self._sequence.stream is not None
            else ""
        )

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or stop token id that ended the sequence."""
        return self._sequence.stop_reason if self.finished else None

    @property
    def error(self) -> str | None:
        return self._sequence.error

    @property
    def prompt_tokens(self) -> int:
        return len(self._sequence.request.prompt)

    @property
    def times(self) -> dict[str, float]:
        """Seconds of the monotonic clock: submitted and, once they have happened, admitted, first_token, finished."""
        a = self._sequence
        times = {
            "submitted": a.submitted_at,
            "admitted": a.admitted_at,
            "first_token": a.first_token_at,
            "finished": a.finished_at,
        }
        return {name: seconds for name, seconds in times.items() if seconds is not None}


def _check_int(field: str, value: Any, low: int, high: int | None = None, optional: bool = False) -> None:
    if value is None and optional:
        return
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(field, f"{field}={value!r:.100}; wanted a whole number {limits}.")


def _check_float(field: str, value: Any, low: float, high: float, above: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high or (above and value == low):
        limits = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise RequestError(field, f"{field}={value!r:.100}; wanted a number {limits}.")


def _checked_stop(stop: Any) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, (list, tuple)) or not all(isinstance(s, str) for s in stop):
        raise RequestError("stop", f"stop={stop!r:.100}; wanted a string or a list of strings.")
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError("stop", f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} can be given.")
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise RequestError(
                "stop", f"a stop string has {len(text)} characters; each must have 1 to {MAX_STOP_CHARS}."
            )
    return tuple(stop)


def _checked_tokens(field: str, tokens: Any) -> tuple[int, ...]:
    if hasattr(tokens, "tolist"):  # numpy and jax arrays
        tokens = tokens.tolist()
    if not isinstance(tokens, (list, tuple)):
        raise RequestError(field, f"{field} is {type(tokens).__name__}; wanted a list of token ids.")
    if all(type(token) is int for token in tokens):
        return tuple(tokens)
    for i, token in enumerate(tokens):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise RequestError(field, f"{field}[{i}]={token!r:.100}; wanted a token id, a whole number.")
    return tuple(token.__index__() for token in tokens)


def _checked_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    pairs = tuple(bias.items()) if isinstance(bias, abc.Mapping) else bias
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    ):
        raise RequestError(
            "logit_bias", f"logit_bias={bias!r:.100}; wanted token ids with what is added to each."
        )
    if len(pairs) > MAX_BIASES:
        raise RequestError(
            "logit_bias", f"logit_bias has {len(pairs)} tokens; at most {MAX_BIASES} can be given."
        )
    tokens = _checked_tokens("logit_bias", [token for token, _ in pairs])
    if len(set(tokens)) < len(tokens):
        raise RequestError("logit_bias", "logit_bias names a token twice.")
    for _, value in pairs:
        _check_float("logit_bias", value, -100.0, 100.0)
    return tuple((token, float(value)) for token, (_, value) in zip(tokens, pairs, strict=True))


def _checked_bad_words(words: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(words, (list, tuple)):
        raise RequestError(
            "bad_words_ids", f"bad_words_ids={words!r:.100}; wanted a list of lists of token ids."
        )
    if len(words) > MAX_BAD_WORDS:
        raise RequestError("bad_words_ids", f"{len(words)} bad words; at most {MAX_BAD_WORDS} can be given.")
    checked = tuple(_checked_tokens("bad_words_ids", word) for word in words)
    if not all(1 <= len(word) <= MAX_BAD_WORD_TOKENS for word in checked):
        raise RequestError("bad_words_ids", f"a bad word must have 1 to {MAX_BAD_WORD_TOKENS} tokens.")
    return checked


def choices(request: Request, count: int) -> list[Request]:
    """`count` requests for outputs to one prompt, of which the engine computes it once where prefixes are cached.

    Each has a seed of its own: that of the request plus its index, or the engine's choice when the request has none.
    """
    seed = request.sampling.seed
    return [
        dataclasses.replace(
            request,
            id=None if request.id is None else f"{request.id}-{i}",
            sampling=request.sampling
            if seed is None
            else dataclasses.replace(request.sampling, seed=(seed + i) % (MAX_SEED + 1)),
        )
        for i in range(count)
    ]

"""What goes into the engine and what comes out: Request, SamplingParams, Output. Token ids in, token ids out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import abc
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from serve.text import TextStream

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 16  # a request's own and the tokenizer's together
MAX_LOGPROBS = 20  # alternatives a token
MAX_SEED = 2**64 - 1


class RequestError(ValueError):
    """A request that can't be served: `field` is the one at fault."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. RequestError for a value of the wrong type or range.

    Filters apply in the order temperature, top_k, top_p (of what top_k kept), min_p; ties at a limit are kept.
    """

    max_tokens: int | None = None  # None: until the engine's max_length
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = (
        0.0  # least probability relative to the likeliest token's (Nguyen et al. 2024, arXiv:2407.01082)
    )
    seed: int | None = None  # None: derived from the engine's seed and the request's number
    stop: tuple[str, ...] = ()  # strings; the text ends before the first that appears
    stop_token_ids: tuple[int, ...] = ()  # beside the tokenizer's eos_ids
    ignore_eos: bool = False  # do not stop at the tokenizer's eos_ids
    logprobs: int | None = None  # model log-probabilities (temperature 1), with so many alternatives a token

    def __post_init__(self):
        _check_int("max_tokens", self.max_tokens, 1, optional=True)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        if 0 < self.temperature < 1e-3:
            raise RequestError(
                "temperature",
                f"temperature={self.temperature} is too close to 0; give 0 for greedy or at least 0.001.",
            )
        _check_int("top_k", self.top_k, 0)
        _check_float("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_int("seed", self.seed, 0, MAX_SEED, optional=True)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos", f"ignore_eos={self.ignore_eos!r}; wanted True or False.")
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_tokens("stop_token_ids", self.stop_token_ids))
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise RequestError(
                "stop_token_ids",
                f"{len(self.stop_token_ids)} stop_token_ids; at most {MAX_STOP_TOKENS} can be given.",
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    prompt: abc.Sequence[int]  # token ids, at least one
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    id: str | None = None  # None: the engine makes one
    detokenize: bool = False  # fill in `Output.text` (always so when there are stop strings)
    continuation: bool = False  # the text goes on from the prompt's: a SentencePiece prefix space is kept

    def __post_init__(self):
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


class Sequence:
    """The engine's own record of a request: what has been sampled so far and what of it is in the cache."""

    __slots__ = (
        "admitted_at",
        "cached",
        "error",
        "finish_reason",
        "first_token_at",
        "finished_at",
        "id",
        "limit",
        "logprobs",
        "model_logprobs",
        "number",
        "pages",
        "reported",
        "reported_text",
        "request",
        "row",
        "seed",
        "stop_ids",
        "stop_reason",
        "stream",
        "submitted_at",
        "tokens",
        "top_logprobs",
        "versions",
    )

    def __init__(
        self,
        request: Request,
        id: str,
        number: int,
        seed: int,
        limit: int,
        stop_ids: tuple[int, ...],
        stream: TextStream | None,
    ):
        self.request, self.id, self.number = request, id, number
        self.seed, self.limit, self.stop_ids = seed, limit, stop_ids
        self.stream = stream  # None when no text is wanted
        self.tokens: list[int] = []  # sampled; the prompt is in the request
        self.logprobs: list[float] = []
        self.model_logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.versions: list[int] = []
        self.row = -1  # of the batch; -1: waiting
        self.pages: list[int] = []
        self.cached = 0  # tokens (of prompt and output) whose keys and values are in the cache
        self.reported, self.reported_text = 0, 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self.submitted_at = time.monotonic()
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.finished_at: float | None = None

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens)

    def slice(self, start: int, stop: int) -> list[int]:
        """Tokens start to stop of prompt and output together."""
        prompt = self.request.prompt
        split = len(prompt)
        return [*prompt[start:stop], *self.tokens[max(start - split, 0) : max(stop - split, 0)]]

    def output(self) -> Output:
        """What is new since the last call."""
        stop, text_stop = len(self.tokens), len(self.stream.text) if self.stream is not None else 0
        out = Output(self.id, self.finish_reason, self, self.reported, stop, self.reported_text, text_stop)
        self.reported, self.reported_text = stop, text_stop
        return out


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

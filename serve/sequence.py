"""The engine's own record of a request: the tokens, the pages they have in the cache, and how it ended."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from serve.request import FinishReason, Output, Request

if TYPE_CHECKING:
    from serve.drafters import NgramIndex
    from serve.grammar import Matcher
    from serve.text import TextStream
    from serve.thinking import ThoughtMatcher

UNBOUNDED = 1 << 30  # more steps than any text has


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """A prompt, the tokens sampled after it, and their keys and values in the cache.

    Attributes:
      number: order of arrival.
      limit: the most tokens to sample.
      tokens: sampled; the prompt is in the request. `logprobs` and the lists after it have an entry for each.
      row: of the batch; -1: waiting.
      computed: tokens of prompt and output whose keys and values are in the pages.
      hashes: of the full blocks of tokens so far, see serve.blocks.
      registered: blocks that the pool knows by their hash, or that came from it.
      cache_root: the start of the hash chain; another for each adapter, salt and version of the parameters.
    """

    request: Request
    id: str
    number: int
    seed: int
    limit: int
    stop_ids: tuple[int, ...]
    stream: TextStream | None  # None when no text is wanted
    matcher: Matcher | ThoughtMatcher | None = None  # of the grammar, or of a thought and what follows it
    adapter: int = -1  # slot of the adapter; -1: none
    cache_root: bytes = b""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    processed_logprobs: list[float] = dataclasses.field(default_factory=list)
    kept_mass: list[float] = dataclasses.field(default_factory=list)
    model_logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)

    row: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    registered: int = 0
    prefix_hits: int = 0  # tokens found in the cache when it was first admitted

    draft_index: NgramIndex | None = None
    reported: int = 0
    reported_text: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    submitted_at: float = dataclasses.field(default_factory=time.monotonic)
    admitted_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def decodes(self) -> bool:
        """Whether only the last sampled token is still to be computed."""
        return bool(self.tokens) and self.computed == self.length - 1

    def slice(self, start: int, stop: int) -> list[int]:
        """Tokens start to stop of prompt and output together."""
        prompt = self.request.prompt
        split = len(prompt)
        return [*prompt[start:stop], *self.tokens[max(start - split, 0) : max(stop - split, 0)]]

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether log-probabilities of the prompt are still to be computed."""
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < len(self.request.prompt) - 1

    @property
    def constrained(self) -> bool:
        """Whether some tokens must not come next."""
        return self.matcher is not None or bool(self.request.sampling.bad_words_ids)

    @property
    def free_steps(self) -> int:
        """How many tokens the device can sample before the host must make another mask; at least 1."""
        if any(len(word) > 1 for word in self.request.sampling.bad_words_ids):
            return 1
        return UNBOUNDED if self.matcher is None else max(self.matcher.free_steps, 1)

    def extend(self, new: list[int]) -> tuple[int, FinishReason | None]:
        """Add tokens up to the first that ends the sequence; returns how many were kept, and why it ends there."""
        kept, reason = len(new), None
        for i, token in enumerate(new):
            if token in self.stop_ids:
                kept, reason, self.stop_reason = i + 1, "stop", token
                break
            if self.stream is not None and self.stream.push(token):
                kept, reason, self.stop_reason = i + 1, "stop", self.stream.matched
                break
        self.tokens += new[:kept]
        if reason is None and len(self.tokens) >= self.limit:
            reason = "length"
        return kept, reason

    def output(self) -> Output:
        """What is new since the last call."""
        stop, text_stop = len(self.tokens), len(self.stream.text) if self.stream is not None else 0
        out = Output(self.id, self.finish_reason, self, self.reported, stop, self.reported_text, text_stop)
        self.reported, self.reported_text = stop, text_stop
        return out

"""Log-probabilities of given tokens under a model: many spans of many lengths in batches of few shapes."""

# B rows, T tokens

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np

from model import Inputs, ModelConfig, apply
from model.logprobs import ScoreOptions, TokenScores

Progress = Callable[[int, int], None]  # (done, all)

_FIRST_LENGTH = 32  # tokens of the shortest bucket


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens of which those from `start` on are scored, each given all before it; the first is never
    scored.
    """

    tokens: Sequence[int]
    start: int = 1


@dataclasses.dataclass(frozen=True)
class Scored:
    """Of each scored token: log p in nats over the whole vocabulary (float32), and whether it is the
    likeliest.
    """

    logprobs: np.ndarray
    greedy: np.ndarray


class Scorer:
    """Runs the pure function on spans. Equal spans get equal numbers, up to rounding, whatever is beside
    them.

    Args:
      cfg, params: the model; it runs where the parameters are.
      vocab_size: of the tokenizer; ids from here on (padding of the embedding) are never "the likeliest".
      context: most tokens that the model sees at once; a span may have one more.
      batch_tokens: most tokens, padding included, of one forward pass; one row is always allowed.
    """

    def __init__(
        self, cfg: ModelConfig, params: Any, vocab_size: int, *, context: int, batch_tokens: int = 8192
    ):
        self.context = context
        self._cfg, self._params, self._vocab_size = cfg, params, vocab_size
        self._budget = batch_tokens  # whatever the vocabulary: large logits are never in memory, see `apply`
        lengths = [_FIRST_LENGTH]
        while lengths[-1] < context:
            lengths.append(lengths[-1] * 2)
        self._lengths = [*[n for n in lengths if n < context], context]

    def score(self, spans: Sequence[Span], progress: Progress | None = None) -> list[Scored]:
        """Score every span, in the order given.

        Raises:
          ValueError: a span that is longer than the context, or whose `start` is not inside it.
        """
        for span in spans:
            self._check(span)
        scored: list[Scored | None] = [None] * len(spans)
        done = 0
        for length, numbers in self._batches(spans):
            tokens_BT, targets_BT, real_BT = self._arrays([spans[i] for i in numbers], length)
            result = _score(self._cfg, self._vocab_size, self._params, tokens_BT, targets_BT, real_BT)
            logprobs_BT, greedy_BT = jax.device_get(result)
            for row, i in enumerate(numbers):
                part = slice(spans[i].start - 1, len(spans[i].tokens) - 1)
                scored[i] = Scored(logprobs_BT[row, part], greedy_BT[row, part])
            done += len(numbers)
            if progress is not None:
                progress(done, len(spans))
        return scored  # type: ignore[return-value]  # every number was in one batch

    def _check(self, span: Span) -> None:
        length = len(span.tokens)
        if length - 1 > self.context:
            raise ValueError(
                f"a span has {length} tokens; the context is {self.context}, so at most one more."
            )
        if not 1 <= span.start < length:
            raise ValueError(f"start={span.start} of a span of {length} tokens; wanted 1 to {length - 1}.")

    def _batches(self, spans: Sequence[Span]) -> Iterator[tuple[int, list[int]]]:
        """(bucket length, numbers of spans), the longest first: the largest batch comes before any other."""
        by_length: dict[int, list[int]] = {length: [] for length in reversed(self._lengths)}
        for i, span in enumerate(spans):
            by_length[next(n for n in self._lengths if n >= len(span.tokens) - 1)].append(i)
        for length, numbers in by_length.items():
            rows = max(1, self._budget // length)
            for first in range(0, len(numbers), rows):
                yield length, numbers[first : first + rows]

    def _arrays(self, spans: Sequence[Span], length: int) -> tuple[np.ndarray, ...]:
        """Inputs, targets and which are real, each [B, length]; B is a power of four or the most there can
        be.
        """
        most, rows = max(1, self._budget // length), 1
        while rows < len(spans):
            rows *= 4
        shape = (min(rows, most), length)
        tokens_BT, targets_BT, real_BT = (np.zeros(shape, np.int32) for _ in range(3))
        for row, span in enumerate(spans):
            ids = np.asarray(span.tokens, np.int32)
            tokens_BT[row, : len(ids) - 1], targets_BT[row, : len(ids) - 1] = ids[:-1], ids[1:]
            real_BT[row, : len(ids) - 1] = 1
        return tokens_BT, targets_BT, real_BT


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cuts of a long sequence in which each of its predictions is scored once, with as much before it as
    fits.

    Args:
      length: tokens of the sequence; predictions are of its tokens 1 to length - 1.
      context: tokens the model sees at once.
      stride: predictions that each window after the first adds, at most `context`; the others are context.

    Yields: (first, start, stop): `Span(sequence[first:stop], start - first)` scores tokens `start` to `stop -
    1`.
    """
    start = 1
    while start < length:
        stop = min(length, context + 1 if start == 1 else start + stride)
        yield max(0, stop - 1 - context), start, stop
        start = stop


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(cfg, vocab_size, params, tokens_BT, targets_BT, real_BT):
    ask = ScoreOptions(likeliest=True, choices=vocab_size)
    inputs = Inputs(tokens_BT, segment_ids=real_BT)
    out = apply(cfg, params, inputs, targets=targets_BT, score_options=ask)
    scores = cast(TokenScores, out.scores)
    return scores.logprobs, scores.likeliest == targets_BT

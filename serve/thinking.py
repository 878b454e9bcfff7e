"""Thoughts at the start of an output: a budget of tokens closes them, and a grammar begins only after them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from data import Tokenizer
from serve.grammar import Matcher
from serve.logits import all_allowed, forbid
from serve.request import Thinking
from serve.sequence import UNBOUNDED

_GAP = 4  # tokens of white space between a thought and what a grammar says


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an output is.

    Attributes:
      opened: tokens of the thought's start that came; `thought`: tokens of the thought; `closed`: tokens of its end
        that the budget has forced; `gap`: tokens of white space after it.
      tail: the last bytes of the thought, in which its end may begin.
      rest: tokens after the thought that the grammar has not been told.
    """

    phase: Literal["start", "thought", "gap", "rest"]
    opened: int = 0
    thought: int = 0
    closed: int = 0
    gap: int = 0
    tail: bytes = b""
    rest: tuple[int, ...] = ()


class Vocabulary:
    """The texts of tokens, and those that are white space alone."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """`vocab_size`: of the model, which may have more tokens than the tokenizer."""
        special = set(tokenizer.special_tokens.values())
        self._texts = [
            tokenizer.token_of(id).encode("utf-8") if id in special else tokenizer.bytes_of(id)
            for id in range(tokenizer.vocab_size)
        ]
        self.size = vocab_size
        self.spaces = frozenset(
            id for id, text in enumerate(self._texts) if text and not text.strip(b" \n\r\t")
        )
        self.spaces_W = _only(self.spaces, vocab_size)

    def bytes_of(self, id: int) -> bytes:
        return self._texts[id]


class ThoughtMatcher:
    """What may come next in an output that may begin with a thought; see `Matcher`.

    The thought ends with the text of its end, in whatever tokens. When the budget is used up, the tokens of the end
    come next, exactly.
    """

    def __init__(
        self,
        thinking: Thinking,
        words: Vocabulary,
        grammar: Matcher | None,
        stop_ids: Sequence[int],
    ):
        self._thinking, self._bytes_of, self._grammar = thinking, words.bytes_of, grammar
        self._stop_ids, self._vocab_size = tuple(stop_ids), words.size
        self._spaces, self._spaces_W = words.spaces, words.spaces_W
        self._end = b"".join(map(words.bytes_of, thinking.end))
        self._place = _Place("start" if thinking.start else "thought")

    def mask(self, after: Sequence[int] = ()) -> np.ndarray:
        """uint32 [W], a bit for each token that may come after the output and `after`."""
        place = self._walked(after)
        if (forced := self._forced(place)) is not None:
            return _only([forced], self._vocab_size)
        if self._grammar is None:
            return all_allowed(vocab_size=self._vocab_size)
        if place.phase == "thought":
            mask_W = all_allowed(vocab_size=self._vocab_size)
            forbid(mask_W, self._stop_ids)  # the grammar has not been met yet
            return mask_W
        if place.phase == "start":
            begun_W = _only([self._thinking.start[place.opened]], self._vocab_size)
            return begun_W if place.opened else begun_W | self._grammar.mask()
        mask_W = self._grammar.mask(place.rest)
        return mask_W | self._spaces_W if place.phase == "gap" and place.gap < _GAP else mask_W

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may follow the output."""
        place = self._place
        for i, token in enumerate(tokens):
            forced = self._forced(place)
            if forced is not None and token != forced:
                return i
            if self._grammar is not None and place.phase == "thought" and token in self._stop_ids:
                return i
            place = self._next(place, token)
            if self._grammar is not None and place.rest:
                return i + self._grammar.valid([*place.rest, *tokens[i + 1 :]])
        return len(tokens)

    def accept(self, tokens: Sequence[int]) -> None:
        """Add tokens to the output."""
        self._place = self._walked(tokens)
        if self._grammar is not None and self._place.rest:
            self._grammar.accept(self._place.rest)
        self._place = dataclasses.replace(self._place, rest=())

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._grammar is None or (self._place.phase != "thought" and self._grammar.complete)

    @property
    def error(self) -> str | None:
        return None if self._grammar is None else self._grammar.error

    @property
    def free_steps(self) -> int:
        """How many of the next tokens may be any, so that the device needs no mask for them."""
        place, budget = self._place, self._thinking.budget
        if self._grammar is not None:
            return 0
        if budget is None or place.phase in ("gap", "rest"):
            return UNBOUNDED
        if place.closed:
            return 0
        return (
            max(len(self._thinking.start) - place.opened, 0) * (place.phase == "start")
            + budget
            - place.thought
        )

    def _walked(self, tokens: Sequence[int]) -> _Place:
        place = self._place
        for token in tokens:
            place = self._next(place, token)
        return place

    def _forced(self, place: _Place) -> int | None:
        """The token that must come, because the budget is used up."""
        budget = self._thinking.budget
        if place.phase != "thought" or budget is None or place.thought < budget:
            return None
        return self._thinking.end[place.closed]

    def _next(self, place: _Place, token: int) -> _Place:
        if place.phase == "start":
            start = self._thinking.start
            if token != start[place.opened]:
                return _Place("rest", rest=(token,))
            opened = place.opened + 1
            return _Place("thought" if opened == len(start) else "start", opened)
        if place.phase == "thought":
            closing = self._forced(place) is not None
            tail = place.tail + self._bytes_of(token)
            closed = place.closed + 1 if closing else 0
            if self._end in tail or closed == len(self._thinking.end):
                return _Place("gap")
            return dataclasses.replace(
                place, thought=place.thought + (not closing), closed=closed, tail=tail[-len(self._end) :]
            )
        if place.phase == "gap" and place.gap < _GAP and token in self._spaces:
            return dataclasses.replace(place, gap=place.gap + 1)
        return dataclasses.replace(place, phase="rest", rest=(*place.rest, token))


def _only(tokens: Sequence[int] | frozenset[int], vocab_size: int) -> np.ndarray:
    """A mask that allows these tokens alone."""
    mask_W = np.zeros_like(all_allowed(vocab_size=vocab_size))
    for token in tokens:
        mask_W[token // 32] |= np.uint32(1 << (token % 32))
    return mask_W

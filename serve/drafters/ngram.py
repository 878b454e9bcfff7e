"""Prompt lookup: the guess is what followed the last tokens where they were before.

Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

_LENGTHS = (5, 3)  # of the n-grams that are looked up, the longest first
_WEIGHT = 0.4  # of the last draft in the running mean of accepted tokens
_LEAST_ACCEPTED = 0.4  # a mean below this pauses the drafts of a sequence
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 128  # tokens


class NgramIndex:
    """The n-grams of one sequence, where each was last seen, and how its drafts fared."""

    def __init__(self, mean_accepted: float = 1.0):
        """`mean_accepted`: what to expect of the first draft, from other sequences."""
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its last occurrence
        self.mean_accepted = mean_accepted  # tokens of a draft, as a running mean
        self._pause, self._resume_at = _FIRST_PAUSE, 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Add the sequence's next tokens."""
        for token in tokens:
            end = len(self._tokens)
            for n in _LENGTHS:
                if n <= end:
                    self._after[tuple(self._tokens[end - n :])] = end
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that followed the longest n-gram at the end; [] when it is new, or drafts pause."""
        tokens = self._tokens
        if len(tokens) < self._resume_at:
            return []
        for n in _LENGTHS:
            start = self._after.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if start is not None:
                guess: list[int] = []
                for place in range(start, start + count):  # a short period goes on in the guess itself
                    guess.append(tokens[place] if place < len(tokens) else guess[place - len(tokens)])
                return guess
        return []

    def record(self, accepted: int) -> None:
        """How many tokens of the last draft were right. Drafts that fail make the next ones wait, longer each time."""
        self.mean_accepted += _WEIGHT * (accepted - self.mean_accepted)
        if self.mean_accepted >= _LEAST_ACCEPTED:
            self._pause = _FIRST_PAUSE
            return
        self._resume_at = len(self._tokens) + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self.mean_accepted = _LEAST_ACCEPTED

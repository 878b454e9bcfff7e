"""Drafts for the rows of a batch, where they pay, and what became of them."""

from __future__ import annotations

from serve.drafters.ngram import NgramIndex
from serve.drafters.payoff import Payoff
from serve.sequence import Sequence

_WEIGHT = 0.05  # of the last draft in the running mean over all sequences
_FIRST_MEAN = 2.0  # accepted tokens: high enough for a first try where a step of several tokens is slow


class Speculation:
    """The drafts of one engine.

    Attributes:
      drafts, tokens: how many were verified, and their tokens.
      accepted_per_position: how often the first, second, ... token of a draft was right.
    """

    def __init__(self, most_tokens: int):
        """`most_tokens` of a draft; 0: none are made."""
        self.payoff = Payoff()
        self.drafts, self.tokens = 0, 0
        self.accepted_per_position = [0] * most_tokens
        self._most_tokens = most_tokens
        self._mean_accepted = _FIRST_MEAN

    def start(self, sequence: Sequence) -> None:
        if self._most_tokens:
            sequence.draft_index = NgramIndex(self._mean_accepted)

    def draft(self, sequences: list[Sequence], rows: int) -> list[list[int]] | None:
        """A draft for each sequence of a batch of `rows`, [] for some; None where plain decoding is faster."""
        if not self._most_tokens:
            return None
        drafts = [self._draft(sequence) for sequence in sequences]
        expected = [
            min(len(draft), sequence.draft_index.mean_accepted) if sequence.draft_index is not None else 0.0
            for sequence, draft in zip(sequences, drafts, strict=True)
        ]
        if any(drafts) and (self.payoff.pays(rows, expected) or self.payoff.tries_again(rows)):
            return drafts
        return None

    def accept(self, sequence: Sequence, draft: list[int], tokens: list[int]) -> int:
        """How many tokens of the draft are those that the model gave in its place."""
        pairs = enumerate(zip(draft, tokens, strict=False))
        accepted = next((j for j, (guess, token) in pairs if guess != token), len(draft))
        if draft and sequence.draft_index is not None:
            self.drafts, self.tokens = self.drafts + 1, self.tokens + len(draft)
            for j in range(accepted):
                self.accepted_per_position[j] += 1
            sequence.draft_index.record(accepted)
            self._mean_accepted += _WEIGHT * (accepted - self._mean_accepted)
        return accepted

    def _draft(self, sequence: Sequence) -> list[int]:
        index = sequence.draft_index
        if index is None:
            return []
        index.extend(sequence.slice(len(index), sequence.length))
        guess = index.propose(min(self._most_tokens, sequence.limit - len(sequence.tokens) - 1))
        ends = (j for j, token in enumerate(guess) if token in sequence.stop_ids)
        guess = guess[: next(ends, len(guess))]
        return guess if sequence.matcher is None else guess[: sequence.matcher.valid(guess)]

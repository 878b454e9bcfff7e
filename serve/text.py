"""Text from tokens as they come, cut at stop strings that may span tokens."""

from __future__ import annotations

from collections.abc import Sequence

from data import StreamDecoder, Tokenizer


class TextStream:
    """The text of one answer. What could still become a stop string is held back until that is decided.

    Attributes:
      text: what is certain so far; it never holds a stop string or a part of one that was met.
      matched: the stop string that was met, or None.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), continuation: bool = False):
        self._decoder = StreamDecoder(tokenizer, continuation=continuation)
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""
        self.matched: str | None = None

    def push(self, token: int) -> bool:
        """Add a token; True when it completes a stop string, after which nothing more may come."""
        return self._add(self._decoder.push(token))

    def finish(self) -> None:
        """No more tokens: give out what was held back."""
        if self.matched is None and not self._add(self._decoder.finish()):
            self.text, self._held = self.text + self._held, ""

    def _add(self, piece: str) -> bool:
        held = self._held + piece
        if self._stop:
            found = [(at, -len(stop), stop) for stop in self._stop if (at := held.find(stop)) >= 0]
            if found:
                at, _, self.matched = min(found)
                self.text, self._held = self.text + held[:at], ""
                return True
        keep = self._undecided(held)
        self.text, self._held = self.text + held[: len(held) - keep], held[len(held) - keep :]
        return False

    def _undecided(self, held: str) -> int:
        """Length of the longest end of `held` with which a stop string begins."""
        longest = min(len(held), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(held[-n:]) for s in self._stop)), 0)

"""What a model's answer is made of, and text that is cut at marks while it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol


@dataclasses.dataclass(frozen=True)
class Piece:
    """New text of one part of an answer.

    Of a tool call `text` is a piece of the arguments (JSON) and `index` counts the calls; the first piece has the name.
    """

    kind: Literal["reasoning", "content", "call"]
    text: str
    index: int = 0
    name: str | None = None


class Parser(Protocol):
    """Reads one answer. However the text is cut, the pieces add up to the same parts."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]:
        """The pieces that were held back; nothing comes after."""
        ...


class PlainParser:
    """All is content."""

    def push(self, text: str) -> list[Piece]:
        return [Piece("content", text)] if text else []

    def finish(self) -> list[Piece]:
        return []


class Feed:
    """Text that has come and is not yet used."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False

    def until(self, marks: Sequence[str]) -> tuple[str, str | None]:
        """Takes the text before the first of the marks, and the mark; (text, None) when none is there yet, without what
        could be the start of one."""
        found = [(at, -len(mark), mark) for mark in marks if (at := self.text.find(mark)) >= 0]
        if found:
            at, _, mark = min(found)
            return self.take(at), self.take(len(mark))
        return self.take(len(self.text) - self._undecided(marks)), None

    def take(self, count: int) -> str:
        taken, self.text = self.text[:count], self.text[count:]
        return taken

    def skip_space(self) -> None:
        self.text = self.text.lstrip()

    def _undecided(self, marks: Sequence[str]) -> int:
        if self.ended:
            return 0
        longest = min(len(self.text), max(map(len, marks)) - 1)
        return next((n for n in range(longest, 0, -1) if any(m.startswith(self.text[-n:]) for m in marks)), 0)


class Trimmed:
    """Text without white space at its start and end, as it comes."""

    def __init__(self) -> None:
        self._started, self._space = False, ""

    def push(self, text: str) -> str:
        text = self._space + text
        if not self._started:
            text = text.lstrip()
        kept = text.rstrip()
        self._started = self._started or bool(kept)
        self._space = text[len(kept) :]
        return kept


class StateParser:
    """A parser as a machine: `_state` uses up what it can of `_feed`, and says whether another step may follow.

    A subclass sets its first state.
    """

    _state: Callable[[], bool]

    def __init__(self) -> None:
        self._feed = Feed()
        self._pieces: list[Piece] = []
        self._calls = -1  # index of the last call

    def push(self, text: str) -> list[Piece]:
        self._feed.text += text
        return self._run()

    def finish(self) -> list[Piece]:
        self._feed.ended = True
        return self._run()

    def _run(self) -> list[Piece]:
        while self._state():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def _add(self, kind: Literal["reasoning", "content"], text: str) -> None:
        if text:
            self._pieces.append(Piece(kind, text))

    def _begin_call(self, name: str) -> None:
        self._calls += 1
        self._pieces.append(Piece("call", "", self._calls, name))

    def _add_arguments(self, text: str) -> None:
        if text:
            self._pieces.append(Piece("call", text, self._calls))

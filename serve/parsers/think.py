"""Answers that begin with a thought between tags: <think>...</think> and its likes."""

from __future__ import annotations

from serve.parsers.pieces import Feed, Parser, Piece, Trimmed

# Tags by what a chat template has of them: (open, close).
TAGS = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))


def tags_of(template: str) -> tuple[str, str] | None:
    """The tags that a template's model thinks between, or None."""
    return next(((start, end) for start, end in reversed(TAGS) if end in template), None)


class ThinkParser:
    """Takes the thought off an answer and gives the rest to another parser.

    `started`: the prompt ends within a thought, so the answer begins with one. Otherwise a thought must come first.
    """

    def __init__(self, tags: tuple[str, str], started: bool, rest: Parser):
        self._open, self._close = tags
        self._rest, self._feed, self._thought = rest, Feed(), Trimmed()
        self._where = "thought" if started else "start"

    def push(self, text: str) -> list[Piece]:
        if self._where == "rest":
            return self._rest.push(text)
        self._feed.text += text
        pieces: list[Piece] = []
        if self._where == "start":
            self._begin()
        if self._where == "thought":
            inside, mark = self._feed.until([self._close])
            if inside := self._thought.push(inside):
                pieces.append(Piece("reasoning", inside))
            self._where = "gap" if mark else "thought"
        if self._where == "gap":
            self._feed.skip_space()
            self._where = "rest" if self._feed.text else "gap"
        if self._where == "rest":
            pieces += self._rest.push(self._feed.take(len(self._feed.text)))
        return pieces

    def finish(self) -> list[Piece]:
        self._feed.ended = True
        return self.push("") + self._rest.finish()

    def _begin(self) -> None:
        begins = self._feed.text.lstrip()
        if begins.startswith(self._open):
            self._feed.text = begins[len(self._open) :]
            self._where = "thought"
        elif self._feed.ended or not self._open.startswith(begins):
            self._where = "rest"

"""Tool calls of Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

from serve.parsers.json_calls import CallScanner
from serve.parsers.pieces import StateParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(StateParser):
    """Content, then calls. What is between the tags and no call is content as it stands."""

    def __init__(self) -> None:
        super().__init__()
        self._state = self._content
        self._space = ""  # at the end of content; no part of it when a call follows
        self._scanner, self._read = CallScanner(), ""

    def _content(self) -> bool:
        text, mark = self._feed.until([OPEN])
        text = self._space + text
        kept = text.rstrip()
        if self._feed.ended and mark is None and (kept or self._calls < 0):
            kept = text
        self._space = text[len(kept) :]
        self._add("content", kept)
        if mark is not None:
            self._next_call()
        return mark is not None

    def _next_call(self) -> None:
        self._scanner, self._read = CallScanner(), ""
        self._state = self._call

    def _call(self) -> bool:
        unknown = self._scanner.name is None
        used, arguments = self._scanner.push(self._feed.text)
        self._read += self._feed.take(used)
        if unknown and self._scanner.name is not None:
            self._begin_call(self._scanner.name)
        self._add_arguments(arguments)
        if self._scanner.done:
            self._state = self._after
            return True
        if not (self._scanner.failed or self._feed.ended):
            return False
        if self._scanner.name is None:
            self._add("content", self._space + OPEN + self._read)
        self._space, self._state = "", self._content
        return bool(self._feed.text)

    def _after(self) -> bool:
        _, mark = self._feed.until([CLOSE, OPEN])
        self._space = ""
        if mark == OPEN:
            self._next_call()
        elif mark == CLOSE:
            self._state = self._content
        return mark is not None

"""Tool calls of DeepSeek: V3 and R1 write a name and a block of JSON, V3.1 a name and JSON."""

from __future__ import annotations

from serve.parsers.json_calls import ValueScanner
from serve.parsers.pieces import StateParser

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


class DeepseekParser(StateParser):
    """Content, then calls.

    V3: function<SEPARATOR>NAME\\n```json\\n{...}\\n```; V3.1: NAME<SEPARATOR>{...}.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state = self._content
        self._space, self._head = "", ""
        self._value = ValueScanner()

    def _content(self) -> bool:
        text, mark = self._feed.until([CALLS, CALL])
        text = self._space + text
        kept = text if self._feed.ended and mark is None and self._calls < 0 else text.rstrip()
        self._space = text[len(kept) :]
        self._add("content", kept)
        if mark is not None:
            self._space, self._state = "", self._kind if mark == CALL else self._between
        return mark is not None

    def _between(self) -> bool:
        _, mark = self._feed.until([CALL, CALLS_END])
        if mark is not None:
            self._state = self._kind if mark == CALL else self._content
        return mark is not None

    def _kind(self) -> bool:
        text, mark = self._feed.until([SEPARATOR])
        self._head += text
        if mark is not None:
            self._state = self._name
        return mark is not None

    def _name(self) -> bool:
        self._feed.skip_space()
        if not self._feed.text:
            return False
        if self._feed.text[0] == "{":
            name = self._head
        else:
            if "{" not in self._feed.text:
                return False
            name = self._feed.take(self._feed.text.index("{")).split("```")[0]
        self._begin_call(name.strip())
        self._head, self._value, self._state = "", ValueScanner(), self._arguments
        return True

    def _arguments(self) -> bool:
        used = self._value.push(self._feed.text)
        self._add_arguments(self._feed.take(used))
        if self._value.done:
            self._state = self._between
        return self._value.done

"""Tool calls of Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or newer [TOOL_CALLS]name[ARGS]{...}."""

from __future__ import annotations

from serve.parsers.json_calls import CallScanner, ValueScanner
from serve.parsers.pieces import StateParser

MARK, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class MistralParser(StateParser):
    """Content, then calls."""

    def __init__(self) -> None:
        super().__init__()
        self._state = self._content
        self._space = ""
        self._scanner, self._value, self._name = CallScanner(), ValueScanner(), ""

    def _content(self) -> bool:
        text, mark = self._feed.until([MARK])
        text = self._space + text
        kept = text if self._feed.ended and mark is None and self._calls < 0 else text.rstrip()
        self._space = text[len(kept) :]
        self._add("content", kept)
        if mark is not None:
            self._space, self._state = "", self._form
        return mark is not None

    def _form(self) -> bool:
        self._feed.skip_space()
        if not self._feed.text:
            return False
        self._state = self._list if self._feed.text[0] == "[" else self._named
        if self._state == self._list:
            self._feed.take(1)
        return True

    def _list(self) -> bool:
        """Between the objects of a list."""
        self._feed.text = self._feed.text.lstrip(" \t\r\n,")
        if not self._feed.text:
            return False
        if self._feed.text[0] == "{":
            self._scanner, self._state = CallScanner(), self._object
        else:
            self._feed.take(int(self._feed.text[0] == "]"))
            self._state = self._content
        return True

    def _object(self) -> bool:
        unknown = self._scanner.name is None
        used, arguments = self._scanner.push(self._feed.text)
        self._feed.take(used)
        if unknown and self._scanner.name is not None:
            self._begin_call(self._scanner.name)
        self._add_arguments(arguments)
        if self._scanner.done:
            self._state = self._list
        elif self._scanner.failed:
            self._state = self._content
        return self._scanner.done or self._scanner.failed

    def _named(self) -> bool:
        text, mark = self._feed.until([CALL_ID, ARGS, "{"])
        self._name += text
        if mark is None:
            return False
        self._begin_call(self._name.strip())
        self._name, self._value = "", ValueScanner()
        if mark == "{":
            self._feed.text = "{" + self._feed.text
        self._state = self._id if mark == CALL_ID else self._arguments
        return True

    def _id(self) -> bool:
        """The model's own id of the call, which clients don't get."""
        _, mark = self._feed.until([ARGS])
        self._state = self._arguments if mark else self._id
        return mark is not None

    def _arguments(self) -> bool:
        used = self._value.push(self._feed.text)
        self._add_arguments(self._feed.take(used))
        if self._value.done:
            self._state = self._content
        return self._value.done

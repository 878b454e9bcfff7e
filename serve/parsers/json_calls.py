"""JSON of tool calls, read as it comes: an object with a name and arguments, or the arguments alone."""

from __future__ import annotations

import json

_SPACE = " \t\n\r"
_ARGUMENTS = ("arguments", "parameters")


class ValueScanner:
    """Finds where one JSON object or list ends."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False
        self.done = False

    def push(self, text: str) -> int:
        """How many characters of `text` belong to the value."""
        for i, c in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._in_string = False
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.done = True
                    return i + 1
        return len(text)


class CallScanner:
    """One object `{"name": ..., "arguments": {...}}`; the arguments come out as they come in, once the name is known.

    Attributes:
      name: None until it is known.
      failed: what came is no such object.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = self.failed = False
        self._where = "start"
        self._key = self._raw = ""
        self._scalar = ""
        self._value: ValueScanner | None = None
        self._in_string = self._escaped = False
        self._arguments: str | None = None

    def push(self, text: str) -> tuple[int, str]:
        """(characters used, new text of the arguments)."""
        i = 0
        while i < len(text) and not (self.done or self.failed):
            i += self._step(text, i)
        if self.name is None:
            return i, ""
        new, self._arguments = self._arguments or "", "" if self._arguments is not None else None
        if self.done and self._arguments is None:
            self._arguments, new = "", "{}"
        return i, new

    def _step(self, text: str, i: int) -> int:
        c = text[i]
        if self._where == "value":
            return self._value_step(text, i)
        if self._where == "key":
            return self._key_step(c)
        if c in _SPACE:
            return 1
        follows = {
            ("start", "{"): "first",
            ("first", '"'): "key",
            ("comma", '"'): "key",
            ("colon", ":"): "value",
        }
        follows |= {("after", ","): "comma", ("after", "}"): "end", ("first", "}"): "end"}
        where = follows.get((self._where, c))
        if where is None:
            self.failed = True
            return 0
        self._where, self._raw = where, c if where == "key" else ""
        if where == "end":
            self.done = self.name is not None
            self.failed = self.name is None
        return 1

    def _key_step(self, c: str) -> int:
        self._raw += c
        if self._escaped:
            self._escaped = False
        elif c == "\\":
            self._escaped = True
        elif c == '"':
            self._key, self._where, self._raw = _loaded(self._raw), "colon", ""
        return 1

    def _value_step(self, text: str, i: int) -> int:
        c = text[i]
        if self._value is not None:
            used = self._value.push(text[i:])
            self._take(text[i : i + used])
            if self._value.done:
                self._value, self._where = None, "after"
            return used
        if self._in_string:
            self._raw += c
            if self._escaped:
                self._escaped = False
            elif c == "\\":
                self._escaped = True
            elif c == '"':
                self._in_string = False
                self._end_of_string()
            return 1
        if self._raw == "" and c in _SPACE:
            return 1
        if self._raw == "" and c in "{[":
            self._value = ValueScanner()
            return 0
        if self._raw == "" and c == '"':
            self._raw, self._in_string = c, True
            return 1
        if c in ",}" or c in _SPACE:
            self._where, self._raw = "after", ""
            return 0
        self._raw += c
        self.failed = self.failed or not (c.isalnum() or c in "+-.")
        return 1

    def _take(self, piece: str) -> None:
        if self._key in _ARGUMENTS:
            self._arguments = (self._arguments or "") + piece

    def _end_of_string(self) -> None:
        text, self._where, self._raw = _loaded(self._raw), "after", ""
        if self._key == "name":
            self.name = text
        elif self._key in _ARGUMENTS:  # some models write the object as a string
            self._arguments = text


def _loaded(raw: str) -> str:
    try:
        return json.loads(raw, strict=False)
    except ValueError:
        return raw.strip('"')

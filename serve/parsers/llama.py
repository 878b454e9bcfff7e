"""Tool calls of Llama 3: the answer is {"name": ..., "parameters": {...}}, more of them after ";"."""

from __future__ import annotations

from collections.abc import Collection

from serve.parsers.json_calls import CallScanner
from serve.parsers.pieces import StateParser

PYTHON_TAG = "<|python_tag|>"


class LlamaParser(StateParser):
    """An answer that begins with an object that names one of `names` is calls; any other is content.

    Without those names every answer in JSON would look like a call.
    """

    def __init__(self, names: Collection[str]):
        super().__init__()
        self._names = names
        self._scanner, self._read = CallScanner(), ""
        self._begun = False  # the call under way is told: its name and the start of its arguments are there
        self._state = self._start

    def _start(self) -> bool:
        begins = self._feed.text.lstrip()
        if begins.startswith(PYTHON_TAG):
            self._feed.text, self._state = begins[len(PYTHON_TAG) :].lstrip(), self._call
        elif begins.startswith("{"):
            self._read = self._feed.take(len(self._feed.text) - len(begins))
            self._state = self._call
        elif begins and not PYTHON_TAG.startswith(begins) or self._feed.ended:
            self._state = self._content
        else:
            return False
        return True

    def _content(self) -> bool:
        self._add("content", self._feed.take(len(self._feed.text)))
        return False

    def _call(self) -> bool:
        used, arguments = self._scanner.push(self._feed.text)
        self._read += self._feed.take(used)
        name = self._scanner.name
        if not self._begun and name in self._names and (arguments or self._scanner.done):
            self._begun = True
            self._begin_call(name or "")
        if self._begun:
            self._add_arguments(arguments)
        foreign = name is not None and name not in self._names
        if foreign or self._scanner.failed or (self._feed.ended and not self._scanner.done):
            if not self._begun:
                self._add("content", self._read)
            self._state = self._content
            return True
        if self._scanner.done:
            self._state = self._between
        return self._scanner.done

    def _between(self) -> bool:
        begins = self._feed.text.lstrip(" \t\r\n;")
        if begins.startswith("{"):
            gap = len(self._feed.text) - len(begins)
            self._scanner, self._read, self._state = CallScanner(), self._feed.take(gap), self._call
            self._begun = False
        elif begins:
            self._state = self._content
        return bool(begins)

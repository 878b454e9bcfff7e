"""Answers in OpenAI's harmony format (gpt-oss): messages on channels.

analysis is reasoning, final is content, commentary with a recipient is a tool call and without one content.
"""

from __future__ import annotations

import re

from serve.parsers.pieces import StateParser, Trimmed

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKS = (START, CHANNEL, MESSAGE, END, CALL, RETURN, "<|constrain|>")


class HarmonyParser(StateParser):
    """`header`: what the prompt has already of the first message's header, after its last "<|start|>"."""

    def __init__(self, header: str = "assistant"):
        super().__init__()
        self._header, self._state = header, self._in_header
        self._kind, self._trimmed = "content", Trimmed()
        self._thoughts = 0
        if MESSAGE in header:
            self._header = header.split(MESSAGE)[0]
            self._open()

    def _in_header(self) -> bool:
        text, mark = self._feed.until([MESSAGE, START])
        self._header += text
        if mark == START:
            self._header = ""
        elif mark == MESSAGE:
            self._open()
        elif self._feed.ended and CHANNEL not in self._header and self._calls < 0 and not self._thoughts:
            self._add("content", self._header.removeprefix("assistant"))  # a model that knows no channels
        return mark is not None

    def _open(self) -> None:
        header = self._header
        recipient = re.search(r"to=(?:functions\.)?([^\s<]+)", header)
        channel = re.search(r"<\|channel\|>\s*(\w+)", header)
        if recipient:
            self._kind = "call"
            self._begin_call(recipient[1])
        elif channel and channel[1] == "analysis":
            self._kind, self._trimmed = "reasoning", Trimmed()
            self._add("reasoning", "\n\n" if self._thoughts else "")
            self._thoughts += 1
        else:
            self._kind = "content"
        self._header, self._state = "", self._body

    def _body(self) -> bool:
        text, mark = self._feed.until([END, CALL, RETURN, START])
        if self._kind == "call":
            self._add_arguments(text)
        elif self._kind == "reasoning":
            self._add("reasoning", self._trimmed.push(text))
        else:
            self._add("content", text)
        if mark is not None:
            self._state, self._header = self._in_header, ""
        return mark is not None

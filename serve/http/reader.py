"""From a choice's tokens to the parts of its answer: reasoning, content and tool calls."""

from __future__ import annotations

import dataclasses
import secrets
import string
from typing import Any

from data import StreamDecoder, Tokenizer
from serve.parsers import AnswerForm, Piece
from serve.request import Output, Request
from serve.text import TextStream

_LETTERS = string.ascii_letters + string.digits


class _MarkDecoder:
    """Text of tokens in which some special tokens are spelled; all others are left out, as in `Output.text`."""

    def __init__(self, tokenizer: Tokenizer, marks: dict[int, str], continuation: bool):
        self._inner, self._marks = StreamDecoder(tokenizer, continuation=continuation), marks

    def push(self, token: int) -> str:
        return self._marks[token] if token in self._marks else self._inner.push(token)

    def finish(self) -> str:
        return self._inner.finish()


class _MarkedText(TextStream):
    def __init__(self, tokenizer: Tokenizer, request: Request, marks: dict[int, str]):
        super().__init__(tokenizer, request.sampling.stop, request.continuation)
        self._decoder = _MarkDecoder(tokenizer, marks, request.continuation)


@dataclasses.dataclass
class Call:
    """A tool call so far."""

    id: str
    name: str
    arguments: str = ""

    def body(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class Reader:
    """Reads the outputs of one choice as they come, and keeps what it has read."""

    def __init__(
        self,
        form: AnswerForm,
        tokenizer: Tokenizer,
        request: Request,
        prompt_end: str,
        tools: tuple[str, ...],
    ):
        """`prompt_end`: the last text of the prompt, with its special tokens."""
        marks = {
            tokenizer.special_tokens[mark]: mark for mark in form.marks if mark in tokenizer.special_tokens
        }
        self._text = _MarkedText(tokenizer, request, marks)
        self._parser = form.parser(prompt_end, tools)
        self._short_ids = form.calls == "mistral"  # its templates refuse others
        self._read = self._shown = 0
        self.reasoning = self.content = ""
        self.calls: list[Call] = []

    def push(self, out: Output) -> list[Piece]:
        """The new pieces of an output; the last one has all that was held back."""
        stop = out.num_tokens - (out.finished and isinstance(out.stop_reason, int))
        for token in out.tokens[self._read : stop]:
            self._text.push(token)
        self._read = out.num_tokens
        if out.finished:
            self._text.finish()
        pieces = self._parser.push(self._text.text[self._shown :])
        self._shown = len(self._text.text)
        if out.finished:
            pieces += self._parser.finish()
        for piece in pieces:
            self._keep(piece)
        return pieces

    def finish_reason(self, out: Output) -> str | None:
        return "tool_calls" if self.calls and out.finish_reason == "stop" else out.finish_reason

    def _keep(self, piece: Piece) -> None:
        if piece.kind == "reasoning":
            self.reasoning += piece.text
        elif piece.kind == "content":
            self.content += piece.text
        elif piece.name is not None:
            self.calls.append(Call(self._new_id(), piece.name, piece.text))
        else:
            self.calls[piece.index].arguments += piece.text

    def _new_id(self) -> str:
        if self._short_ids:
            return "".join(secrets.choice(_LETTERS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

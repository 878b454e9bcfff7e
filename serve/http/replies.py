"""What the OpenAI API gives back: whole answers and the chunks of a stream, for both endpoints."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from data import Tokenizer
from serve.request import Output


class Reply:
    """The fields that all parts of one HTTP answer share, and the counts of its usage."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str, tokenizer: Tokenizer, prompt_tokens: int, logprobs: bool):
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._model, self._tokenizer, self._logprobs = model, tokenizer, logprobs
        self._created = int(time.time())
        self._prompt_tokens = prompt_tokens
        self._completion_tokens: dict[int, int] = {}
        self._text_offset: dict[int, int] = {}

    def whole(self, outputs: list[Output]) -> dict[str, Any]:
        """The answer in one piece; `outputs` are the last ones of each choice."""
        choices = [self._whole_choice(i, out) for i, out in enumerate(outputs)]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says before the first token of a choice."""
        return None

    def chunk(self, index: int, out: Output) -> dict[str, Any] | None:
        """The chunk of one choice, or None when there is nothing to show yet."""
        self._completion_tokens[index] = out.num_tokens
        if not (out.new_text or out.finished or (self._logprobs and out.new_tokens)):
            return None
        start = out.num_tokens - len(out.new_tokens)
        choice = self._chunk_choice(index, out, self._places(out, start) if self._logprobs else None)
        return {**self._head(self.chunk_kind), "choices": [choice]}

    def last(self) -> dict[str, Any]:
        """The chunk with the usage, after all choices."""
        return {**self._head(self.chunk_kind), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        new = sum(self._completion_tokens.values())
        counts = {"prompt_tokens": self._prompt_tokens, "completion_tokens": new}
        return {**counts, "total_tokens": self._prompt_tokens + new}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _whole_choice(self, index: int, out: Output) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk_choice(self, index: int, out: Output, places: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _places(self, out: Output, start: int) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """(token, log-probability, alternatives) from `start` on; a stop token is no part of the answer."""
        stop = len(out.tokens) - isinstance(out.stop_reason, int)
        alternatives = out.top_logprobs or [[]] * len(out.tokens)
        return list(zip(out.tokens, out.model_logprobs, alternatives, strict=True))[start:stop]

    def _spelling(self, token: int) -> str:
        return self._bytes(token).decode("utf-8", "replace")

    def _bytes(self, token: int) -> bytes:
        return self._tokenizer.bytes_of(token) or self._tokenizer.token_of(token).encode("utf-8")


class ChatReply(Reply):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return {**self._head(self.chunk_kind), "choices": [{**choice, "logprobs": None}]}

    def _whole_choice(self, index: int, out: Output) -> dict[str, Any]:
        self._completion_tokens[index] = out.num_tokens
        places = self._places(out, 0) if self._logprobs else None
        return {
            "index": index,
            "message": {"role": "assistant", "content": out.text, "refusal": None},
            "logprobs": self._content(places),
            "finish_reason": out.finish_reason,
        }

    def _chunk_choice(self, index: int, out: Output, places: Any) -> dict[str, Any]:
        delta = {"content": out.new_text} if out.new_text else {}
        logprobs = self._content(places)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": out.finish_reason}

    def _content(self, places: Any) -> dict[str, Any] | None:
        if places is None:
            return None
        content = [
            self._token(token, value) | {"top_logprobs": [self._token(*other) for other in others]}
            for token, value, others in places
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self._spelling(token), "logprob": value, "bytes": list(self._bytes(token))}


class CompletionReply(Reply):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _whole_choice(self, index: int, out: Output) -> dict[str, Any]:
        self._completion_tokens[index] = out.num_tokens
        places = self._places(out, 0) if self._logprobs else None
        return self._choice(index, out.text, places, out.finish_reason)

    def _chunk_choice(self, index: int, out: Output, places: Any) -> dict[str, Any]:
        return self._choice(index, out.new_text, places, out.finish_reason)

    def _choice(self, index: int, text: str, places: Any, reason: str | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._columns(index, places),
            "finish_reason": reason,
        }

    def _columns(self, index: int, places: Any) -> dict[str, Any] | None:
        if places is None:
            return None
        tokens, offsets = [self._spelling(token) for token, _, _ in places], []
        for token in tokens:
            offsets.append(self._text_offset.get(index, 0))
            self._text_offset[index] = offsets[-1] + len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [value for _, value, _ in places],
            "top_logprobs": [
                {self._spelling(t): v for t, v in [*others, (token, value)]}
                for token, value, others in places
            ],
            "text_offset": offsets,
        }


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


DONE = b"data: [DONE]\n\n"

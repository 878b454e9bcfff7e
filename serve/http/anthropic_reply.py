"""What Anthropic's Messages API gives back: a message of content blocks, or the events of a stream of them."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator
from typing import Any

from serve.http.api import StreamOptions
from serve.http.errors import ApiError
from serve.http.loop import EngineFailed, Ticket
from serve.http.reader import Reader
from serve.parsers import Piece
from serve.request import Output

_PING_SECONDS = 10.0  # between events of a stream that has nothing to say


class MessageReply:
    """One answer, whole or as events."""

    def __init__(
        self, model: str, prompt_tokens: int, reader: Reader, show_thinking: bool, context_ends: bool
    ):
        """`context_ends`: the context has less room than the tokens that were asked for."""
        self.id = f"msg_{secrets.token_hex(12)}"
        self._model, self._prompt_tokens, self._reader = model, prompt_tokens, reader
        self._show_thinking, self._context_ends = show_thinking, context_ends
        self._blocks: list[dict[str, Any]] = []
        self._place: tuple[str, int] | None = None  # kind of the open block, and which call it is

    def whole(self, outputs: list[Output]) -> dict[str, Any]:
        [out] = outputs
        for _ in self._events(self._reader.push(out)):
            pass
        content = [_finished(block) for block in self._blocks]
        return self._message(content, self._usage(out)) | self._stop(out)

    async def stream(self, tickets: list[Ticket], options: StreamOptions | None) -> AsyncGenerator[bytes]:
        [ticket] = tickets
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        yield _event("message_start", message=self._message([], usage))
        yield _event("ping")
        waiting = asyncio.ensure_future(ticket.next())
        try:
            while True:
                if not (await asyncio.wait({waiting}, timeout=_PING_SECONDS))[0]:
                    yield _event("ping")
                    continue
                out = waiting.result()
                for each in self._events(self._reader.push(out)):
                    yield each
                if out.finished:
                    break
                waiting = asyncio.ensure_future(ticket.next())
            if self._blocks:
                yield _event("content_block_stop", index=len(self._blocks) - 1)
            yield _event("message_delta", delta=self._stop(out), usage=self._usage(out))
            yield _event("message_stop")
        except EngineFailed as error:
            yield self.cut_off(ApiError(error.status, str(error)))
        finally:
            waiting.cancel()

    def cut_off(self, error: ApiError) -> bytes:
        """The last event of a stream that ends with an error."""
        return _event("error", error=error.anthropic_body()["error"])

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self._model}
        return {**head, "content": content, "stop_reason": None, "stop_sequence": None, "usage": usage}

    def _events(self, pieces: list[Piece]) -> list[bytes]:
        """Adds the pieces to the blocks; the events that say so."""
        events = []
        for piece in pieces:
            if piece.kind == "reasoning" and not self._show_thinking or not (piece.text or piece.name):
                continue
            place = (piece.kind, piece.index)
            if place != self._place:
                if self._blocks:
                    events.append(_event("content_block_stop", index=len(self._blocks) - 1))
                self._place = place
                self._blocks.append(self._new_block(piece))
                start = dict(self._blocks[-1]) | ({"input": {}} if piece.kind == "call" else {})
                events.append(_event("content_block_start", index=len(self._blocks) - 1, content_block=start))
            if piece.text:
                kind, field, key = _DELTAS[piece.kind]
                self._blocks[-1][key] += piece.text
                delta = {"type": kind, field: piece.text}
                events.append(_event("content_block_delta", index=len(self._blocks) - 1, delta=delta))
        return events

    def _new_block(self, piece: Piece) -> dict[str, Any]:
        if piece.kind == "content":
            return {"type": "text", "text": ""}
        if piece.kind == "reasoning":
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "tool_use", "id": self._reader.calls[piece.index].id, "name": piece.name, "input": ""}

    def _stop(self, out: Output) -> dict[str, Any]:
        if isinstance(out.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": out.stop_reason}
        reason = "tool_use" if self._reader.calls else "end_turn"
        if out.finish_reason == "length":
            reason = "model_context_window_exceeded" if self._context_ends else "max_tokens"
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self, out: Output) -> dict[str, Any]:
        """Tokens of the prompt that were cached do not count among `input_tokens`."""
        counts = {"input_tokens": self._prompt_tokens - out.cached_tokens, "output_tokens": out.num_tokens}
        return {**counts, "cache_creation_input_tokens": 0, "cache_read_input_tokens": out.cached_tokens}


# By kind of piece: the type of a delta, its field, and the field of the block that it adds to.
_DELTAS = {
    "content": ("text_delta", "text", "text"),
    "reasoning": ("thinking_delta", "thinking", "thinking"),
    "call": ("input_json_delta", "partial_json", "input"),
}


def _finished(block: dict[str, Any]) -> dict[str, Any]:
    """A block as a whole answer has it: the arguments of a call are an object.

    What is none, as where an answer was cut off, is passed on under the key that Anthropic's documentation of
    fine-grained tool streaming gives it.
    """
    if block["type"] != "tool_use":
        return block
    try:
        value = json.loads(block["input"] or "{}")
    except (ValueError, RecursionError):
        value = None
    return block | {"input": value if isinstance(value, dict) else {"INVALID_JSON": block["input"]}}


def _event(kind: str, **fields: Any) -> bytes:
    text = json.dumps({"type": kind, **fields}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {text}\n\n".encode()

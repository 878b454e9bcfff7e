"""What the OpenAI API gives back: whole answers and the chunks of a stream, for both endpoints."""

from __future__ import annotations

import abc
import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from data import StreamDecoder, Tokenizer
from serve.http.api import StreamOptions
from serve.http.errors import ApiError
from serve.http.loop import EngineFailed, Ticket
from serve.http.reader import Reader
from serve.parsers import Piece
from serve.request import Output


class Reply(abc.ABC):
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
        self._cached_tokens: dict[int, int] = {}

    def whole(self, outputs: list[Output]) -> dict[str, Any]:
        """The answer in one piece; `outputs` are the last ones of each choice."""
        choices = []
        for i, out in enumerate(outputs):
            self._count(i, out)
            choices.append(self._whole_choice(i, out))
        return {**self._head(self.kind), "choices": choices, "usage": self.usage()}

    async def stream(self, tickets: list[Ticket], options: StreamOptions | None) -> AsyncGenerator[bytes]:
        """Server-sent events of all choices, as their outputs come in."""
        usage = bool(options and options.include_usage)
        continuous = bool(options and options.continuous_usage_stats)
        counts = {"usage": None} if usage and not continuous else {}
        waiting = {asyncio.ensure_future(ticket.next()): i for i, ticket in enumerate(tickets)}
        try:
            for i in range(len(tickets)):
                if (opening := self.opening(i)) is not None:
                    yield event(opening | counts)
            while waiting:
                ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for future in ready:
                    i, out = waiting.pop(future), future.result()
                    for chunk in self.chunks(i, out):
                        yield event(chunk | ({"usage": self.usage()} if continuous else counts))
                    if not out.finished:
                        waiting[asyncio.ensure_future(tickets[i].next())] = i
            if usage:
                yield event(self.last())
        except EngineFailed as error:
            yield event(ApiError(error.status, str(error)).body())
        finally:
            for future in waiting:
                future.cancel()
        yield DONE

    def cut_off(self, error: ApiError) -> bytes:
        """The last events of a stream that ends with an error."""
        return event(error.body()) + DONE

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says before the first token of a choice."""
        return None

    def chunks(self, index: int, out: Output) -> list[dict[str, Any]]:
        """The chunks of one choice; none when there is nothing to show yet."""
        self._count(index, out)
        start = out.num_tokens - len(out.new_tokens)
        places = self._places(out, start) if self._logprobs else None
        choices = self._chunk_choices(index, out, places)
        return [{**self._head(self.chunk_kind), "choices": [choice]} for choice in choices]

    def last(self) -> dict[str, Any]:
        """The chunk with the usage, after all choices."""
        return {**self._head(self.chunk_kind), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        new = sum(self._completion_tokens.values())
        counts = {"prompt_tokens": self._prompt_tokens, "completion_tokens": new}
        cached = {"prompt_tokens_details": {"cached_tokens": max(self._cached_tokens.values(), default=0)}}
        return {**counts, "total_tokens": self._prompt_tokens + new, **cached}

    def _count(self, index: int, out: Output) -> None:
        self._completion_tokens[index] = out.num_tokens
        self._cached_tokens[index] = out.cached_tokens

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    @abc.abstractmethod
    def _whole_choice(self, index: int, out: Output) -> dict[str, Any]:
        """A finished choice."""

    @abc.abstractmethod
    def _chunk_choices(self, index: int, out: Output, places: Any) -> list[dict[str, Any]]:
        """What is new of a choice."""

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

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        prompt_tokens: int,
        logprobs: bool,
        new_reader: Callable[[], Reader],
        show_reasoning: bool = True,
    ):
        super().__init__(model, tokenizer, prompt_tokens, logprobs)
        self._new_reader, self._show_reasoning = new_reader, show_reasoning
        self._readers: dict[int, Reader] = {}

    def reader(self, index: int) -> Reader:
        if index not in self._readers:
            self._readers[index] = self._new_reader()
        return self._readers[index]

    def opening(self, index: int) -> dict[str, Any]:
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return {**self._head(self.chunk_kind), "choices": [{**choice, "logprobs": None}]}

    def _whole_choice(self, index: int, out: Output) -> dict[str, Any]:
        reader = self.reader(index)
        reader.push(out)
        content = reader.content or (None if reader.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reader.reasoning and self._show_reasoning:
            message["reasoning_content"] = reader.reasoning
        if reader.calls:
            message["tool_calls"] = [call.body() for call in reader.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._content(self._places(out, 0) if self._logprobs else None),
            "finish_reason": reader.finish_reason(out),
        }

    def _chunk_choices(self, index: int, out: Output, places: Any) -> list[dict[str, Any]]:
        reader = self.reader(index)
        pieces = reader.push(out)
        deltas = [delta for piece in pieces if (delta := self._delta(reader, piece))]
        if not deltas and (out.finished or places):
            deltas = [{}]
        choices = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if choices:
            choices[0]["logprobs"] = self._content(places)
            choices[-1]["finish_reason"] = reader.finish_reason(out)
        return choices

    def _delta(self, reader: Reader, piece: Piece) -> dict[str, Any]:
        if piece.kind == "content":
            return {"content": piece.text}
        if piece.kind == "reasoning":
            return {"reasoning_content": piece.text} if self._show_reasoning else {}
        call: dict[str, Any] = {"index": piece.index, "function": {"arguments": piece.text}}
        if piece.name is not None:
            call |= {"id": reader.calls[piece.index].id, "type": "function"}
            call["function"] = {"name": piece.name, "arguments": piece.text}
        return {"tool_calls": [call]}

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

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        logprobs: bool,
        echo: bool = False,
        n: int = 1,
    ):
        super().__init__(model, tokenizer, sum(map(len, prompts)), logprobs)
        self._prompts, self._n, self._echo = prompts, n, echo
        self._offsets: dict[int, Offsets] = {}

    def _whole_choice(self, index: int, out: Output) -> dict[str, Any]:
        places: list[Any] | None = self._places(out, 0) if self._logprobs else None
        text = out.text
        if self._echo:
            prompt = self._prompts[index // self._n]
            text = self._tokenizer.decode(prompt) + text
            if places is not None:
                places = self._prompt_places(prompt, out) + places
        return self._choice(index, text, places, out.finish_reason)

    def _chunk_choices(self, index: int, out: Output, places: Any) -> list[dict[str, Any]]:
        shown = out.new_text or out.finished or places
        return [self._choice(index, out.new_text, places, out.finish_reason)] if shown else []

    def _prompt_places(self, prompt: list[int], out: Output) -> list[Any]:
        """As `_places`, for the prompt; nothing comes before its first token."""
        alternatives = out.prompt_top_logprobs or [[]] * len(out.prompt_logprobs)
        after = zip(prompt[1:], out.prompt_logprobs, alternatives, strict=True)
        return [(prompt[0], None, None), *after]

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
        if index not in self._offsets:
            echoed = len(self._prompts[index // self._n]) if self._echo else 0
            self._offsets[index] = Offsets(self._tokenizer, echoed)
        offsets = self._offsets[index]
        return {
            "tokens": [self._name(token) for token, _, _ in places],
            "token_logprobs": [value for _, value, _ in places],
            "top_logprobs": [
                None if others is None else {self._name(t): v for t, v in [*others, (token, value)]}
                for token, value, others in places
            ],
            "text_offset": [offsets.of(token) for token, _, _ in places],
        }

    def _name(self, token: int) -> str:
        """The token's text; its bytes, as OpenAI spells them, where they are no whole characters: names must differ."""
        piece = self._bytes(token)
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class Offsets:
    """Where in a text each token begins; of one that goes on with a character of the tokens before, where that does.

    The first `echoed` tokens are the prompt. The answer's text begins after the prompt's, even within a character.
    """

    def __init__(self, tokenizer: Tokenizer, echoed: int):
        self._tokenizer, self._echoed = tokenizer, echoed
        self._decoder = StreamDecoder(tokenizer, continuation=echoed == 0)
        self._length = 0

    def of(self, token: int) -> int:
        start = self._length + self._decoder.start_of(token)
        self._length += len(self._decoder.push(token))
        self._echoed -= 1
        if self._echoed == 0:
            self._length += len(self._decoder.finish())
            self._decoder = StreamDecoder(self._tokenizer, continuation=True)
        return start


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


DONE = b"data: [DONE]\n\n"

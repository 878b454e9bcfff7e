"""The endpoints that generate: what a request asks of the engine, and the answer whole or as a stream."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

import fastapi
from fastapi.responses import JSONResponse, Response

from data import ChatTemplateError, Tokenizer
from serve.engine import Engine
from serve.http.api import Body, ChatBody, CompletionBody, StreamOptions, parse_body
from serve.http.chat_prompt import ChatPrompt, chat_prompt, template_arguments
from serve.http.connections import EventStream, ServerConfig, read_body, unless_disconnected
from serve.http.errors import ApiError, refusal
from serve.http.loop import EngineFailed, EngineLoop, Overloaded, Ticket
from serve.http.reader import Reader
from serve.http.replies import ChatReply, CompletionReply
from serve.parsers import form_of
from serve.request import Output, Request, RequestError


class Answer(Protocol):
    """What an API makes of the engine's outputs."""

    id: str

    def whole(self, outputs: list[Output]) -> dict[str, Any]: ...

    def stream(self, tickets: list[Ticket], options: StreamOptions | None) -> AsyncGenerator[bytes]: ...

    def cut_off(self, error: ApiError) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class ChatRequests:
    """What a chat asks of the engine, and how each of its answers is read."""

    prompt: ChatPrompt
    requests: list[Request]
    new_reader: Callable[[], Reader]


class Service:
    """The endpoints that generate, over one engine."""

    def __init__(self, engine: Engine, config: ServerConfig, loop: EngineLoop):
        self.engine, self.config, self.loop = engine, config, loop
        if engine.tokenizer is None:
            raise ValueError("a server needs an engine with a tokenizer.")
        self.tokenizer: Tokenizer = engine.tokenizer
        self.form = form_of(self.tokenizer.chat_template, self.tokenizer.tool_template)
        longest = max(len(self.tokenizer.bytes_of(i)) for i in range(self.tokenizer.vocab_size))
        self._longest_text = longest * engine.config.max_length  # bytes; more can't be max_length tokens

    @property
    def names(self) -> tuple[str, ...]:
        return (self.config.model_name, *self.config.aliases, *self.engine.adapters)

    def model_card(self, name: str) -> dict[str, Any]:
        return model_card(name, self.engine.config.max_length)

    def check_model(self, name: str) -> None:
        if name not in self.names:
            message = f"The model {name[:100]!r} does not exist; this server has {self.config.model_name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    async def chat(self, http: fastapi.Request) -> Response:
        body = parse_body(await read_body(http, self.config), ChatBody)
        self.check_model(body.model)
        chat = await asyncio.to_thread(self.chat_requests, body)
        shown = body.include_reasoning is not False
        counts = len(chat.prompt.tokens), bool(body.logprobs)
        reply = ChatReply(self.config.model_name, self.tokenizer, *counts, chat.new_reader, shown)
        return await self.answer(http, body, reply, chat.requests)

    def chat_requests(self, body: ChatBody) -> ChatRequests:
        """Raises ApiError with status 400; slow for long texts, so it runs in a thread."""
        prompt = self.chat_prompt(body)
        try:
            params = body.choices(prompt.grammar, prompt.thinking)
        except RequestError as error:
            raise refusal(error) from None
        requests = [Request(prompt.tokens, each, continuation=prompt.continued) for each in params]

        def new_reader() -> Reader:
            return Reader(self.form, self.tokenizer, requests[0], prompt.end, prompt.tools)

        return ChatRequests(prompt, requests, new_reader)

    def chat_prompt(self, body: ChatBody, bounded: bool = True) -> ChatPrompt:
        """`bounded`: refuse texts that can't fit the context before they are encoded."""
        try:
            arguments = template_arguments(body, self.tokenizer, self.form)
            if bounded:
                self._check_text("messages", _characters(arguments["messages"]))
                self._check_text("tools", _characters(arguments["tools"]))
            return chat_prompt(body, arguments, self.tokenizer, self.form)
        except ChatTemplateError as error:
            raise ApiError(400, str(error), "messages") from None
        except RequestError as error:  # of a grammar that is asked for
            raise refusal(error) from None

    async def complete(self, http: fastapi.Request) -> Response:
        body = parse_body(await read_body(http, self.config), CompletionBody)
        self.check_model(body.model)
        prompts = await asyncio.to_thread(self._encode, body)
        logprobs, echo = body.logprobs is not None, bool(body.echo)
        reply = CompletionReply(self.config.model_name, self.tokenizer, prompts, logprobs, echo, body.n or 1)
        try:
            params = body.choices()
            requests = [Request(prompt, each, continuation=True) for prompt in prompts for each in params]
        except RequestError as error:
            raise refusal(error) from None
        return await self.answer(http, body, reply, requests)

    def _encode(self, body: CompletionBody) -> list[list[int]]:
        prompts = []
        for prompt in body.prompts():
            if isinstance(prompt, str):
                self._check_text("prompt", len(prompt))
                prompt = self.text_tokens(prompt, body.add_special_tokens is not False)
            prompts.append(prompt)
        return prompts

    def text_tokens(self, text: str, add_special_tokens: bool) -> list[int]:
        """`add_special_tokens`: begin the text as the tokenizer's files have it."""
        bos = () if self.tokenizer.bos_id is None else (self.tokenizer.bos_id,)
        start = bos if self.tokenizer.around is None else self.tokenizer.around[0]
        return [*(start if add_special_tokens else ()), *self.tokenizer.encode(text)]

    def _check_text(self, field: str, characters: int) -> None:
        if characters > self._longest_text:
            message = (
                f"{field} has {characters} characters, more than {self.engine.config.max_length} tokens of the context "
                "can hold."
            )
            raise ApiError(400, message, field, "context_length_exceeded")

    async def answer(
        self, http: fastapi.Request, body: Body, reply: Answer, requests: list[Request]
    ) -> Response:
        """The answer to a checked request, whole or as a stream."""
        adapter = body.model if body.model in self.engine.adapters else None
        more = {"detokenize": True, "adapter": adapter, "cache_salt": body.cache_salt or ""}
        requests = [dataclasses.replace(request, **more) for request in requests]
        await asyncio.to_thread(self._check, requests)
        try:
            tickets = self.loop.submit({f"{reply.id}-{i}": request for i, request in enumerate(requests)})
        except Overloaded as error:
            raise ApiError(
                503, f"The server is busy: {error}", None, "overloaded", {"Retry-After": "2"}
            ) from None
        except EngineFailed as error:
            raise ApiError(503, str(error)) from None
        if body.stream:
            events, too_late = reply.stream(tickets, body.stream_options), reply.cut_off(self._too_late())
            return EventStream(events, lambda: self._cancel(tickets), self.config.request_seconds, too_late)
        return await self._whole(http, tickets, reply)

    def _check(self, requests: list[Request]) -> None:
        """Raises ApiError for what the engine can't serve; compiles grammars, which may take a second."""
        try:
            for request in requests:
                self.engine.check(request)
        except RequestError as error:
            raise refusal(error) from None

    async def _whole(self, http: fastapi.Request, tickets: list[Ticket], reply: Answer) -> Response:
        async def collect() -> list[Output]:
            return list(await asyncio.gather(*(_last_output(ticket) for ticket in tickets)))

        try:
            async with asyncio.timeout(self.config.request_seconds):
                outputs = await unless_disconnected(collect(), http.receive)
        except TimeoutError:
            raise self._too_late() from None
        except EngineFailed as error:
            raise ApiError(error.status, str(error)) from None
        finally:
            self._cancel(tickets)
        return Response(status_code=499) if outputs is None else JSONResponse(reply.whole(outputs))

    def _too_late(self) -> ApiError:
        return ApiError(504, f"no answer within {self.config.request_seconds:g} s.", None, "timeout")

    def _cancel(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self.loop.cancel(ticket)


def model_card(name: str, max_length: int) -> dict[str, Any]:
    """A model in /v1/models."""
    card = {"id": name, "object": "model", "created": 0, "owned_by": "crucible"}
    return card | {"max_model_len": max_length}


def _characters(value: Any) -> int:
    """Of all texts in a dialogue or in tools; reasoning does not count, which templates leave out of earlier turns."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(item) for key, item in value.items() if key != "reasoning_content")
    return sum(map(_characters, value)) if isinstance(value, list) else 0


async def _last_output(ticket: Ticket) -> Output:
    while not (out := await ticket.next()).finished:
        pass
    return out

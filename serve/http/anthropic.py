"""Anthropic's Messages API: each request becomes one of /v1/chat/completions, and its answer a message of blocks."""

from __future__ import annotations

import asyncio
import dataclasses

import fastapi
from fastapi.responses import JSONResponse, Response

from serve.http.anthropic_body import CountBody, MessagesBody, in_anthropic_words, parse_messages
from serve.http.anthropic_reply import MessageReply
from serve.http.api import ChatBody
from serve.http.chat_prompt import thinking_switches
from serve.http.connections import read_body
from serve.http.errors import ApiError
from serve.http.service import ChatRequests, Service
from serve.request import Request


class MessagesApi:
    """POST /v1/messages and /v1/messages/count_tokens."""

    def __init__(self, service: Service):
        self._service = service

    async def create(self, http: fastapi.Request) -> Response:
        body = parse_messages(await read_body(http, self._service.config), MessagesBody)
        self._service.check_model(body.model)
        try:
            chat_body, chat = await asyncio.to_thread(self._chat, body)
            tokens = len(chat.prompt.tokens)
            request, context_ends = self._limited(chat.requests[0], body.max_tokens)
            hidden = body.thinking is not None and body.thinking.display == "omitted"
            name = self._service.config.model_name
            reply = MessageReply(name, tokens, chat.new_reader(), not hidden, context_ends)
            return await self._service.answer(http, chat_body, reply, [request])
        except ApiError as error:
            raise in_anthropic_words(error) from None

    async def count(self, http: fastapi.Request) -> Response:
        body = parse_messages(await read_body(http, self._service.config), CountBody)
        self._service.check_model(body.model)
        try:
            tokens = await asyncio.to_thread(self._count, body)
        except ApiError as error:
            raise in_anthropic_words(error) from None
        return JSONResponse({"input_tokens": tokens})

    def _chat(self, body: MessagesBody) -> tuple[ChatBody, ChatRequests]:
        chat_body = self._chat_body(body)
        return chat_body, self._service.chat_requests(chat_body)

    def _count(self, body: CountBody) -> int:
        return len(self._service.chat_prompt(self._chat_body(body), bounded=False).tokens)

    def _chat_body(self, body: CountBody) -> ChatBody:
        switches = thinking_switches(self._service.tokenizer, bool(body.tools))
        return body.chat_body(switches, self._service.form)

    def _limited(self, request: Request, max_tokens: int) -> tuple[Request, bool]:
        """The request with at most `max_tokens` and what the context has room for; whether that is less."""
        room = max(self._service.engine.config.max_length - len(request.prompt), 1)
        sampling = dataclasses.replace(request.sampling, max_tokens=min(max_tokens, room))
        return dataclasses.replace(request, sampling=sampling), room < max_tokens

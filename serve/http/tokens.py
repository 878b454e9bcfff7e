"""POST /tokenize and /detokenize, with vLLM's fields."""

from __future__ import annotations

import asyncio
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, Response

from serve.http.api import ChatBody
from serve.http.body import Strict, json_object, validated
from serve.http.connections import read_body
from serve.http.errors import ApiError
from serve.http.service import Service

# Fields of a chat that decide its prompt.
_CHAT_FIELDS = (
    "messages",
    "tools",
    "chat_template_kwargs",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
)


class TokenizeBody(Strict):
    """A text, or the messages of a chat, which are checked as those of a chat are."""

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    tools: Any = None
    chat_template_kwargs: Any = None
    reasoning_effort: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None  # of a text, where the default is true; a template has its own
    return_token_strs: bool | None = None

    def chat_fields(self) -> dict[str, Any]:
        """Those that were given. Raises ApiError where they do not go with the others."""
        given = {name: value for name in _CHAT_FIELDS if (value := getattr(self, name)) is not None}
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give either prompt or messages.", "prompt")
        if self.prompt is not None and given:
            name = next(iter(given))
            raise ApiError(400, f"{name} belongs to messages, and prompt was given.", name)
        if self.messages is not None and self.add_special_tokens:
            message = "add_special_tokens: a chat template puts the special tokens itself; leave it out."
            raise ApiError(400, message, "add_special_tokens")
        return given


class DetokenizeBody(Strict):
    model: str | None = None
    tokens: list[int]


class TokensApi:
    """The server's tokenizer for clients. Lengths are bounded by that of a body, not by the context."""

    def __init__(self, service: Service):
        self._service = service

    async def tokenize(self, http: fastapi.Request) -> Response:
        body = validated(TokenizeBody, json_object(await read_body(http, self._service.config)))
        self._check_model(body.model)
        tokens = await asyncio.to_thread(self._tokens, body)
        strings = [self._service.tokenizer.token_of(token) for token in tokens]
        length = self._service.engine.config.max_length
        counts = {"count": len(tokens), "max_model_len": length, "tokens": tokens}
        return JSONResponse(counts | {"token_strs": strings if body.return_token_strs else None})

    async def detokenize(self, http: fastapi.Request) -> Response:
        body = validated(DetokenizeBody, json_object(await read_body(http, self._service.config)))
        self._check_model(body.model)
        tokenizer = self._service.tokenizer
        last = tokenizer.vocab_size - 1
        if outside := [token for token in body.tokens if not 0 <= token <= last]:
            message = f"tokens has {outside[0]}, which is outside the vocabulary, 0 to {last}."
            raise ApiError(400, message, "tokens")
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, keep_special=True)
        return JSONResponse({"prompt": text})

    def _tokens(self, body: TokenizeBody) -> list[int]:
        fields = body.chat_fields()
        if body.prompt is not None:
            return self._service.text_tokens(body.prompt, body.add_special_tokens is not False)
        chat = validated(ChatBody, fields | {"model": self._service.config.model_name})
        return self._service.chat_prompt(chat, bounded=False).tokens

    def _check_model(self, name: str | None) -> None:
        if name is not None:
            self._service.check_model(name)

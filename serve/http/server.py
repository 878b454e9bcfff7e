"""The HTTP server: OpenAI's API, the chat page, health and metrics, with limits on all that a client can send."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from data import ChatTemplateError, Tokenizer
from serve.engine import Engine
from serve.http.api import ApiError, ChatBody, CompletionBody, parse_body, refusal
from serve.http.chat_prompt import template_arguments
from serve.http.connections import (
    OPEN_PATHS,
    EventStream,
    KeyCheck,
    ServerConfig,
    read_body,
    unless_disconnected,
)
from serve.http.hosts import HostCheck
from serve.http.loop import EngineFailed, EngineLoop, Overloaded, Ticket
from serve.http.metrics import CONTENT_TYPE, Metrics
from serve.http.replies import DONE, ChatReply, CompletionReply, Reply, event
from serve.http.targets import PlainTargets
from serve.page import chat_page
from serve.request import Output, Request, RequestError, SamplingParams


def make_app(engine: Engine, config: ServerConfig) -> ASGIApp:
    """The ASGI application; its lifespan starts and stops the engine's thread."""
    metrics = Metrics(config.model_name, lambda: engine.stats)
    service = Service(engine, config, EngineLoop(engine, config.max_waiting, metrics.observe))

    @contextlib.asynccontextmanager
    async def lifespan(_):
        service.loop.start()
        yield {"give_up": service.loop.give_up}
        await service.loop.stop()

    app = fastapi.FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    page, policy = chat_page()

    @app.get("/")
    async def show_page() -> Response:
        headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
        }
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/health")
    async def health() -> Response:
        failed = service.loop.failed
        return JSONResponse(
            {"status": "failed", "reason": failed} if failed else {"status": "ok"}, 503 if failed else 200
        )

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card(name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model_card(name)

    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/completions")(service.complete)
    app.exception_handler(ApiError)(_answer_api_error)
    app.exception_handler(HTTPException)(_answer_http_exception)
    app.exception_handler(Exception)(_answer_defect)
    return _guarded(app, config)


def _guarded(app: ASGIApp, config: ServerConfig) -> ASGIApp:
    """The application behind the checks, outermost last."""
    app = KeyCheck(app, config.api_key, OPEN_PATHS | {"/metrics"} if config.open_metrics else OPEN_PATHS)
    if config.cors_origins:
        headers = ["Authorization", "Content-Type"]
        origins = list(config.cors_origins)
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers)
    if config.allowed_hosts is not None:
        app = HostCheck(app, config.allowed_hosts, config.cors_origins)
    return PlainTargets(app)


class Service:
    """The two endpoints that generate."""

    def __init__(self, engine: Engine, config: ServerConfig, loop: EngineLoop):
        self.engine, self.config, self.loop = engine, config, loop
        if engine.tokenizer is None:
            raise ValueError("a server needs an engine with a tokenizer.")
        self.tokenizer: Tokenizer = engine.tokenizer
        longest = max(len(self.tokenizer.bytes_of(i)) for i in range(self.tokenizer.vocab_size))
        self._longest_text = longest * engine.config.max_length  # bytes; more can't be max_length tokens

    @property
    def names(self) -> tuple[str, ...]:
        return (self.config.model_name, *self.config.aliases)

    def model_card(self, name: str) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": 0, "owned_by": "crucible"}
        return card | {"max_model_len": self.engine.config.max_length}

    def check_model(self, name: str) -> None:
        if name not in self.names:
            message = f"The model {name[:100]!r} does not exist; this server has {self.config.model_name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    async def chat(self, http: fastapi.Request) -> Response:
        body = parse_body(await read_body(http, self.config), ChatBody)
        self.check_model(body.model)
        try:
            arguments = await asyncio.to_thread(template_arguments, body, self.tokenizer)
            self._check_text("messages", _characters(arguments["messages"]))
            self._check_text("tools", _characters(arguments["tools"]))
            prompt, _ = await asyncio.to_thread(self.tokenizer.apply_chat_template, **arguments)
        except ChatTemplateError as error:
            raise ApiError(400, str(error), "messages") from None
        reply = ChatReply(self.config.model_name, self.tokenizer, len(prompt), bool(body.logprobs))
        return await self._answer(http, body, reply, [(prompt, False)])

    async def complete(self, http: fastapi.Request) -> Response:
        body = parse_body(await read_body(http, self.config), CompletionBody)
        self.check_model(body.model)
        prompts = await asyncio.to_thread(self._encode, body)
        total = sum(len(prompt) for prompt in prompts)
        reply = CompletionReply(self.config.model_name, self.tokenizer, total, body.logprobs is not None)
        return await self._answer(http, body, reply, [(prompt, True) for prompt in prompts])

    def _encode(self, body: CompletionBody) -> list[list[int]]:
        bos = (
            []
            if body.add_special_tokens is False or self.tokenizer.bos_id is None
            else [self.tokenizer.bos_id]
        )
        prompts = []
        for prompt in body.prompts():
            if isinstance(prompt, str):
                self._check_text("prompt", len(prompt))
                prompt = [*bos, *self.tokenizer.encode(prompt)]
            prompts.append(prompt)
        return prompts

    def _check_text(self, field: str, characters: int) -> None:
        if characters > self._longest_text:
            message = (
                f"{field} has {characters} characters, more than {self.engine.config.max_length} tokens of the context "
                "can hold."
            )
            raise ApiError(400, message, field, "context_length_exceeded")

    async def _answer(
        self,
        http: fastapi.Request,
        body: ChatBody | CompletionBody,
        reply: Reply,
        prompts: list[tuple[list[int], bool]],
    ) -> Response:
        try:
            choices = [(prompt, more, params) for prompt, more in prompts for params in body.choices()]
            requests = {f"{reply.id}-{i}": self._request(*choice) for i, choice in enumerate(choices)}
        except RequestError as error:
            raise refusal(error) from None
        try:
            tickets = self.loop.submit(requests)
        except Overloaded as error:
            raise ApiError(
                503, f"The server is busy: {error}", None, "overloaded", {"Retry-After": "2"}
            ) from None
        except EngineFailed as error:
            raise ApiError(503, str(error)) from None
        if body.stream:
            options = body.stream_options
            usage = bool(options and options.include_usage)
            events = _events(tickets, reply, usage, bool(options and options.continuous_usage_stats))
            return EventStream(events, lambda: self._cancel(tickets), self.config.request_seconds)
        return await self._whole(http, tickets, reply)

    def _request(self, prompt: list[int], continuation: bool, params: SamplingParams) -> Request:
        request = Request(prompt, params, detokenize=True, continuation=continuation)
        self.engine.check(request)
        return request

    async def _whole(self, http: fastapi.Request, tickets: list[Ticket], reply: Reply) -> Response:
        async def collect() -> list[Output]:
            return list(await asyncio.gather(*(_last_output(ticket) for ticket in tickets)))

        try:
            async with asyncio.timeout(self.config.request_seconds):
                outputs = await unless_disconnected(collect(), http.receive)
        except TimeoutError:
            raise ApiError(
                504, f"no answer within {self.config.request_seconds:g} s.", None, "timeout"
            ) from None
        except EngineFailed as error:
            raise ApiError(error.status, str(error)) from None
        finally:
            self._cancel(tickets)
        return Response(status_code=499) if outputs is None else JSONResponse(reply.whole(outputs))

    def _cancel(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self.loop.cancel(ticket)


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


async def _events(
    tickets: list[Ticket], reply: Reply, usage: bool, continuous: bool
) -> AsyncGenerator[bytes]:
    """Server-sent events of all choices, as their outputs come in."""
    counts = {"usage": None} if usage and not continuous else {}
    waiting = {asyncio.ensure_future(ticket.next()): i for i, ticket in enumerate(tickets)}
    try:
        for i in range(len(tickets)):
            if (opening := reply.opening(i)) is not None:
                yield event(opening | counts)
        while waiting:
            ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in ready:
                i, out = waiting.pop(future), future.result()
                if (chunk := reply.chunk(i, out)) is not None:
                    yield event(chunk | ({"usage": reply.usage()} if continuous else counts))
                if not out.finished:
                    waiting[asyncio.ensure_future(tickets[i].next())] = i
        if usage:
            yield event(reply.last())
    except EngineFailed as error:
        yield event(ApiError(error.status, str(error)).body())
    finally:
        for future in waiting:
            future.cancel()
    yield DONE


async def _answer_api_error(_: fastapi.Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _answer_http_exception(_: fastapi.Request, error: HTTPException) -> Response:
    return JSONResponse(
        ApiError(error.status_code, str(error.detail)).body(), error.status_code, error.headers
    )


async def _answer_defect(_: fastapi.Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"a defect in the server: {type(error).__name__}.").body(), 500)

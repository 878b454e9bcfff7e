"""The HTTP server: OpenAI's API, the chat page, health and metrics, with limits on all that a client can send."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import hmac
import logging
import re
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import fastapi
import uvicorn
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from data import ChatTemplateError, Tokenizer
from serve.api import ApiError, ChatBody, CompletionBody, parse_body, refusal
from serve.engine import Engine
from serve.loop import EngineFailed, EngineLoop, Overloaded, Ticket
from serve.metrics import CONTENT_TYPE, Metrics
from serve.replies import DONE, ChatReply, CompletionReply, Reply, event
from serve.request import Output, Request, RequestError, SamplingParams

log = logging.getLogger("crucible.serve")

OPEN_PATHS = frozenset({"/", "/health"})  # all others need the key, when there is one
_PAGE = Path(__file__).parent / "static" / "chat_page.html"


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Name and limits of a server."""

    model_name: str
    api_key: str | None = None
    max_waiting: int = 64  # requests beyond the engine's rows before answers are 503
    max_body_bytes: int = 4 << 20
    body_seconds: float = 30.0  # to send a body
    header_seconds: float = 10.0  # to send a request line and headers
    request_seconds: float = 600.0  # of one answer, a reader's slowness included
    drain_seconds: int = 30  # after SIGTERM, for answers under way


def make_app(engine: Engine, config: ServerConfig) -> ASGIApp:
    """The ASGI application; its lifespan starts and stops the engine's thread."""
    metrics = Metrics(config.model_name, lambda: engine.stats)
    service = Service(engine, config, EngineLoop(engine, config.max_waiting, metrics.observe))

    @contextlib.asynccontextmanager
    async def lifespan(_):
        service.loop.start()
        yield
        await service.loop.stop()

    app = fastapi.FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    page, policy = _page()

    @app.get("/")
    async def chat_page() -> Response:
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
        return {"object": "list", "data": [service.model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model_card()

    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/completions")(service.complete)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_defect)
    return KeyCheck(app, config.api_key)


class Service:
    """The two endpoints that generate."""

    def __init__(self, engine: Engine, config: ServerConfig, loop: EngineLoop):
        self.engine, self.config, self.loop = engine, config, loop
        self.tokenizer: Tokenizer = engine.tokenizer
        longest = max(len(self.tokenizer.bytes_of(i)) for i in range(self.tokenizer.vocab_size))
        self._longest_text = longest * engine.config.max_length  # bytes; more can't be max_length tokens

    def model_card(self) -> dict[str, Any]:
        card = {"id": self.config.model_name, "object": "model", "created": 0, "owned_by": "crucible"}
        return card | {"max_model_len": self.engine.config.max_length}

    def check_model(self, name: str) -> None:
        if name != self.config.model_name:
            message = f"The model {name[:100]!r} does not exist; this server has {self.config.model_name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    async def chat(self, http: fastapi.Request) -> Response:
        body = parse_body(await read_body(http, self.config), ChatBody)
        self.check_model(body.model)
        dialogue = body.dialogue()
        self._check_text("messages", sum(len(message["content"]) for message in dialogue))
        try:
            prompt, _ = await asyncio.to_thread(self.tokenizer.apply_chat_template, dialogue)
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
            requests = [self._request(f"{reply.id}-{i}", *choice) for i, choice in enumerate(choices)]
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

    def _request(self, id: str, prompt: list[int], continuation: bool, params: SamplingParams) -> Request:
        request = Request(prompt, params, id=id, detokenize=True, continuation=continuation)
        self.engine.check(request)
        return request

    async def _whole(self, http: fastapi.Request, tickets: list[Ticket], reply: Reply) -> Response:
        async def collect() -> list[Output]:
            return list(await asyncio.gather(*(_last_output(ticket) for ticket in tickets)))

        try:
            async with asyncio.timeout(self.config.request_seconds):
                outputs = await _unless_disconnected(collect(), http.receive)
        except TimeoutError:
            raise ApiError(
                504, f"no answer within {self.config.request_seconds:g} s.", None, "timeout"
            ) from None
        except EngineFailed as error:
            raise ApiError(500, str(error)) from None
        finally:
            self._cancel(tickets)
        return Response(status_code=499) if outputs is None else JSONResponse(reply.whole(outputs))

    def _cancel(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self.loop.cancel(ticket)


async def read_body(http: fastapi.Request, config: ServerConfig) -> bytes:
    """The body, counted as it comes; ApiError 413, 415 or 408."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which other sites' pages can't send without asking
        raise ApiError(415, f"Content-Type is {kind[:100]!r}; send application/json.")
    limit, body = config.max_body_bytes, bytearray()
    too_large = ApiError(413, f"the body is larger than {limit} bytes.", headers={"Connection": "close"})
    declared = http.headers.get("content-length", "0")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise too_large
    try:
        async with asyncio.timeout(config.body_seconds):
            async for piece in http.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        headers = {"Connection": "close"}
        raise ApiError(
            408, f"the body did not come within {config.body_seconds:g} s.", headers=headers
        ) from None
    return bytes(body)


async def _last_output(ticket: Ticket) -> Output:
    while not (out := await ticket.next()).finished:
        pass
    return out


async def _events(tickets: list[Ticket], reply: Reply, usage: bool, continuous: bool) -> AsyncIterator[bytes]:
    """Server-sent events of all choices as their news come in."""
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
        yield event(ApiError(500, str(error)).body())
    finally:
        for future in waiting:
            future.cancel()
    yield DONE


class EventStream(Response):
    """Sends events until they end, the client goes away (noticed also before the first token) or time is up."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], seconds: float):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._seconds = events, close, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await _unless_disconnected(self._send_all(send), receive)
        except TimeoutError:
            log.warning("an answer was cut off after %g s", self._seconds)
        finally:
            self._close()

    async def _send_all(self, send: Send) -> bool:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


async def _unless_disconnected(work: Awaitable[Any], receive: Receive) -> Any:
    """The result of `work`, or None when the client went away first, and then the work is cancelled."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for future in (task, watch):
            future.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class KeyCheck:
    """Lets nothing but `OPEN_PATHS` through without the key. Keys are compared in constant time."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app = app
        self._wanted = None if api_key is None else _digest(api_key.encode("utf-8"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._wanted is not None and scope["path"] not in OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self._wanted):
                error = ApiError(401, "Incorrect API key provided.", None, "invalid_api_key")
                response = JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})
                return await response(scope, receive, send)
        await self._app(scope, receive, send)


_PROCESS_KEY = secrets.token_bytes(32)


def _digest(key: bytes) -> bytes:
    return hmac.digest(_PROCESS_KEY, key, "sha256")


async def _answer_api_error(_: fastapi.Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _answer_http_exception(_: fastapi.Request, error: HTTPException) -> Response:
    return JSONResponse(
        ApiError(error.status_code, str(error.detail)).body(), error.status_code, error.headers
    )


async def _answer_defect(_: fastapi.Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"a defect in the server: {type(error).__name__}.").body(), 500)


def _page() -> tuple[bytes, str]:
    """The chat page and the policy that lets it run its own script and style, and nothing else."""
    page = _PAGE.read_bytes()

    def hashes(tag: bytes) -> str:
        parts = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts
        )

    policy = f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; connect-src 'self'; "
    return page, policy + "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def make_server(
    app: ASGIApp, config: ServerConfig, on_ready: Callable[[], None] = lambda: None
) -> uvicorn.Server:
    """uvicorn with limits on headers and their time; `run(sockets=[bind(...)])` serves until SIGTERM and drains."""

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                on_ready()

    class Protocol(H11Protocol):
        """Closes connections that do not bring their headers in time."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc) -> None:
            self._stop_watch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_watch()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(config.header_seconds, self._out_of_time)

        def _stop_watch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _out_of_time(self) -> None:
            self._deadline = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=config.drain_seconds,
        )
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket on host and port; port 0 takes a free one. OSError with the mend when that can't be."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise OSError(
            error.errno,
            f"can't listen on {host} port {port}: {error.strerror}. Is another server running? "
            f"Stop it or give another port, e.g. --port={port + 1}.",
        ) from None
    return sock

"""Connections and their limits: bodies, headers, time, the key, clients that go away, and the listening socket."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import fastapi
import uvicorn
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.http.errors import ApiError

log = logging.getLogger("crucible.serve")
_LAST_EVENT_SECONDS = 1.0

_FAREWELL_SECONDS = 3  # to send the errors of answers that did not end while the server drained
_BACKLOG = 2048  # connections that wait to be accepted, as uvicorn has it
OPEN_PATHS = frozenset({"/", "/health", "/ready"})  # all others need the key, when there is one


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Name and limits of a server."""

    model_name: str
    aliases: tuple[str, ...] = ()  # other names of the model
    api_key: str | None = None
    open_metrics: bool = False  # /metrics without the key
    cors_origins: tuple[
        str, ...
    ] = ()  # sites whose pages may read answers, as "https://chat.example"; "*" is any
    allowed_hosts: (
        tuple[str, ...] | None
    ) = ()  # names in Host beside addresses and localhost; None allows any
    max_waiting: int = 64  # requests beyond the engine's rows before answers are 503
    max_body_bytes: int = 4 << 20
    body_seconds: float = 30.0  # to send a body
    idle_seconds: int = 75  # between two requests of a connection; longer than proxies and pools wait
    header_seconds: float = 10.0  # to send a request line and headers
    max_connections: int = 1024  # open at once; more get 503
    request_seconds: float = 600.0  # of one answer, a reader's slowness included
    drain_seconds: int = 30  # after SIGTERM, for answers under way; those that take longer end with an error


async def read_body(http: fastapi.Request, config: ServerConfig) -> bytes:
    """The body, counted as it comes; ApiError 413, 415 or 408."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which other sites' pages can't send without asking
        raise ApiError(415, f"Content-Type is {kind[:100]!r}; send application/json.")
    encoding = http.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        message = f"Content-Encoding is {encoding[:100]!r}; send the body as it is."
        raise ApiError(415, message, headers={"Accept-Encoding": "identity", "Connection": "close"})
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
    except ClientDisconnect:
        log.warning("a client left after %d bytes of its body", len(body))
        raise ApiError(499, "the client left before its body was whole.") from None
    except TimeoutError:
        headers = {"Connection": "close"}
        raise ApiError(
            408, f"the body did not come within {config.body_seconds:g} s.", headers=headers
        ) from None
    return bytes(body)


class EventStream(Response):
    """Sends events until they end, the client goes away (noticed also before the first token) or time is up."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], close: Callable[[], None], seconds: float, too_late: bytes
    ):
        """`too_late`: the last events of a stream that is cut off after `seconds`."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._seconds, self._too_late = events, close, seconds, too_late

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await unless_disconnected(self._send_all(send), receive)
        except TimeoutError:
            log.warning("an answer was cut off after %g s", self._seconds)
            with contextlib.suppress(TimeoutError):  # a reader may be what was slow
                await asyncio.wait_for(self._end(send), _LAST_EVENT_SECONDS)
        finally:
            self._close()

    async def _end(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._too_late, "more_body": False})

    async def _send_all(self, send: Send) -> bool:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


async def unless_disconnected(work: Awaitable[Any], receive: Receive) -> Any:
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
    """Lets nothing but `open_paths` through without the key, as a bearer key or as Anthropic's clients send it
    (X-Api-Key). Keys are compared in constant time."""

    def __init__(self, app: ASGIApp, api_key: str | None, open_paths: frozenset[str] = OPEN_PATHS):
        self._app, self._open_paths = app, open_paths
        self._wanted = None if api_key is None else _digest(api_key.encode("utf-8"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._wanted is not None and scope["path"] not in self._open_paths:
            matches = [hmac.compare_digest(_digest(key), self._wanted) for key in _keys(scope)]
            if not any(matches):
                error = ApiError(401, "Incorrect API key provided.", None, "invalid_api_key")
                response = JSONResponse(error.body_for(scope["path"]), 401, {"WWW-Authenticate": "Bearer"})
                return await response(scope, receive, send)
        await self._app(scope, receive, send)


def _keys(scope: Scope) -> list[bytes]:
    """What a request gives as its key, by either header; of each the first."""
    headers = dict(reversed(scope["headers"]))
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    bearer = [key.strip()] if scheme.lower() == b"bearer" else []
    return [*bearer, headers[b"x-api-key"].strip()] if b"x-api-key" in headers else bearer


_PROCESS_KEY = secrets.token_bytes(32)


def _digest(key: bytes) -> bytes:
    return hmac.digest(_PROCESS_KEY, key, "sha256")


def make_server(
    app: ASGIApp, config: ServerConfig, on_ready: Callable[[], None] = lambda: None
) -> uvicorn.Server:
    """uvicorn with limits on headers and their time; `run(sockets=[bind(...)])` serves until SIGTERM and drains."""

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                on_ready()

        async def shutdown(self, sockets=None) -> None:
            give_up = self.lifespan.state["give_up"]
            self.lifespan.state["drain"]()
            timer = asyncio.get_running_loop().call_later(config.drain_seconds, give_up)
            await super().shutdown(sockets)
            timer.cancel()

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
            limit_concurrency=config.max_connections,
            timeout_keep_alive=config.idle_seconds,
            timeout_graceful_shutdown=config.drain_seconds + _FAREWELL_SECONDS,
        )
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket on host and port; port 0 takes a free one. OSError with the mend when that can't be, ValueError for a
    number that is no port."""
    if not 0 <= port <= 65535:  # the system would take it modulo 65536
        raise ValueError(f"port={port}; wanted 0 to 65535, where 0 takes a free one.")
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(_BACKLOG)  # with SO_REUSEADDR a second bind succeeds until one socket listens
    except OSError as error:
        sock.close()
        raise OSError(
            error.errno,
            f"can't listen on {host} port {port}: {error.strerror}. Is another server running? "
            f"Stop it or give another port, e.g. --port={port + 1 if port < 65535 else 8000}.",
        ) from None
    return sock

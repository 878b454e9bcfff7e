"""The HTTP server: APIs of OpenAI and Anthropic, the chat page, health, metrics, and limits on what clients send."""

from __future__ import annotations

import contextlib
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from serve.embedder import Embedder
from serve.engine import Engine
from serve.http.anthropic import MessagesApi
from serve.http.connections import OPEN_PATHS, KeyCheck, ServerConfig
from serve.http.embeddings import EmbeddingsApi
from serve.http.errors import ApiError
from serve.http.hosts import HostCheck
from serve.http.loop import EngineLoop
from serve.http.metrics import CONTENT_TYPE, Metrics
from serve.http.service import Service
from serve.http.targets import PlainTargets
from serve.http.tokens import TokensApi
from serve.page import chat_page


def make_app(engine: Engine, config: ServerConfig, embedder: Embedder | None = None) -> ASGIApp:
    """The ASGI application; its lifespan starts and stops the engine's thread. `embedder`: for /v1/embeddings."""
    metrics = Metrics(config.model_name, lambda: engine.stats)
    embeddings = EmbeddingsApi(config, embedder)
    service = Service(engine, config, EngineLoop(engine, config.max_waiting, metrics.observe))

    @contextlib.asynccontextmanager
    async def lifespan(_):
        service.loop.start()
        yield {"drain": service.loop.drain, "give_up": service.loop.give_up}
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

    @app.get("/ready")
    async def ready() -> Response:
        if (reason := service.loop.unready) is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": reason}, 503, {"Retry-After": "2"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = [service.model_card(name) for name in service.names]
        if embedder is not None and embedder.name not in service.names:
            cards.append(embeddings.card())
        return {"object": "list", "data": cards}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if embedder is not None and name == embedder.name and name not in service.names:
            return embeddings.card()
        service.check_model(name)
        return service.model_card(name)

    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/completions")(service.complete)
    messages = MessagesApi(service)
    app.post("/v1/messages")(messages.create)
    app.post("/v1/messages/count_tokens")(messages.count)
    app.post("/v1/embeddings")(embeddings.embed)
    app.post("/v1/score")(embeddings.score)
    tokens = TokensApi(service)
    app.post("/tokenize")(tokens.tokenize)
    app.post("/detokenize")(tokens.detokenize)
    app.exception_handler(ApiError)(_answer_api_error)
    app.exception_handler(HTTPException)(_answer_http_exception)
    app.exception_handler(Exception)(_answer_defect)
    return _guarded(app, config)


def _guarded(app: ASGIApp, config: ServerConfig) -> ASGIApp:
    """The application behind the checks, outermost last."""
    app = KeyCheck(app, config.api_key, OPEN_PATHS | {"/metrics"} if config.open_metrics else OPEN_PATHS)
    if config.cors_origins:
        headers = ["Authorization", "Content-Type", "X-Api-Key", "Anthropic-Version", "Anthropic-Beta"]
        origins = list(config.cors_origins)
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers)
    if config.allowed_hosts is not None:
        app = HostCheck(app, config.allowed_hosts, config.cors_origins)
    return PlainTargets(app)


async def _answer_api_error(http: fastapi.Request, error: ApiError) -> Response:
    return JSONResponse(error.body_for(http.url.path), error.status, error.headers)


async def _answer_http_exception(http: fastapi.Request, error: HTTPException) -> Response:
    body = ApiError(error.status_code, str(error.detail)).body_for(http.url.path)
    return JSONResponse(body, error.status_code, error.headers)


async def _answer_defect(http: fastapi.Request, error: Exception) -> Response:
    body = ApiError(500, f"a defect in the server: {type(error).__name__}.").body_for(http.url.path)
    return JSONResponse(body, 500)

"""POST /v1/embeddings as OpenAI has it, and vLLM's /v1/score: cosines of pairs of texts."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import secrets
import time
from typing import Annotated, Any, Literal

import fastapi
import numpy as np
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from serve.embedder import MAX_BATCH, Embedder
from serve.http.body import Strict, is_int, json_object, shown, validated
from serve.http.connections import ServerConfig, read_body, unless_disconnected
from serve.http.errors import ApiError
from serve.http.service import model_card

MAX_INPUTS = 2048  # texts of one request, as in OpenAI's API
_IGNORED = ("user", "priority", "request_id")


class EmbeddingsBody(Strict):
    model: str
    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None

    def inputs(self) -> list[str | list[int]]:
        given = self.input
        if isinstance(given, str) or (isinstance(given, list) and given and is_int(given[0])):
            given = [given]
        return _checked("input", given)


class ScoreBody(Strict):
    """One text against many, or two lists of equal length, pair by pair."""

    model: str
    text_1: Any
    text_2: Any

    def pairs(self) -> tuple[list[str | list[int]], list[str | list[int]]]:
        first, second = (
            _checked(name, [given] if isinstance(given, str) else given)
            for name, given in (("text_1", self.text_1), ("text_2", self.text_2))
        )
        if len(first) not in (1, len(second)):
            message = f"text_1 has {len(first)} texts and text_2 {len(second)}; wanted one, or as many."
            raise ApiError(400, message, "text_1")
        return first, second


class EmbeddingsApi:
    """The endpoints over one embedder. One batch is computed at a time, and of a client that leaves no other begins."""

    def __init__(self, config: ServerConfig, embedder: Embedder | None):
        self._config, self._embedder = config, embedder
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "embedder")
        self._under_way = 0

    def card(self) -> dict[str, Any]:
        """Of the embedder in /v1/models."""
        model = self._model(None)
        return model_card(model.name, model.max_length)

    async def embed(self, http: fastapi.Request) -> Response:
        body = validated(EmbeddingsBody, await self._fields(http))
        model = self._model(body.model)
        dimensions = self._dimensions(model, body.dimensions)
        ids = await asyncio.to_thread(self._tokens, model, "input", body.inputs())
        vectors = await self._vectors(http, model, ids)
        if vectors is None:
            return Response(status_code=499)
        if dimensions < model.width:
            vectors = _cut(vectors, dimensions)
        shown_as = _base64 if body.encoding_format == "base64" else np.ndarray.tolist
        data = [
            {"object": "embedding", "index": i, "embedding": shown_as(row)} for i, row in enumerate(vectors)
        ]
        return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": _usage(ids)})

    async def score(self, http: fastapi.Request) -> Response:
        body = validated(ScoreBody, await self._fields(http))
        model = self._model(body.model)
        first, second = body.pairs()
        ids = await asyncio.to_thread(self._tokens, model, "text_1", first)
        ids += await asyncio.to_thread(self._tokens, model, "text_2", second)
        vectors = await self._vectors(http, model, ids)
        if vectors is None:
            return Response(status_code=499)
        cosines = np.sum(vectors[: len(first)] * vectors[len(first) :], axis=1)
        data = [{"index": i, "object": "score", "score": float(value)} for i, value in enumerate(cosines)]
        head = {"id": f"score-{secrets.token_hex(12)}", "object": "list", "created": int(time.time())}
        return JSONResponse({**head, "model": model.name, "data": data, "usage": _usage(ids)})

    async def _fields(self, http: fastapi.Request) -> dict[str, Any]:
        fields = json_object(await read_body(http, self._config))
        return {name: value for name, value in fields.items() if name not in _IGNORED}

    def _model(self, name: str | None) -> Embedder:
        if self._embedder is None:
            message = "this server has no model that embeds texts."
            raise ApiError(404, message, "model", "model_not_found")
        if name not in (None, self._embedder.name):
            message = f"The model {name[:100]!r} embeds no texts here; {self._embedder.name!r} does."
            raise ApiError(404, message, "model", "model_not_found")
        return self._embedder

    def _dimensions(self, model: Embedder, wanted: int | None) -> int:
        if wanted in (None, model.width):
            return model.width
        if wanted in model.dimensions:
            return wanted
        message = f"dimensions={shown(wanted)}: this model's vectors have {model.width}, "
        if not model.dimensions:
            raise ApiError(400, f"{message}and it was not trained to be cut. Leave it out.", "dimensions")
        listed = ", ".join(map(str, model.dimensions))
        raise ApiError(400, f"{message}or {listed if len(listed) < 200 else 'any less'}.", "dimensions")

    def _tokens(self, model: Embedder, name: str, texts: list[str | list[int]]) -> list[list[int]]:
        """Ids of each text, within the model's length and vocabulary; token ids are taken as they are."""
        found, last = [], model.tokenizer.vocab_size - 1
        for i, text in enumerate(texts):
            ids = model.tokens(text) if isinstance(text, str) else text
            if not 1 <= len(ids) <= model.max_length:
                message = f"{name}[{i}] has {len(ids)} tokens; wanted 1 to {model.max_length}."
                raise ApiError(400, message, name, "context_length_exceeded" if ids else None)
            if outside := [token for token in ids if not 0 <= token <= last]:
                message = f"{name}[{i}] has the token id {shown(outside[0])}; wanted 0 to {last}."
                raise ApiError(400, message, name)
            found.append(ids)
        return found

    async def _vectors(
        self, http: fastapi.Request, model: Embedder, ids: list[list[int]]
    ) -> np.ndarray | None:
        """float32 [N, D]; None when the client went away."""
        if self._under_way >= max(self._config.max_waiting, 1):
            message = f"The server is busy: {self._under_way} requests for vectors are under way."
            raise ApiError(503, message, None, "overloaded", {"Retry-After": "2"})
        self._under_way += 1
        try:
            async with asyncio.timeout(self._config.request_seconds):
                return await unless_disconnected(self._batches(model, ids), http.receive)
        except TimeoutError:
            message = f"no answer within {self._config.request_seconds:g} s."
            raise ApiError(504, message, None, "timeout") from None
        finally:
            self._under_way -= 1

    async def _batches(self, model: Embedder, ids: list[list[int]]) -> np.ndarray:
        """Batch by batch, texts of like length together; others have a turn between two."""
        found = np.zeros((len(ids), model.width), np.float32)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(ids), MAX_BATCH):
            batch = order[start : start + MAX_BATCH]
            work = asyncio.get_running_loop().run_in_executor(
                self._thread, model.vectors, [ids[i] for i in batch]
            )
            found[batch] = await work
        return found


def _checked(name: str, given: Any) -> list[str | list[int]]:
    """A list of texts or of token ids."""
    if not isinstance(given, list) or not given:
        raise ApiError(400, f"{name} is {shown(given)}; wanted texts or token ids.", name)
    if len(given) > MAX_INPUTS:
        raise ApiError(400, f"{name} has {len(given)} texts; at most {MAX_INPUTS} can be given.", name)
    for i, item in enumerate(given):
        if not (isinstance(item, str) or isinstance(item, list) and all(map(is_int, item))):
            raise ApiError(400, f"{name}[{i}] is neither a text nor a list of token ids.", name)
    return given


def _cut(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first numbers of each vector, of length 1 again."""
    cut = vectors[:, :dimensions]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def _usage(ids: list[list[int]]) -> dict[str, int]:
    count = sum(map(len, ids))
    return {"prompt_tokens": count, "total_tokens": count}

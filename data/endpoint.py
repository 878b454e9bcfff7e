"""Text from a served model: requests to an OpenAI-compatible endpoint, or to a function of this process, each asked
once and kept.

The cache is one append-only file of JSON lines, keyed by a hash of the whole request. A line that a crash cut short
is passed over, several processes may append at the same time, and what failed is not kept: a second run asks again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from configs.typed import ConfigError
from data.callables import named

Request = Mapping[
    str, Any
]  # the JSON of a chat completion: model, messages, temperature, max_tokens, seed ...
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that may pass
_OF_THE_ACCOUNT = (401, 402, 403, 404)  # a key, a bill, a model that the server does not know
_MOST_WAIT = 60.0  # seconds between two tries


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Who answers: `base_url` of an OpenAI-compatible server ("http://127.0.0.1:8000/v1"), or `generate`, a function
    "module:function" that takes `model` and gives one from a request to the answer's text."""

    base_url: str = ""
    model: str = ""
    generate: str = ""
    api_key_env: str = "OPENAI_API_KEY"  # the variable that holds the key, where the server wants one
    concurrency: int = 8  # requests on the way at once
    retries: int = 4  # after the first try, 1, 2, 4 ... seconds later
    timeout: float = 300.0  # seconds for one try

    def __post_init__(self):
        if self.base_url and self.generate:
            raise ValueError("endpoint: give base_url or generate, not both")
        if self.concurrency < 1 or self.retries < 0:
            raise ValueError(
                f"concurrency={self.concurrency}, retries={self.retries}: wanted 1 and 0 at least"
            )

    def check(self) -> None:
        """Raises ConfigError unless there is somebody to ask."""
        if not self.base_url and not self.generate:
            raise ConfigError(
                "the endpoint is not given. Set base_url=http://HOST:PORT/v1 (`python -m serve` is one) and model, "
                'or generate="package.module:function".'
            )
        if self.base_url and not self.model:
            raise ConfigError("the endpoint has no model: give the name that the server knows it by.")


class Reply(NamedTuple):
    """An answer, or in its place why there is none."""

    text: str
    tokens: int = 0  # of the prompt and the answer, where the server counts them
    error: str = ""
    cached: bool = False
    unavailable: bool = (
        False  # the error is the server's or the account's, whatever is asked: ask again another time
    )


class Cache:
    """Replies by request, in `folder`/replies.jsonl, or in memory alone where there is no folder."""

    def __init__(self, folder: str | os.PathLike | None):
        self._path = Path(folder) / "replies.jsonl" if folder else None
        self._known: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()
        if self._path and self._path.exists():
            with open(self._path, "rb") as file:
                for line in file:
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        row = json.loads(line)
                        self._known[row["key"]] = (str(row["text"]), int(row["tokens"]))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Reply | None:
        found = self._known.get(key)
        return None if found is None else Reply(*found, cached=True)

    def put(self, key: str, reply: Reply) -> None:
        with self._lock:
            self._known[key] = (reply.text, reply.tokens)
            if self._path is not None:
                row = {"key": key, "text": reply.text, "tokens": reply.tokens}
                append_line(self._path, json.dumps(row).encode())


def append_line(path: Path, line: bytes) -> None:
    """Adds a whole line, on a line of its own even where a crash left half of one, whoever else appends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line + b"\n")
        file.flush()


def key_of(request: Request, endpoint: Endpoint) -> str:
    """What a request is kept under: everything that decides on the answer, and not the server's address."""
    content = json.dumps([dict(request), endpoint.generate], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def ask_all(endpoint: Endpoint, requests: Sequence[Request], cache: Cache) -> Iterator[tuple[int, Reply]]:
    """(number, reply) of every request, those that are cached first and then as they come; of equal requests one is
    asked. A request that fails after all tries is a Reply with an error, and never an end."""
    keys = [key_of(request, endpoint) for request in requests]
    numbers: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        if (known := cache.get(key)) is not None:
            yield i, known
        else:
            numbers.setdefault(key, []).append(i)
    if not numbers:
        return
    ask = _asker(endpoint)
    todo, waiting = iter(numbers), {}
    pool = ThreadPoolExecutor(endpoint.concurrency)
    try:
        while True:
            while len(waiting) < endpoint.concurrency and (key := next(todo, None)) is not None:
                waiting[pool.submit(ask, requests[numbers[key][0]])] = key
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                key, reply = waiting.pop(future), future.result()
                if not reply.error:
                    cache.put(key, reply)
                first, *others = numbers[key]
                yield first, reply
                yield from ((i, reply._replace(cached=not reply.error)) for i in others)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _asker(endpoint: Endpoint) -> Callable[[Request], Reply]:
    endpoint.check()
    if endpoint.generate:
        return functools.partial(_ask_function, _function(endpoint.generate, endpoint.model))
    return functools.partial(_ask_server, endpoint)


@functools.lru_cache(maxsize=2)
def _function(name: str, model: str) -> Callable[[Request], str]:
    """Made once in a process: it may hold a model."""
    return named(name)(model)


def _ask_function(function: Callable[[Request], str], request: Request) -> Reply:
    try:
        return Reply(str(function(request)))
    except Exception as error:  # one request of many: its row says why
        return Reply("", error=f"{type(error).__name__}: {error}")


def _ask_server(endpoint: Endpoint, request: Request) -> Reply:
    body = json.dumps(dict(request), ensure_ascii=False).encode("utf-8", "replace")
    url = endpoint.base_url.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get(endpoint.api_key_env, ""):
        headers["Authorization"] = f"Bearer {secret}"
    why, unavailable = "", False
    for attempt in range(endpoint.retries + 1):
        pause = min(2.0**attempt, _MOST_WAIT)
        try:
            sent = urllib.request.Request(url, body, headers)
            with urllib.request.urlopen(sent, timeout=endpoint.timeout) as answer:
                return _reply(json.load(answer))
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code}: {error.read(300).decode('utf-8', 'replace')}"
            unavailable = error.code in (*_RETRIED, *_OF_THE_ACCOUNT)
            if error.code not in _RETRIED:
                break
            with contextlib.suppress(TypeError, ValueError):
                pause = min(float(error.headers["Retry-After"]), _MOST_WAIT)
        except (OSError, http.client.HTTPException) as error:  # no connection, or one that was cut
            why, unavailable = f"{type(error).__name__}: {error}", True
        except (ValueError, KeyError, IndexError, TypeError) as error:
            why, unavailable = f"{type(error).__name__}: {error}", False
        if attempt < endpoint.retries:
            time.sleep(pause)
    return Reply("", error=why, unavailable=unavailable)


def _reply(answer: Any) -> Reply:
    content = answer["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise ValueError("the answer has no text")
    return Reply(content, int((answer.get("usage") or {}).get("total_tokens") or 0))

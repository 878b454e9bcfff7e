"""A process that does one item of work after the other, and may die of one: the side that calls, and the process.

`python -m data.curation.child` reads pickled calls and writes frames: a byte for the kind, eight for the length, then
    R  the pickled result        C  what the user has to mend (a ConfigError)
    E  a traceback               P  the pickled place (step and row, file and document) that a careful call has come to
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from configs.typed import ConfigError

_HEAD = struct.Struct("<cQ")
_places: BinaryIO | None = None  # where the process tells its places, in a careful call


class Died(Exception):
    """The process ended in the middle of a call. `how`: "signal 9" or "exit code 1"; `place`: the last one told."""

    def __init__(self, how: str, place: Any):
        super().__init__(how)
        self.how, self.place = how, place


class Failed(Exception):
    """The function raised: its traceback."""


class Stopped(Exception):
    """Nobody waits for the result any more."""


class Child:
    """One process, started when it is first called, and again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def call(self, function: Callable[[Any], Any], item: Any, careful: bool = False) -> Any:
        """`function(item)` there. Raises ConfigError, Failed, Died or Stopped."""
        if self._stopped:
            raise Stopped
        process = self._process = self._process or _start()
        place = None
        try:
            _write(process.stdin, b"Q", pickle.dumps((function, item, careful)))
            while True:
                kind, payload = _read(process.stdout)
                if kind != b"P":
                    break
                place = pickle.loads(payload)
        except (EOFError, OSError, ValueError):
            code = _end(process, patience=1.0)
            self._process = None
            if self._stopped:
                raise Stopped from None
            raise Died(f"signal {-code}" if code < 0 else f"exit code {code}", place) from None
        if kind == b"C":
            raise ConfigError(payload.decode())
        if kind == b"E":
            raise Failed(payload.decode())
        return pickle.loads(payload)

    def stop(self) -> None:
        """Ends the process, in the middle of a call too."""
        self._stopped = True
        if self._process is not None:
            _end(self._process, patience=0.0)


def careful() -> bool:
    """Whether this process is to tell each place before it comes to it, so that a death can be laid to it."""
    return _places is not None


def tell(place: Any) -> None:
    """Says in a careful call what comes now; costs nothing in others."""
    if _places is not None:
        _write(_places, b"P", pickle.dumps(place))


def _end(process: subprocess.Popen[bytes], patience: float) -> int:
    """The exit code of a process that ends by itself within `patience` seconds, or is killed."""
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _start() -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-c", "from data.curation.child import serve; serve()"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )


def serve() -> None:
    """Answers calls until the pipe from the caller ends; in the middle of one too, so that none outlives its caller."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller says when to stop
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a stage prints is no reply
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(os.fdopen(os.dup(0), "rb"), requests), daemon=True).start()
    while True:
        _write(replies, *_answer(requests.get(), replies))


def _receive(pipe: BinaryIO, requests: queue.SimpleQueue[bytes]) -> None:
    while True:
        try:
            requests.put(_read(pipe)[1])
        except (EOFError, OSError):
            os._exit(0)


def _answer(request: bytes, replies: BinaryIO) -> tuple[bytes, bytes]:
    global _places
    try:
        function, item, is_careful = pickle.loads(request)
        _places = replies if is_careful else None
        return b"R", pickle.dumps(function(item))
    except ConfigError as error:
        return b"C", str(error).encode()
    except Exception:
        return b"E", traceback.format_exc().encode("utf-8", "replace")
    finally:
        _places = None


def _write(pipe: Any, kind: bytes, payload: bytes) -> None:
    pipe.write(_HEAD.pack(kind, len(payload)) + payload)
    pipe.flush()


def _read(pipe: Any) -> tuple[bytes, bytes]:
    kind, size = _HEAD.unpack(_exactly(pipe, _HEAD.size))
    return kind, _exactly(pipe, size)


def _exactly(pipe: Any, size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data

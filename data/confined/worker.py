"""The worker's side: imports a function once, then calls it in a confined copy of itself for each request.

A copy (fork) per request means that whatever an answer does to the interpreter is gone before the next one.
Messages are a length of four bytes and so many bytes: requests are pickled by the pool, replies are JSON.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pickle
import secrets
import select
import shutil
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from data.confined.limits import Limits, confine

_PR_SET_PDEATHSIG = 1
# Names that let evaluated text reach beyond mathematics. Verifiers evaluate answers; numbers need none of these.
_ESCAPES = {
    "breakpoint", "compile", "delattr", "eval", "exec", "getattr", "globals", "input", "locals", "open",
    "setattr", "vars",
}  # fmt: skip


def main(where: str, limits: Limits, folder: str) -> None:
    """Serve standard input and output until the input ends. `where` is "module:function"."""
    die_with_parent()
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    module, _, name = where.partition(":")
    function = getattr(importlib.import_module(module), name)
    getattr(function, "prepare", lambda: None)()
    os.dup2(nothing, 2)
    write_message(replies, b"{}")  # ready
    while (request := read_message(requests, sys.maxsize)) is not None:
        reply = _call(function, pickle.loads(request), limits, folder, (requests, replies))
        write_message(replies, json.dumps(reply).encode())


def _call(function: Callable, arguments: tuple, limits: Limits, folder: str, secret: tuple[int, ...]) -> Any:
    """{"value": ...} or {"error": why} of one call in a copy of this process."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    ours, theirs = os.pipe()
    nonce = secrets.token_hex(16)  # a reply that evaluated text wrote by itself lacks it
    child = os.fork()
    if not child:
        for descriptor in (ours, *secret):
            os.close(descriptor)
        _confined_call(function, arguments, limits, folder, theirs, nonce)
    os.close(theirs)
    try:
        data = _read_until(ours, time.monotonic() + limits.seconds, limits.reply_kilobytes << 10)
    finally:
        os.close(ours)
        _kill(child)
        os.waitpid(child, 0)
    if isinstance(data, str):
        return {"error": data}
    if not data.startswith(nonce.encode()):
        return {"error": "died"}
    try:
        return json.loads(data[len(nonce) :])
    except (ValueError, RecursionError):
        return {"error": "died"}


def _confined_call(
    function: Callable, arguments: tuple, limits: Limits, folder: str, out: int, nonce: str
) -> None:
    try:
        die_with_parent()
        os.setsid()
        os.chdir(folder)
        sys.addaudithook(_refuse_escapes)
        confine(limits, folder)
        reply = {"value": function(*arguments)}
        data = json.dumps(reply).encode()
    except BaseException as error:  # whatever an answer makes a verifier do is that answer's fault
        data = json.dumps({"error": f"{type(error).__name__}: {error}"[:200]}).encode()
    try:
        data = nonce.encode() + data
        while data:
            data = data[os.write(out, data) :]
    finally:
        os._exit(0)


def _read_until(descriptor: int, deadline: float, most: int) -> bytes | str:
    """What is written until the other end closes; "timeout" or "flood" where it goes on too long."""
    parts, size = [], 0
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return "timeout"
        part = os.read(descriptor, 65536)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > most:
            return "flood"


def _kill(child: int) -> None:
    for kill in (os.killpg, os.kill):  # the group, if the child came to make one
        try:
            kill(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _refuse_escapes(event: str, arguments: tuple) -> None:
    """Audit hook: evaluated text that names what it needs to leave mathematics is an error."""
    if (
        event == "exec"
        and isinstance(code := arguments[0], types.CodeType)
        and _is_evaluated(code.co_filename)
    ):
        _refuse_names(code)


def _is_evaluated(filename: str) -> bool:
    """Text has a name in angle brackets, such as "<string>"; so have modules that are a part of the interpreter."""
    return filename.startswith("<") and not filename.startswith("<frozen ")


def _refuse_names(code: types.CodeType) -> None:
    for name in code.co_names:
        if name in _ESCAPES or (name.startswith("__") and name.endswith("__")):
            raise PermissionError(f"evaluated text names {name}")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _refuse_names(constant)


def die_with_parent() -> None:
    """Kill this process when the one that started it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def read_message(descriptor: int, most: int) -> bytes | None:
    """One message; None at the end of the stream. Raises ValueError for one of more than `most` bytes."""
    head = _read_exactly(descriptor, 4)
    if head is None:
        return None
    (size,) = struct.unpack("!I", head)
    if size > most:
        raise ValueError(f"a message of {size} bytes; at most {most} were expected")
    return _read_exactly(descriptor, size)


def write_message(descriptor: int, data: bytes) -> None:
    view = memoryview(struct.pack("!I", len(data)) + data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_exactly(descriptor: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)

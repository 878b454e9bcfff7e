"""A pool of workers that call one function on untrusted arguments, each call in a confined process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from data.confined.limits import Limits, warn_if_open
from data.confined.worker import read_message, write_message

STARTUP_SECONDS = 120.0  # a worker imports its function's modules first
_GRACE_SECONDS = 10.0  # that a worker has, after an answer's own time, to say so
_TRIES = 3  # workers in a row that die before they take a request up

_BOOT = """
import json, sys
path, where, limits, folder = json.loads(sys.argv[1])
sys.path[:] = path
from data.confined.limits import Limits
from data.confined.worker import main
main(where, Limits(**limits), folder)
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one call: its JSON value, or why there is none ("timeout", "flood", "died", or what it raised)."""

    value: Any = None
    error: str = ""


class Pool:
    """Use as a context manager or `close` it.

    Args:
      function: importable by its module and name; arguments are pickled, what it returns must be JSON. Its attribute
        `prepare`, if it has one, is called once in each worker before the first call, e.g. to import.
      workers: processes; they start when they are first needed.
    """

    def __init__(self, function: Callable[..., Any], *, workers: int = 1, limits: Limits = Limits()):
        if function.__module__ == "__main__" or "<" in function.__qualname__:
            raise ValueError(
                f"{function.__qualname__} of {function.__module__} can't be imported by another process. Put it into a "
                "module, at its top."
            )
        warn_if_open()
        self._where, self._limits = f"{function.__module__}:{function.__qualname__}", limits
        self._workers: list[_Worker | None] = [None] * max(workers, 1)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def map(self, arguments: Sequence[tuple]) -> list[Outcome]:
        """An outcome for each tuple of arguments, in their order."""
        outcomes = [Outcome(error="died")] * len(arguments)
        waiting = list(range(len(arguments)))[::-1]
        busy: dict[int, tuple[int, float]] = {}  # worker number -> (call number, deadline)
        try:
            while waiting or busy:
                for number in range(len(self._workers)):
                    if waiting and number not in busy:
                        index = waiting.pop()
                        self._send(number, pickle.dumps(arguments[index]))
                        busy[number] = (index, time.monotonic() + self._limits.seconds + _GRACE_SECONDS)
                self._collect(busy, outcomes)
        except BaseException:  # an interrupt, say: nobody waits for those that are at work
            for number in busy:
                self._replace(number)
            raise
        return outcomes

    def close(self) -> None:
        """Ends the workers; the pool can be used again."""
        for worker in self._workers:
            if worker is not None:
                worker.kill()
        self._workers = [None] * len(self._workers)

    def _send(self, number: int, request: bytes) -> None:
        """Hand a request to a worker; one that died meanwhile is replaced."""
        for _ in range(_TRIES):
            worker = self._workers[number] or _Worker(self._where, self._limits)
            self._workers[number] = worker
            try:
                worker.send(request)
                return
            except OSError:
                self._replace(number)
        raise RuntimeError(
            f"{_TRIES} worker processes in a row for {self._where} died before they took a request."
        )

    def _collect(self, busy: dict[int, tuple[int, float]], outcomes: list[Outcome]) -> None:
        soonest = min(deadline for _, deadline in busy.values())
        poll = select.poll()
        workers = {number: worker for number in busy if (worker := self._workers[number]) is not None}
        descriptors = {worker.replies: number for number, worker in workers.items()}
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN | select.POLLHUP)
        ready = {descriptors[d] for d, _ in poll.poll(max(0.0, soonest - time.monotonic()) * 1000)}
        for number, (index, deadline) in list(busy.items()):
            if number in ready:
                outcomes[index] = self._receive(number, workers[number])
            elif time.monotonic() >= deadline:
                outcomes[index] = Outcome(error="timeout")
                self._replace(number)
            else:
                continue
            del busy[number]

    def _receive(self, number: int, worker: _Worker) -> Outcome:
        try:
            message = read_message(worker.replies, (self._limits.reply_kilobytes << 10) + 1024)
            reply = json.loads(message) if message else None
        except (OSError, ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            self._replace(number)
            return Outcome(error="died")
        return Outcome(reply.get("value"), str(reply.get("error", "")))

    def _replace(self, number: int) -> None:
        if (worker := self._workers[number]) is not None:
            worker.kill()
        self._workers[number] = None


class _Worker:
    def __init__(self, where: str, limits: Limits):
        self._folder = tempfile.TemporaryDirectory(prefix="crucible-confined-", ignore_cleanup_errors=True)
        self._where, self._ready = where, False
        path = [os.path.abspath(entry) for entry in sys.path]
        empty = os.path.join(self._folder.name, "empty")
        setting = json.dumps([path, where, dataclasses.asdict(limits), empty])
        self._said = open(os.path.join(self._folder.name, "stderr"), "w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT, setting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            cwd=self._folder.name,
            env=environment(self._folder.name),
            start_new_session=True,
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._requests, self._replies = self.process.stdin, self.process.stdout
        self.replies = self._replies.fileno()

    def send(self, request: bytes) -> None:
        self._await_ready()
        write_message(self._requests.fileno(), request)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._requests.close()
        self._replies.close()
        self._said.close()
        self._folder.cleanup()

    def _await_ready(self) -> None:
        if self._ready:
            return
        poll = select.poll()
        poll.register(self.replies, select.POLLIN | select.POLLHUP)
        if not poll.poll(STARTUP_SECONDS * 1000) or read_message(self.replies, 1024) is None:
            self._said.seek(0)
            said = self._said.read(1 << 20).decode("utf-8", "replace").strip().splitlines()
            raise RuntimeError(
                f"a worker process for {self._where} did not start within {STARTUP_SECONDS:.0f} s: "
                f"{said[-1] if said else 'it said nothing'}"
            )
        self._ready = True


def environment(home: str) -> dict[str, str]:
    """Of a confined process: nothing of ours but where shared libraries lie, without which Python may not start."""
    variables = {"PATH": "/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8"}
    variables |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    if libraries := os.environ.get("LD_LIBRARY_PATH"):
        variables["LD_LIBRARY_PATH"] = libraries
    return variables

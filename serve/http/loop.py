"""The engine in a thread of its own, and tickets with which coroutines wait for its outputs."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping

from serve.engine import Engine
from serve.request import Output, Request

log = logging.getLogger("crucible.serve")


class Overloaded(Exception):
    """More requests are under way than the server takes."""


class EngineFailed(Exception):
    """The request was lost to a failure of the engine."""

    status = 500  # of the HTTP answer


class ServerStopping(EngineFailed):
    """The server ends before the answer has."""

    status = 503


class Ticket:
    """One request under way; `next` waits for its output."""

    def __init__(self, id: str):
        self.id = id
        self.done = False
        self._outputs: asyncio.Queue[Output | Exception] = asyncio.Queue()

    def put(self, output: Output | Exception) -> None:
        self._outputs.put_nowait(output)

    async def next(self) -> Output:
        """The next output. EngineFailed when there will be none, or it says "error"."""
        output = await self._outputs.get()
        if isinstance(output, Exception):
            raise output
        if output.finish_reason == "error":
            raise EngineFailed(output.error or "the engine failed")
        return output


class EngineLoop:
    """Steps the engine while there is work. All methods but the thread's own are called on the event loop."""

    def __init__(self, engine: Engine, max_waiting: int, on_output: Callable[[Output], None] | None = None):
        self.engine = engine
        self.capacity = engine.config.max_rows + max_waiting
        self.failed: str | None = None  # why the thread has ended, when it should not have
        self._draining = False
        self._on_output = on_output
        self._tickets: dict[str, Ticket] = {}
        self._commands: collections.deque[Callable[[], object]] = collections.deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the step it is in; requests still under way are dropped."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def submit(self, requests: Mapping[str, Request]) -> list[Ticket]:
        """Hand requests, by id and checked by `Engine.check`, to the engine, all or none.

        Raises:
          Overloaded: they would be more than max_rows + max_waiting.
          EngineFailed: the engine's thread has ended.
        """
        if self.failed is not None:
            raise EngineFailed(self.failed)
        if len(self._tickets) + len(requests) > self.capacity:
            raise Overloaded(f"{len(self._tickets)} requests are under way and {self.capacity} are the most.")
        tickets = {id: Ticket(id) for id in requests}
        self._tickets |= tickets
        self._command(lambda: [self._submit(id, request) for id, request in requests.items()])
        return list(tickets.values())

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request that has no reader any more; nothing when it has finished."""
        if not ticket.done:
            self._command(lambda: self.engine.cancel(ticket.id))

    def drain(self) -> None:
        """The server ends: from now on it is not ready for requests, though those that come in time are served."""
        self._draining = True

    def give_up(self) -> None:
        """Ends all answers under way with an error, when the server has drained for long enough."""
        self._fail_all(ServerStopping("the server is stopping and this answer took too long; ask again."))

    @property
    def unready(self) -> str | None:
        """Why a new request would not be taken, or None."""
        if self.failed is not None:
            return self.failed
        if self._draining or self._stopping:
            return "the server is stopping."
        if not self._thread.is_alive():
            return "the engine's thread does not run."
        if self.under_way >= self.capacity:
            return f"{self.under_way} requests are under way and {self.capacity} are the most."
        return None

    @property
    def under_way(self) -> int:
        return len(self._tickets)

    def _command(self, command: Callable[[], object]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._commands or self._stopping or self.engine.has_work)
                    commands, self._commands = self._commands, collections.deque()
                    if self._stopping:
                        return
                for command in commands:
                    command()
                self._send(self._step())
        except BaseException as error:
            log.exception("the engine's thread ended")
            self.failed = f"the engine's thread ended: {type(error).__name__}: {error}"
            self._event_loop.call_soon_threadsafe(self._fail_all, EngineFailed(self.failed))

    def _step(self) -> list[Output]:
        try:
            return self.engine.step()
        except Exception as error:
            log.exception("a step of the engine failed; the requests under way are given up")
            return self.engine.abort(f"a step of the engine failed: {type(error).__name__}: {error}"[:500])

    def _submit(self, id: str, request: Request) -> None:
        try:
            self.engine.submit(dataclasses.replace(request, id=id))
        except Exception as error:
            log.exception("request %s was refused after it had been checked", id)
            self._event_loop.call_soon_threadsafe(self._fail, id, EngineFailed(str(error)))

    def _send(self, outputs: list[Output]) -> None:
        if outputs:
            self._event_loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Output]) -> None:
        for out in outputs:
            ticket = self._tickets.get(out.id)
            if ticket is None:
                continue
            if out.finished:
                ticket.done = True
                del self._tickets[out.id]
            ticket.put(out)
            if self._on_output is not None:
                self._on_output(out)

    def _fail(self, id: str, error: Exception) -> None:
        ticket = self._tickets.pop(id, None)
        if ticket is not None:
            ticket.done = True
            ticket.put(error)

    def _fail_all(self, error: Exception) -> None:
        for id in list(self._tickets):
            self._fail(id, error)

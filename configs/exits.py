"""Exit codes of all commands, and what a command raises that was asked to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

DONE, FAILED, MISTAKE, GATE, STOPPED = 0, 1, 2, 3, 75  # 75: EX_TEMPFAIL, "try again"


class Stopped(BaseException):
    """The command was asked to stop (SIGTERM: a preemption notice) and has saved what it did; not an error.

    Like KeyboardInterrupt it may come anywhere, and nothing that catches errors may take it for one.
    """


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM raises `Stopped`, for work that is on disk whenever it is a whole."""

    def stop(*_):
        raise Stopped("asked to stop; the same command goes on from here.")

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

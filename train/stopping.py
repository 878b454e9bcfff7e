"""A run that is asked to stop ends after its current step, which is saved."""

from __future__ import annotations

import os
import signal
from typing import Any

from configs.exits import Stopped


class Stopping:
    """While active, SIGTERM (a preemption notice) or Ctrl-C asks the run to stop; a second Ctrl-C ends it at once.

    Attributes:
      asked: the signal that came; None: none did.
    """

    def __init__(self):
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        try:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)
            # a process in the background ignores Ctrl-C, and a caller with a handler of its own keeps it
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not the main thread
            pass
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            if handler is not None:
                signal.signal(number, handler)

    def leave(self, step: int) -> None:
        """Raises Stopped or KeyboardInterrupt, by the signal that came."""
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is not None:
            raise Stopped(f"stopped after step {step}; the same command goes on from here.")

    def _ask(self, number: int, _) -> None:
        if number == signal.SIGINT:
            if self.asked == signal.SIGINT:
                raise KeyboardInterrupt
            # print is not safe in a handler: it may interrupt another print
            os.write(2, b"\nstopping after this step, which is saved; Ctrl-C again stops at once\n")
        self.asked = number

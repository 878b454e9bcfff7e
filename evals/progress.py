"""One line on the terminal: how much is done, how fast, and the time left."""

from __future__ import annotations

import sys
import time

from train.metrics import clock

_SECONDS = 10.0  # between two lines where there is no terminal to rewrite one


class ProgressLine:
    """Rewritten in place on a terminal, elsewhere a line every ten seconds; goes to stderr."""

    def __init__(self, label: str, unit: str):
        self._label, self._unit = label, unit
        self._began = self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        rate, left = done / seconds, seconds / max(done, 1) * (total - done)
        line = f"{self._label}: {done:,}/{total:,} {self._unit}  {rate:.3g}/s  left {clock(left)}"
        if sys.stderr.isatty():
            print("\r\x1b[K" + line, end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif done == total or now - self._shown > _SECONDS:
            self._shown = now
            print(line, file=sys.stderr, flush=True)

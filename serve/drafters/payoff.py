"""Whether a step that verifies drafts makes more tokens a second than plain decoding, by measured times."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Sequence

_KEPT = 9  # times of a kind of step; their median counts, since single steps are slowed down by other work
_KNOWN = 3  # so many times are an estimate
_FIRST_FACTOR = 1.3  # time of a verifying step over that of a plain one, before both are known
_MARGIN = 1.1  # by which the expected tokens must exceed those of plain decoding, since both are estimates
_RETRY = 24  # steps with drafts that were not verified, after which one is, to measure it again


class Payoff:
    """Medians of the seconds of a step, for each number of rows."""

    def __init__(self):
        self._seconds: dict[tuple[str, int], collections.deque[float]] = {}
        self._passed_over: collections.Counter[int] = collections.Counter()

    def record(self, kind: str, rows: int, seconds: float) -> None:
        """`kind` is "decode" (seconds of one token a row) or "verify"."""
        self._seconds.setdefault((kind, rows), collections.deque(maxlen=_KEPT)).append(seconds)
        if kind == "verify":
            self._passed_over[rows] = 0

    def pays(self, rows: int, expected: Sequence[float]) -> bool:
        """Whether to verify drafts: whether rows gain by the geometric mean.

        By the sum of tokens, a few rows that repeat themselves would slow down all others.

        Args:
          rows: the size of the batch.
          expected: tokens of each sequence's draft that are likely to be accepted; 0 for one without a draft.
        """
        plain, verify = (self._seconds.get((kind, rows), ()) for kind in ("decode", "verify"))
        factor = _FIRST_FACTOR
        if min(len(plain), len(verify)) >= _KNOWN:
            factor = statistics.median(verify) / statistics.median(plain)
        gain = sum(math.log1p(tokens) for tokens in expected) / len(expected)
        return gain > math.log(_MARGIN * factor)

    def tries_again(self, rows: int) -> bool:
        """For drafts that don't pay: whether to verify these all the same, because it was long since the last."""
        self._passed_over[rows] += 1
        return self._passed_over[rows] >= _RETRY

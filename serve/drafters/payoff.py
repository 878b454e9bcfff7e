"""Whether a step that verifies drafts makes more tokens a second than plain decoding, by measured times."""

from __future__ import annotations

import math
from collections.abc import Sequence

_WEIGHT = 0.2  # of the last time in the running mean
_FIRST_FACTOR = 1.3  # time of a verifying step over that of a plain one, before both are known
_MARGIN = 1.1  # by which the expected tokens must exceed those of plain decoding, since both are estimates


class Payoff:
    """Running means of the seconds of a step, for each number of rows."""

    def __init__(self):
        self._seconds: dict[tuple[str, int], float] = {}

    def record(self, kind: str, rows: int, seconds: float) -> None:
        """`kind` is "decode" (seconds of one token a row) or "verify"."""
        known = self._seconds.get((kind, rows))
        self._seconds[kind, rows] = seconds if known is None else known + _WEIGHT * (seconds - known)

    def pays(self, rows: int, expected: Sequence[float]) -> bool:
        """Whether to verify drafts: whether rows gain by the geometric mean.

        By the sum of tokens, a few rows that repeat themselves would slow down all others.

        Args:
          rows: the size of the batch.
          expected: tokens of each sequence's draft that are likely to be accepted; 0 for one without a draft.
        """
        plain, verify = (self._seconds.get((kind, rows)) for kind in ("decode", "verify"))
        factor = _FIRST_FACTOR if plain is None or verify is None else verify / plain
        gain = sum(math.log1p(tokens) for tokens in expected) / len(expected)
        return gain > math.log(_MARGIN * factor)

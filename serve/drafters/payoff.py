"""Whether a step that verifies drafts makes more tokens a second than plain decoding, by measured times."""

from __future__ import annotations

from collections.abc import Sequence

_WEIGHT = 0.2  # of the last time in the running mean
_FIRST_FACTOR = 1.3  # time of a verifying step over that of a plain one, before both are known


class Payoff:
    """Running means of the seconds of a step, for each number of rows."""

    def __init__(self):
        self._seconds: dict[tuple[str, int], float] = {}

    def record(self, kind: str, rows: int, seconds: float) -> None:
        """`kind` is "decode" (seconds of one token a row) or "verify"."""
        known = self._seconds.get((kind, rows))
        self._seconds[kind, rows] = seconds if known is None else known + _WEIGHT * (seconds - known)

    def pays(self, rows: int, sequences: int, expected: Sequence[float]) -> bool:
        """Whether to verify drafts.

        Args:
          rows: the size of the batch; `sequences` of them are in use.
          expected: tokens of each draft that are likely to be accepted.
        """
        plain, verify = (self._seconds.get((kind, rows)) for kind in ("decode", "verify"))
        factor = _FIRST_FACTOR if plain is None or verify is None else verify / plain
        return sequences + sum(expected) > factor * sequences

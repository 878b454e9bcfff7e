"""Verifiers of answers. A model's answer is scored in a confined process (`data.confined`) and nowhere else.

A timeout counts from when a worker takes an answer up. An answer on which a verifier hangs, dies or floods scores 0;
the others keep their scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from data.confined import Limits, Pool
from data.tasks import Problem, score_trusted

_LONGEST_ANSWER = 1 << 20  # characters; more is no answer


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one answer: `value` is 0 to 1 (1 is right), `error` says why there was none ("timeout", "died", ...)."""

    value: float
    error: str = ""

    @property
    def timed_out(self) -> bool:
        return self.error == "timeout"


def score_task(problem: Problem, answer: str) -> float:
    """By the task's own scorer in reasoning-gym."""
    return score_trusted(problem, answer)


def score_math(problem: Problem, answer: str) -> float:
    """1 when the answer equals `problem.answer` as mathematics, by math-verify."""
    from math_verify import parse, verify

    unlimited: Any = None  # where the types of math-verify know an int alone
    gold, given = (parse(f"${text}$", parsing_timeout=unlimited) for text in (problem.answer, answer))
    return float(verify(gold, given, timeout_seconds=None))


def _import_tasks() -> None:
    import reasoning_gym  # noqa: F401
    import sympy  # noqa: F401


def _import_math() -> None:
    import math_verify  # noqa: F401


# Imports take seconds; a worker does them before it says that it is ready, outside any answer's time.
score_task.prepare = _import_tasks
score_math.prepare = _import_math
SCORERS: dict[str, Callable[[Problem, str], float]] = {"task": score_task, "math": score_math}


class Verifiers:
    """A pool of confined workers; use as a context manager or `close` it."""

    def __init__(
        self, scorer: Callable[[Problem, str], float] = score_task, *, workers: int = 1, timeout: float = 5.0
    ):
        """`scorer` is a function that a fresh process can import, e.g. a value of `SCORERS`."""
        self._pool = Pool(scorer, workers=workers, limits=Limits(seconds=timeout))

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def score(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[Verdict]:
        """A verdict for each answer; None (no answer in the asked format) is 0 without asking.

        Equal answers to one problem, of which a group has many, are asked once.
        """
        asked: dict[tuple[int, str | None], tuple[Problem, str]] = {}
        for problem, answer in zip(problems, answers, strict=True):
            if answer is not None and len(answer) <= _LONGEST_ANSWER:
                asked.setdefault((id(problem), answer), (problem, answer))
        outcomes = zip(asked, self._pool.map(list(asked.values())), strict=True)
        verdicts = {key: Verdict(_share(outcome.value), outcome.error) for key, outcome in outcomes}
        pairs = zip(problems, answers, strict=True)
        return [verdicts.get((id(problem), answer), Verdict(0.0)) for problem, answer in pairs]

    def close(self) -> None:
        self._pool.close()


def _share(value: Any) -> float:
    """A verifier's value; 0 for what is no number from 0 to 1."""
    return float(value) if isinstance(value, int | float) and 0.0 <= value <= 1.0 else 0.0

"""Verifiers in processes that can be killed: what a model wrote may make any parser hang or die.

A timeout counts from when a worker takes an answer up, not from when it was queued; the worker is then killed and
replaced, and the answer scores 0.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Sequence
from typing import Any

from data.tasks import Problem

STARTUP_SECONDS = 120.0  # a worker imports reasoning-gym or math-verify first


@dataclasses.dataclass(frozen=True)
class Verdict:
    value: float  # 0 to 1; 1 is right
    timed_out: bool = False


def score_task(problem: Problem, answer: str) -> float:
    """By the task's own scorer in reasoning-gym."""
    from data.tasks import score

    return score(problem, answer)


def score_math(problem: Problem, answer: str) -> float:
    """1 when the answer equals `problem.answer` as mathematics, by math-verify."""
    from math_verify import parse, verify

    gold, given = (parse(f"${text}$", parsing_timeout=None) for text in (problem.answer, answer))
    return float(verify(gold, given, timeout_seconds=None))


def _import_tasks() -> None:
    import reasoning_gym  # noqa: F401


def _import_math() -> None:
    import math_verify  # noqa: F401


# Imports take seconds; a worker does them before it says that it is ready, outside any answer's time.
PREPARE: dict[Callable, Callable[[], None]] = {score_task: _import_tasks, score_math: _import_math}
SCORERS: dict[str, Callable[[Problem, str], float]] = {"task": score_task, "math": score_math}


class Verifiers:
    """A pool of killable workers; use as a context manager or `close` it."""

    def __init__(
        self, scorer: Callable[[Problem, str], float] = score_task, *, workers: int = 1, timeout: float = 5.0
    ):
        """`scorer` is a function that a fresh process can import, e.g. a value of `SCORERS`."""
        self._scorer, self._timeout = scorer, timeout
        self._workers = [_Worker(scorer) for _ in range(workers)]

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def score(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[Verdict]:
        """A verdict for each answer; None (no answer in the asked format) is 0 without asking."""
        verdicts: list[Verdict] = [Verdict(0.0)] * len(answers)
        waiting = [i for i, answer in enumerate(answers) if answer is not None][::-1]
        busy: dict[int, tuple[int, float]] = {}  # worker number -> (answer number, deadline)
        while waiting or busy:
            for number, worker in enumerate(self._workers):
                if waiting and number not in busy:
                    worker.await_ready()
                    index = waiting.pop()
                    worker.pipe.send((problems[index], answers[index]))
                    busy[number] = (index, time.monotonic() + self._timeout)
            self._collect(busy, verdicts)
        return verdicts

    def _collect(self, busy: dict[int, tuple[int, float]], verdicts: list[Verdict]) -> None:
        soonest = min(deadline for _, deadline in busy.values())
        pipes = [self._workers[number].pipe for number in busy]
        ready = multiprocessing.connection.wait(pipes, max(0.0, soonest - time.monotonic()))
        for number, (index, deadline) in list(busy.items()):
            worker = self._workers[number]
            if worker.pipe in ready:
                verdicts[index] = worker.take()
            elif time.monotonic() >= deadline:
                verdicts[index] = Verdict(0.0, timed_out=True)
            else:
                continue
            del busy[number]
            if verdicts[index].timed_out or worker.dead:
                worker.kill()
                self._workers[number] = _Worker(self._scorer)

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []


class _Worker:
    def __init__(self, scorer: Callable[[Problem, str], float]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, scorer), daemon=True)
        self.process.start()
        theirs.close()
        self._ready, self.dead = False, False

    def await_ready(self) -> None:
        if not self._ready:
            if not self.pipe.poll(STARTUP_SECONDS):
                raise RuntimeError(f"a verifier process did not start within {STARTUP_SECONDS:.0f} s.")
            self.pipe.recv()
            self._ready = True

    def take(self) -> Verdict:
        try:
            return Verdict(self.pipe.recv())
        except (EOFError, OSError):  # the worker died of this answer
            self.dead = True
            return Verdict(0.0)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: multiprocessing.connection.Connection, scorer: Callable[[Problem, str], float]) -> None:
    PREPARE.get(scorer, lambda: None)()
    pipe.send("ready")
    while True:
        try:
            problem, answer = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            value = float(scorer(problem, answer))
        except Exception:  # a verifier that fails on what a model wrote: the answer is not right
            value = 0.0
        pipe.send(value if 0.0 <= value <= 1.0 else 0.0)

"""The problems of a run: procedural tasks with verifiers, or a file of prompts without them."""

from __future__ import annotations

from typing import Protocol

from configs import ConfigError
from data.packing import shuffled
from data.tasks import Problem, TaskSpec, generate, split_of
from rl.prompts import read_prompts


class ProblemsSpec(Protocol):
    """The fields of a config that decide its problems."""

    @property
    def tasks(self) -> tuple[TaskSpec, ...]: ...
    @property
    def prompts(self) -> str | None: ...
    @property
    def problems(self) -> int: ...
    @property
    def evaluate_problems(self) -> int: ...
    @property
    def seed(self) -> int: ...


def training_problems(spec: ProblemsSpec, part: int = 0) -> list[Problem]:
    """At most `spec.problems` problems to learn from; `part` 1, 2, ... are others, as long as a file has them.

    Raises:
      ConfigError: prompts of which none is left to learn from.
    """
    if spec.prompts is None:
        return generate(spec.tasks, "train", spec.problems, spec.seed + 7919 * part)
    found = [problem for problem in _read(spec.prompts) if not _held_out(problem)]
    if not found:
        raise ConfigError(
            f"config.prompts={spec.prompts}: all of its prompts are held out. Give more of them."
        )
    chosen = range(part * spec.problems, (part + 1) * spec.problems)
    if spec.problems >= len(found):
        return found
    places = (divmod(index, len(found)) for index in chosen)
    return [found[int(shuffled(len(found), spec.seed, epoch)[place])] for epoch, place in places]


def held_out_problems(spec: ProblemsSpec) -> list[Problem]:
    """Problems that no training sees: of a file the prompts that hash into a tenth, at most `evaluate_problems`."""
    if spec.prompts is None:
        return generate(spec.tasks, "validation", spec.evaluate_problems, spec.seed)
    return [problem for problem in _read(spec.prompts) if _held_out(problem)][: spec.evaluate_problems]


def _held_out(problem: Problem) -> bool:
    return split_of(problem.question) == "validation"


def _read(source: str) -> list[Problem]:
    return [
        Problem(f"prompt-{i}", "", str(messages[-1]["content"]), "", messages=messages)
        for i, messages in enumerate(read_prompts(source))
    ]

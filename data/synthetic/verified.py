"""Recipes whose rows are kept only when something checks them: a verifier of the answer, or tests of the code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from data.synthetic.recipe import Ask, Recipe, Reject, Row, Seed, dialogue, user
from data.synthetic.sandbox import run_python, without_bodies
from data.tasks import INSTRUCTION, Problem, TaskSpec, extract_answer, prompt, score

_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)```", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Reasoning(Recipe):
    """Traces that reach the right answer, by the task's own verifier: rejection sampling (Yuan et al. 2023,
    arXiv:2308.01825; STaR, Zelikman et al. 2022, arXiv:2203.14465). Its seeds are problems of these tasks."""

    tasks: tuple[TaskSpec, ...] = (TaskSpec("chain_sum"),)
    problems: int = 1000
    variants: int = 4  # samples of each problem
    instruction: str = "Think step by step. " + INSTRUCTION
    keep_each: int = 1  # right traces kept of each problem, the first ones

    writes: ClassVar[str] = "chat"

    def begin(self, seed: Seed, variant: int, pool: Sequence[Seed]) -> Ask:
        return Ask([dict(message) for message in prompt(seed.facts, self.instruction)])

    def answered(self, seed: Seed, ask: Ask, reply: str) -> Ask | Row | Reject:
        problem: Problem = seed.facts
        answer = extract_answer(reply)
        if answer is None:
            return Reject("verifier: no answer in the asked form")
        if score(problem, answer) < 1:
            return Reject("verifier: wrong")
        return dialogue(ask.messages[-1]["content"], reply)


@dataclasses.dataclass(frozen=True)
class Code(Recipe):
    """A function and its tests, kept when the tests pass and fail without the function's body. Seeds say what the
    function is for; where a seed's facts hold tests, those are run and none are asked for."""

    variants: int = 1
    seconds: float = 10.0  # for the tests
    megabytes: int = 1024

    writes: ClassVar[str] = "chat"

    def begin(self, seed: Seed, variant: int, pool: Sequence[Seed]) -> Ask:
        asked = (
            f"{seed.text}\n\nAnswer with one Python function in a fenced block"
            if seed.facts
            else f"Write a Python function inspired by this:\n\n{seed.text[:1500]}\n\nFirst say in a sentence what it "
            "does. Then give the function in one fenced block, and in a second fenced block tests of it as plain "
            "assert statements that call it by its name"
        )
        return Ask(user(asked + ". Use the standard library only."))

    def answered(self, seed: Seed, ask: Ask, reply: str) -> Ask | Row | Reject:
        blocks = [block.strip() for block in _BLOCK.findall(reply)]
        wanted = 1 if seed.facts else 2
        if len(blocks) < wanted:
            return Reject(f"format: {len(blocks)} fenced blocks, wanted {wanted}")
        program, tests = blocks[0], str(seed.facts) if seed.facts else blocks[1]
        if "assert" not in tests:
            return Reject("tests: none")
        passed, why = run_python(f"{program}\n\n{tests}", self.seconds, self.megabytes)
        if not passed:
            return Reject(f"tests: {why}")
        if run_python(f"{without_bodies(program)}\n\n{tests}", self.seconds, self.megabytes)[0]:
            return Reject("tests: pass without the function")
        if seed.facts:
            return dialogue(ask.messages[-1]["content"], reply)
        about = reply.split("```")[0].strip() or "Write a Python function."
        question = f"{about}\n\nIt must pass these tests:\n```python\n{tests}\n```"
        return dialogue(question, f"```python\n{program}\n```")

"""Reasoning traces that a verifier accepts: rejection sampling (STaR, Zelikman et al. 2022, arXiv:2203.14465)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from data.synthetic.recipes.base import Made, Messages, Recipe, Refused, Seed
from data.tasks import TaskSpec, extract_answer, generate, prompt, score

INSTRUCTION = "Think step by step, then end with the final answer as <answer>...</answer>."


@dataclasses.dataclass(frozen=True)
class Reasoning(Recipe):
    """Problems of reasoning-gym, each tried `samples` times; a trace stays only where its answer is right."""

    tasks: tuple[TaskSpec, ...] = (TaskSpec("chain_sum"),)
    problems: int = 100
    samples: int = 4

    def own_seeds(self, seed: int) -> list[Seed]:
        problems = generate(self.tasks, "train", self.problems, seed)
        return [Seed(p.id, p.question, "Apache-2.0", p) for p in problems]

    def asks(self, seed: Seed, pool: Sequence[Seed]) -> list[Messages]:
        return [prompt(seed.data, INSTRUCTION)] * self.samples

    def read(self, seed: Seed, number: int, answer: str) -> list[Made]:
        found = extract_answer(answer)
        if found is None:
            raise Refused("format: no answer")
        if score(seed.data, found) < 1:
            raise Refused("verifier: wrong answer")
        messages = [*prompt(seed.data, INSTRUCTION), {"role": "assistant", "content": answer.strip()}]
        return [Made(messages=messages)]

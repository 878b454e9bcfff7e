"""Rollouts: problems in, trajectories with rewards out, on the serving engine with the trainer's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs import ConfigError
from data import Tokenizer
from data.packing import shuffled
from data.tasks import Problem, extract_answer, prompt
from rl.config import RewardSpec, RolloutSpec
from rl.trajectory import Trajectory
from rl.verifiers import Verifiers
from serve import Engine, Output, Request, SamplingParams


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What the policy wrote to one problem, and what it is worth."""

    problem: Problem
    text: str
    trajectory: Trajectory

    @property
    def correct(self) -> bool:
        return self.trajectory.rewards["correct"] >= 1.0


class Sampler:
    """Asks the engine and the verifiers."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, verifiers: Verifiers, instruction: str, reward: RewardSpec
    ):
        self._engine, self._tokenizer, self._verifiers = engine, tokenizer, verifiers
        self._instruction, self._reward = instruction, reward

    def check(self, problems: Sequence[Problem], spec: RolloutSpec) -> None:
        """Raises ConfigError when the longest prompt leaves no room for an answer."""
        lengths = [len(self._prompt(problem)) for problem in problems]
        longest = max(lengths, default=0)
        if longest + spec.max_new_tokens > spec.seq_len:
            raise ConfigError(
                f"the prompt of {problems[lengths.index(longest)].id} has {longest} tokens, with "
                f"rollout.max_new_tokens={spec.max_new_tokens} more than rollout.seq_len={spec.seq_len}. "
                f"Raise seq_len to {longest + spec.max_new_tokens}, or lower max_new_tokens."
            )

    def sample(self, problems: Sequence[Problem], spec: RolloutSpec, seed: int) -> list[list[Rollout]]:
        """`spec.group` answers to each problem; the same for the same parameters, problems and seed."""
        seeds = np.random.SeedSequence(seed).generate_state(len(problems) * spec.group, np.uint32)
        rollouts = self._answer(
            [p for p in problems for _ in range(spec.group)], spec, spec.temperature, seeds
        )
        return [rollouts[i : i + spec.group] for i in range(0, len(rollouts), spec.group)]

    def greedy(self, problems: Sequence[Problem], spec: RolloutSpec) -> list[Rollout]:
        return self._answer(problems, spec, 0.0, np.zeros(len(problems), np.uint32))

    def complete(
        self, begun: Sequence[tuple[Problem, Sequence[int]]], spec: RolloutSpec, seeds: Sequence[int]
    ) -> list[Rollout]:
        """Answers to problems that begin with these tokens, which are part of a rollout's text."""
        problems, beginnings = [problem for problem, _ in begun], [list(tokens) for _, tokens in begun]
        return self._answer(problems, spec, spec.temperature, seeds, beginnings)

    def _answer(
        self,
        problems: Sequence[Problem],
        spec: RolloutSpec,
        temperature: float,
        seeds: Any,
        beginnings: Sequence[list[int]] | None = None,
    ) -> list[Rollout]:
        begun = [[] for _ in problems] if beginnings is None else beginnings
        requests = [
            Request(
                self._prompt(problem) + tokens,
                SamplingParams(
                    max_tokens=max(spec.max_new_tokens - len(tokens), 1),
                    temperature=temperature,
                    seed=int(seed),
                ),
            )
            for problem, tokens, seed in zip(problems, begun, seeds, strict=True)
        ]
        outputs = self._engine.generate(requests)
        texts = [self._text([*tokens, *out.tokens]) for tokens, out in zip(begun, outputs, strict=True)]
        answers = [
            extract_answer(text) if problem.task else None
            for problem, text in zip(problems, texts, strict=True)
        ]
        verdicts = self._verifiers.score(problems, answers)
        rollouts = []
        for problem, request, output, text, answer, verdict in zip(
            problems, requests, outputs, texts, answers, verdicts, strict=True
        ):
            rewards = {"correct": verdict.value, "format": float(answer is not None)}
            rewards["timed_out"] = float(verdict.timed_out)
            rewards["total"] = rewards["correct"] + self._reward.format_weight * rewards["format"]
            rollouts.append(Rollout(problem, text, _trajectory(request, output, rewards)))
        return rollouts

    def _prompt(self, problem: Problem) -> list[int]:
        return self._tokenizer.apply_chat_template(prompt(problem, self._instruction))[0]

    def _text(self, ids: list[int]) -> str:
        """The answer without its stop token; cut short, it is what there is."""
        if ids and ids[-1] in self._tokenizer.eos_ids:
            ids = ids[:-1]
        return self._tokenizer.decode(ids)


def problems_of_step(problems: Sequence[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """`count` problems for a step, in epochs, each shuffled with its own seed: a pure function of its arguments."""
    chosen = []
    for index in range(step * count, (step + 1) * count):
        epoch, place = divmod(index, len(problems))
        chosen.append(problems[int(shuffled(len(problems), seed, epoch)[place])])
    return chosen


def _trajectory(request: Request, output: Output, rewards: dict[str, float]) -> Trajectory:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"the engine ended a rollout with {output.finish_reason}: {output.error}")
    versions = set(output.versions)
    if len(versions) != 1:
        raise RuntimeError(f"one answer was sampled by several versions of the policy: {sorted(versions)}")
    before = len(request.prompt)
    tokens = np.array([*request.prompt, *output.tokens], np.int32)
    logprobs = np.concatenate([np.zeros(before), output.logprobs]).astype(np.float32)
    return Trajectory(
        tokens, logprobs, np.arange(len(tokens)) >= before, rewards, versions.pop(), output.finish_reason
    )

"""`python -m rl.shepherd`: labels of the steps of sampled solutions, from where completions of each step end.

    workdir/shards/KEY/00000.jsonl   finished problems, in shards
    workdir/solutions.jsonl          each solution: prompt, completions (its steps), labels, and why it was dropped
    workdir/steps/                   the kept ones as a dataset of kind "steps", for the algorithm ProcessRewardModel

A step is a line of an answer. From each step, `completions` answers are sampled that go on from there; the label is the
share of right ones among them (`labels="share"`), or 1 if any is right ("any"). The last step's label is whether the
solution is right. The same command, given again, goes on from what is finished.
Wang et al. 2023 (Math-Shepherd), arXiv:2312.08935.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

import configs
from configs import ConfigError, atomic_write, exits
from configs.files import remove_leftovers
from configs.typed import check_at_least
from data import Tokenizer
from data.shards import TokenRecord, hash_of, is_current, write_dataset
from data.steps import SEPARATOR
from data.tasks import INSTRUCTION, Problem, TaskSpec, prompt
from data.tokenize import describe
from model.compilation import prepare_compiler
from rl.alignment.shards import Row, dropped_counts, in_shards, lines, print_dropped, seed_of
from rl.config import RewardSpec, RolloutSpec
from rl.loaded import LoadedModel
from rl.problems import training_problems
from rl.rollout import Rollout, Sampler
from rl.verifiers import Verifiers
from serve import Engine
from train.config import Execution

DESCRIPTION = __doc__ or ""
SOLUTIONS = "solutions.jsonl"


@dataclasses.dataclass(frozen=True)
class ShepherdConfig:
    """Which model solves which problems, and how often each of its steps is completed."""

    init_from: str = ""  # run folder, checkpoint, Hugging Face folder or GGUF file: it solves and completes
    tasks: tuple[TaskSpec, ...] = (TaskSpec("chain_sum"),)
    instruction: str = INSTRUCTION  # follows each question
    problems: int = 500
    completions: int = 8  # of each step
    labels: Literal["share", "any"] = "share"
    max_steps: int = 32  # solutions with more are dropped
    shard: int = 16  # problems that are written to disk together
    seed: int = 0
    rollout: RolloutSpec = RolloutSpec(
        group=4, max_new_tokens=256, seq_len=512
    )  # `group` solutions a problem
    reward: RewardSpec = RewardSpec()
    run: Execution = Execution()

    def __post_init__(self):
        check_at_least(1, problems=self.problems, completions=self.completions, shard=self.shard)
        check_at_least(2, max_steps=self.max_steps)

    prompts = None  # problems without a verifier have no right answer
    evaluate_problems = 0


def label_steps(config: ShepherdConfig, workdir: Path) -> dict[str, Any]:
    """Writes solutions and dataset; returns the report.

    Raises:
      ConfigError: no model, or no solution that was kept.
    """
    if not config.init_from:
        raise ConfigError("give config.init_from: the model that solves the problems.")
    prepare_compiler()
    loaded = LoadedModel(config.init_from, config.run)
    settings = configs.to_dict(config) | {"init_from": None}
    key = hash_of("shepherd", settings, loaded.key)
    if is_current(workdir / "steps", key):
        return json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    remove_leftovers(workdir)
    configs.save(config, workdir / "config.json")
    problems = training_problems(config)
    spec, tokenizer = config.rollout, loaded.tokenizer
    rows_at_once = min(config.shard * spec.group, 256)
    engine = Engine(loaded.cfg, loaded.params, tokenizer, max_rows=rows_at_once, max_length=spec.seq_len)
    with Verifiers(workers=config.reward.workers, timeout=config.reward.timeout) as verifiers:
        sampler = Sampler(engine, tokenizer, verifiers, config.instruction, config.reward)
        sampler.check(problems, spec)
        make = lambda numbers: labelled(sampler, tokenizer, problems, numbers, config)
        rows = list(in_shards(workdir / "shards", key, len(problems), config.shard, make, "label"))
    kept = [row for row in rows if row["dropped"] is None]
    report = _report(rows, kept)
    atomic_write(workdir / SOLUTIONS, lines(rows))
    atomic_write(workdir / "report.json", json.dumps(report, indent=1) + "\n")
    if not kept:
        raise ConfigError(
            f"no solution was kept: {report['dropped']}. {workdir / SOLUTIONS} shows each of them."
        )
    facts = {"key": key, "shepherd": report} | describe(tokenizer)
    write_dataset(workdir / "steps", map(_record, kept), "steps", facts)
    return report


def labelled(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    numbers: range,
    config: ShepherdConfig,
) -> list[Row]:
    """The solutions of the problems with these numbers, with labels of their steps."""
    some = [problems[i] for i in numbers]
    groups = sampler.sample(some, config.rollout, seed_of(config.seed, numbers.start, 0))
    rows, begun, owners = [], [], []
    for number, group in zip(numbers, groups, strict=True):
        for solution in group:
            row, beginnings = _solution(solution, number, tokenizer, config)
            rows.append(row)
            for step, tokens in enumerate(beginnings):
                begun += [(solution.problem, tokens)] * config.completions
                owners += [(row, step)] * config.completions
    seeds = np.random.SeedSequence([config.seed, numbers.start, 1]).generate_state(len(begun), np.uint32)
    finished = sampler.complete(begun, config.rollout, seeds.tolist()) if begun else []
    right: dict[tuple[int, int], int] = collections.Counter()
    for (row, step), completion in zip(owners, finished, strict=True):
        right[id(row), step] += completion.correct
    for row in rows:
        if row["dropped"] is None:
            counts = [right[id(row), step] for step in range(len(row["completions"]) - 1)]
            shares = [count / config.completions for count in counts]
            own = [float(x > 0) for x in shares] if config.labels == "any" else shares
            row["labels"] = [*own, float(row["correct"])]
    return rows


def _solution(
    solution: Rollout, number: int, tokenizer: Tokenizer, config: ShepherdConfig
) -> tuple[Row, list[list[int]]]:
    """A solution as a row, and the tokens of its answer up to each step but the last."""
    trajectory = solution.trajectory
    before = int(np.argmax(trajectory.mask))
    answer = trajectory.tokens[before:].tolist()
    found = step_ends(answer, tokenizer)
    row = {
        "problem": number,
        "prompt": prompt(solution.problem, config.instruction),
        "completions": [text for text, _ in found],
        "labels": [],
        "correct": solution.correct,
        "tokens": trajectory.tokens.tolist(),
        "ends": [before + end for _, end in found],
        "dropped": _fault(solution, found, config),
    }
    if row["dropped"] is not None:
        return row, []
    return row, [answer[: end + 1] for _, end in found[:-1]]


def _fault(solution: Rollout, found: list[tuple[str, int]], config: ShepherdConfig) -> str | None:
    if solution.trajectory.stop_reason != "stop":
        return "the solution never stops"
    if not found:
        return "the solution is empty"
    if len(found) > config.max_steps:
        return "more steps than max_steps"
    if len({end for _, end in found}) < len(found):
        return "one token holds the ends of two steps"
    return None


def step_ends(answer: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Each step of an answer, a line that is not blank, with the place of the token that has its last byte."""
    ids = [*answer]
    if ids and ids[-1] in tokenizer.eos_ids:
        ids.pop()
    pieces = [tokenizer.bytes_of(i) for i in ids]
    ends = np.cumsum([len(piece) for piece in pieces])
    found, at = [], 0
    for line in b"".join(pieces).split(SEPARATOR.encode()):
        text = line.strip()
        if text:
            last = at + line.rindex(text) + len(text)
            found.append((text.decode("utf-8", "replace"), int(np.searchsorted(ends, last))))
        at += len(line) + len(SEPARATOR)
    return found


def _record(row: Row) -> tuple[TokenRecord, np.ndarray]:
    mask = np.zeros(len(row["tokens"]), bool)
    mask[row["ends"]] = True
    return TokenRecord(np.array(row["tokens"], np.int32), mask), np.array(row["labels"], np.float32)


def _report(rows: Sequence[Row], kept: Sequence[Row]) -> dict[str, Any]:
    labels = [label for row in kept for label in row["labels"]]
    return {
        "solutions": len(rows),
        "kept": len(kept),
        "right": sum(row["correct"] for row in kept),
        "steps": len(labels),
        "mean_label": float(np.mean(labels)) if labels else None,
        "dropped": dropped_counts(rows),
    }


def main(config: ShepherdConfig, workdir: Path) -> int:
    report = label_steps(config, workdir)
    counts = f"{report['kept']:,} of {report['solutions']:,} solutions, {report['steps']:,} steps"
    print(f"{workdir / 'steps'}: {counts}, mean label {report['mean_label']:.3f}")
    print_dropped(report)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(configs.run(main, ShepherdConfig, description=DESCRIPTION))

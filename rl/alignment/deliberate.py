"""`python -m rl.alignment.deliberate`: reasoning about a policy's text, as data to train on without the text.

    workdir/shards/KEY/00000.jsonl   finished prompts, in shards
    workdir/deliberations.jsonl      each prompt's reasoned answers, the judge's probabilities, and why each was dropped
    workdir/chat/                    the prompts without the text, with reasoning and answer, as a chat dataset
    workdir/report.json              counts, and what was dropped for which reason

The model reads the policy's text as system message and reasons before it answers. A judge that reads the text too says
whether the answer follows it; what it doubts is dropped. Trained on the rest without the text, the model knows the
policy by heart. The same command, given again, goes on from what is finished.
Guan et al. 2024 (deliberative alignment), arXiv:2412.16339.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import configs
from configs import ConfigError, atomic_write, exits
from configs.files import remove_leftovers
from configs.typed import check_at_least
from data.shards import hash_of, is_current, write_dataset
from data.tokenize import answer_record, describe
from model.compilation import prepare_compiler
from rl.alignment.constitution import check_template, fill
from rl.alignment.options import OptionScorer
from rl.alignment.shards import Row, dropped_counts, in_shards, lines, print_dropped, seed_of
from rl.alignment.writer import CLOSE, OPEN, SamplingSpec, Writer, Written
from rl.loaded import LoadedModel, Messages
from rl.prompts import read_prompts, shown
from train.config import Execution

DESCRIPTION = __doc__ or ""
INSTRUCTION = """\
You follow this policy:

{policy}

Before you answer, reason between <think> and </think> about which parts of the policy bear on the request and what they
ask of you. Then answer the user without mentioning the policy."""
JUDGE_TEMPLATE = """\
A policy for an assistant:

{policy}

A conversation with the assistant:

{prompt}

The assistant's reasoning, which the user does not see:

{reasoning}

The assistant's answer:

{answer}

Does the answer follow the policy, and does the reasoning rest on the right parts of it? Reply with yes or no, and \
nothing else."""
DELIBERATIONS = "deliberations.jsonl"
MAX_CHARACTERS = 100_000  # of a policy
Write = Callable[[Sequence[Messages], Sequence[int]], list[Written]]
Score = Callable[[Sequence[Messages]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class DeliberateConfig:
    """Which model reasons about which policy, to which prompts, and which judge keeps what."""

    init_from: str = ""  # run folder, checkpoint, Hugging Face folder or GGUF file: the model that reasons
    judge: str = ""  # the model that reads text, reasoning and answer; empty: the same one
    prompts: str = ""  # a dataset of kind "prompt", or JSONL of prompts or dialogues
    policy: str = ""  # a text file: what the model shall know by heart
    instruction: str = INSTRUCTION  # the system message, with {policy}
    judge_template: str = JUDGE_TEMPLATE  # with {policy}, {prompt}, {answer} and, if it is shown, {reasoning}
    samples: int = 2  # reasoned answers to each prompt
    keep: int = 1  # of them, the most probable to follow the policy
    min_probability: float = 0.5  # of "yes" against "no"; answers below it are dropped
    judge_seq_len: int = 8192  # tokens; a longer question to the judge drops its answer
    max_prompts: int = 0  # the first ones; 0: all
    shard: int = 64  # prompts that are written to disk together
    seed: int = 0
    sampling: SamplingSpec = SamplingSpec()
    run: Execution = Execution()

    def __post_init__(self):
        check_at_least(1, samples=self.samples, keep=self.keep, shard=self.shard)
        check_at_least(1, judge_seq_len=self.judge_seq_len)
        check_at_least(0, max_prompts=self.max_prompts, seed=self.seed)
        if not 0 <= self.min_probability <= 1:
            raise ValueError(f"min_probability={self.min_probability}; wanted 0 to 1.")
        check_template("instruction", self.instruction, "policy")
        check_template("judge_template", self.judge_template, "policy", "prompt", "answer")


class Reasoned(NamedTuple):
    """A text in its two parts, or why it has not got them."""

    reasoning: str
    answer: str
    fault: str | None


def read_policy(path: str | os.PathLike) -> str:
    """The text of a policy. Raises ConfigError for a file that is missing, empty, too long or no UTF-8."""
    if not str(path):
        raise ConfigError("give config.policy: a text file with the policy.")
    if not Path(path).is_file():
        raise ConfigError(f"{path} does not exist (from {os.getcwd()}).")
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    if not text or len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{path}: has {len(text)} characters; wanted 1 to {MAX_CHARACTERS}.")
    return text


def with_policy(messages: Messages, instruction: str, policy: str) -> list[dict[str, Any]]:
    """The dialogue with the policy in its system message, before what stands there already."""
    text = fill(instruction, policy=policy)
    rest = [dict(message) for message in messages]
    if rest and rest[0]["role"] == "system":
        text = f"{text}\n\n{rest[0]['content']}"
        rest = rest[1:]
    return [{"role": "system", "content": text}, *rest]


def split_reasoning(text: str) -> Reasoned:
    """Reasoning up to the first </think>, answer after it; <think> itself may stand in the prompt already."""
    head, mark, answer = text.partition(CLOSE)
    reasoning, answer = head.strip().removeprefix(OPEN).strip(), answer.strip()
    if not mark:
        return Reasoned("", text.strip(), f"the reasoning has no {CLOSE}")
    if not reasoning:
        return Reasoned(reasoning, answer, "the reasoning is empty")
    if OPEN in reasoning or OPEN in answer or CLOSE in answer:
        return Reasoned(reasoning, answer, "the reasoning is not in one piece")
    return Reasoned(reasoning, answer, None if answer else "the answer is empty")


def deliberate(config: DeliberateConfig, workdir: Path) -> dict[str, Any]:
    """Writes answers and dataset; returns the report.

    Raises:
      ConfigError: no model, prompts or policy, a bad one, or no answer that was kept.
    """
    if not config.init_from:
        raise ConfigError("give config.init_from: the model that reasons.")
    policy = read_policy(config.policy)
    prompts = read_prompts(config.prompts, config.max_prompts)
    prepare_compiler()
    loaded = LoadedModel(config.init_from, config.run)
    judging = LoadedModel(config.judge, config.run) if config.judge else loaded
    settings = configs.to_dict(config) | dict.fromkeys(("init_from", "judge", "prompts", "policy"))
    key = hash_of("deliberate", settings, prompts, policy, loaded.key, judging.key)
    if is_current(workdir / "chat", key):
        return json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    remove_leftovers(workdir)
    configs.save(config, workdir / "config.json")
    writer = Writer(loaded, config.sampling, reasoning=True)
    scorer = OptionScorer(judging, ("yes", "no"), config.judge_seq_len, config.sampling.rows)
    make = lambda numbers: deliberated(writer.write, scorer.logprobs, prompts, numbers, policy, config)
    rows = list(in_shards(workdir / "shards", key, len(prompts), config.shard, make, "deliberate"))
    report = _report(rows, len(prompts))
    atomic_write(workdir / DELIBERATIONS, lines(rows))
    atomic_write(workdir / "report.json", json.dumps(report, indent=1) + "\n")
    if not report["kept"]:
        raise ConfigError(
            f"no answer was kept: {report['dropped']}. {workdir / DELIBERATIONS} shows each of them."
        )
    records = (
        answer_record(row["messages"], _message(row), None, loaded.tokenizer, f"prompt {row['prompt']}")
        for row in rows
        if row["dropped"] is None
    )
    facts = {"key": key, "deliberate": report} | describe(loaded.tokenizer)
    write_dataset(workdir / "chat", records, "chat", facts)
    return report


def deliberated(
    write: Write,
    score: Score,
    prompts: Sequence[Messages],
    numbers: Iterable[int],
    policy: str,
    config: DeliberateConfig,
) -> list[Row]:
    """`samples` rows for each prompt with these numbers, and the judge's probability that each follows the policy."""
    places = [(i, sample) for i in numbers for sample in range(config.samples)]
    dialogues = [with_policy(prompts[i], config.instruction, policy) for i, _ in places]
    rows = []
    for (i, sample), written in zip(
        places, write(dialogues, [seed_of(config.seed, *place) for place in places]), strict=True
    ):
        parts = split_reasoning(written.text)
        row = {"prompt": i, "sample": sample, "messages": list(prompts[i])}
        row |= {"reasoning": parts.reasoning, "answer": parts.answer, "probability": None}
        fault = f"the text {written.fault}" if written.fault is not None else parts.fault
        rows.append(row | {"dropped": fault})
    going = [row for row in rows if row["dropped"] is None]
    questions = [_question(config.judge_template, row, policy) for row in going]
    for row, (yes, no) in zip(going, score(questions).tolist(), strict=True):
        if yes != yes:
            row["dropped"] = "the question to the judge is longer than judge_seq_len"
            continue
        row["probability"] = float(1 / (1 + np.exp(min(no - yes, 700.0))))
        if row["probability"] < config.min_probability:
            row["dropped"] = "the judge doubts it"
    _keep_best(rows, config.keep)
    return rows


def _keep_best(rows: Sequence[Row], keep: int) -> None:
    """Drops all but the `keep` most probable different answers to each prompt; of equals, the first sampled."""
    kept: dict[int, list[tuple[str, str]]] = collections.defaultdict(list)
    going = [row for row in rows if row["dropped"] is None]
    for row in sorted(going, key=lambda row: (row["prompt"], -row["probability"], row["sample"])):
        text = (row["reasoning"], row["answer"])
        if text in kept[row["prompt"]]:
            row["dropped"] = "the same as a kept one"
        elif len(kept[row["prompt"]]) == keep:
            row["dropped"] = "another is more probable"
        else:
            kept[row["prompt"]].append(text)


def _question(template: str, row: Row, policy: str) -> Messages:
    text = fill(
        template,
        policy=policy,
        prompt=shown(row["messages"]),
        reasoning=row["reasoning"],
        answer=row["answer"],
    )
    return [{"role": "user", "content": text}]


def _message(row: Row) -> dict[str, str]:
    return {"role": "assistant", "reasoning_content": row["reasoning"], "content": row["answer"]}


def _report(rows: Sequence[Row], prompts: int) -> dict[str, Any]:
    kept = [row for row in rows if row["dropped"] is None]
    return {
        "prompts": prompts,
        "sampled": len(rows),
        "kept": len(kept),
        "prompts_kept": len({row["prompt"] for row in kept}),
        "dropped": dropped_counts(rows),
    }


def main(config: DeliberateConfig, workdir: Path) -> int:
    report = deliberate(config, workdir)
    counts = f"{report['kept']:,} of {report['sampled']:,} answers, to {report['prompts_kept']:,} prompts"
    print(f"{workdir / 'chat'}: {counts} of {report['prompts']:,}")
    print_dropped(report)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(configs.run(main, DeliberateConfig, description=DESCRIPTION))

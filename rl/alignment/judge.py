"""`python -m rl.alignment.judge`: two answers to each prompt, and which of them a judge prefers by a constitution.

    workdir/shards/KEY/00000.jsonl   finished prompts, in shards
    workdir/judged.jsonl             each prompt's two answers, the judge's log-probabilities, and why it was dropped
    workdir/pairs.jsonl              the pairs that were kept, with the judge's probability; data.conversations reads it
    workdir/preferences/             these pairs as a preference dataset, for a reward model or DPO
    workdir/report.json              counts, and how much the judge leans to the first answer whatever it says

The judge reads both answers as (A) and (B), and again in the other order. With log-probabilities l of "A" and "B",
d1 = l(A) - l(B) in the first order and d2 = l(B) - l(A) in the second are the log-odds of the same answer; in their
mean a constant leaning to one letter cancels. The same command, given again, goes on from what is finished.
Bai et al. 2022, arXiv:2212.08073, section 4; Lee et al. 2023 (RLAIF), arXiv:2309.00267.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
from rl.alignment.constitution import Principle, check_template, draw, fill, read_constitution
from rl.alignment.options import OptionScorer
from rl.alignment.shards import Row, dropped_counts, in_shards, lines, print_dropped, seed_of
from rl.alignment.writer import SamplingSpec, Writer, Written
from rl.loaded import LoadedModel, Messages
from rl.prompts import read_prompts, shown
from train.config import Execution

DESCRIPTION = __doc__ or ""
TEMPLATE = """\
A conversation, and two answers to its last message:

{prompt}

Principle: {principle}

(A) {first}

(B) {second}

Which answer follows the principle better? Reply with A or B, and nothing else."""
JUDGED, PAIRS = "judged.jsonl", "pairs.jsonl"
Write = Callable[[Sequence[Messages], Sequence[int]], list[Written]]
Score = Callable[[Sequence[Messages]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Which model answers which prompts, and which judge compares its answers by which principles."""

    init_from: str = ""  # run folder, checkpoint, Hugging Face folder or GGUF file: the policy that answers
    judge: str = ""  # the model that compares; empty: the policy itself
    prompts: str = ""  # a dataset of kind "prompt", or JSONL of prompts or dialogues
    constitution: str = ""  # JSON or Markdown; one principle is drawn for each prompt
    template: str = TEMPLATE  # what the judge is asked, with {prompt}, {principle}, {first} and {second}
    min_margin: float = 0.5  # pairs with smaller log-odds (nats, mean of both orders) are dropped
    agreement: bool = True  # drop pairs of which each order prefers another answer
    judge_seq_len: int = 8192  # tokens; a longer question to the judge drops its pair
    max_prompts: int = 0  # the first ones; 0: all
    shard: int = 64  # prompts that are written to disk together
    seed: int = 0
    sampling: SamplingSpec = SamplingSpec()
    run: Execution = Execution()

    def __post_init__(self):
        check_at_least(1, shard=self.shard, judge_seq_len=self.judge_seq_len)
        check_at_least(0, max_prompts=self.max_prompts, seed=self.seed)
        if not 0 <= self.min_margin < math.inf:
            raise ValueError(f"min_margin={self.min_margin}; wanted a number of at least 0.")
        check_template("template", self.template, "prompt", "first", "second")


@dataclasses.dataclass(frozen=True)
class JudgeSpec:
    """The judge of `python -m rl.rounds`; the fields are those of JudgeConfig."""

    model: str = ""  # empty: the model that answers
    constitution: str = ""
    template: str = TEMPLATE
    min_margin: float = 0.5
    agreement: bool = True
    seq_len: int = 8192

    def __post_init__(self):
        check_at_least(1, seq_len=self.seq_len)
        check_template("template", self.template, "prompt", "first", "second")


class Contest(NamedTuple):
    """Two answers to a dialogue, compared by a principle."""

    messages: Messages
    principle: str
    answers: tuple[str, str]


class Preference(NamedTuple):
    """Log-odds in nats that the first answer is the better one, in either order and in the mean."""

    in_order: float
    swapped: float

    @property
    def log_odds(self) -> float:
        return (self.in_order + self.swapped) / 2

    @property
    def leaning(self) -> float:
        """To the answer that stands first, whichever it is; positive towards A."""
        return (self.in_order - self.swapped) / 2

    @property
    def probability(self) -> float:
        return 1 / (1 + math.exp(-self.log_odds)) if self.log_odds > -700 else 0.0

    def fault(self, min_margin: float, agreement: bool) -> str | None:
        """Why the pair is dropped, or None."""
        if agreement and self.in_order * self.swapped <= 0:
            return "the orders disagree"
        if self.log_odds == 0 or abs(self.log_odds) < min_margin:
            return "the margin is below min_margin"
        return None


def preference(in_order: Sequence[float], swapped: Sequence[float]) -> Preference:
    """From the log-probabilities of (A, B) with the first answer as A, and with the second answer as A."""
    return Preference(float(in_order[0] - in_order[1]), float(swapped[1] - swapped[0]))


class Judge:
    """Asks a model which of two answers it prefers. Raises ConfigError for a bad constitution."""

    def __init__(self, spec: JudgeSpec, judging: LoadedModel, rows: int, seed: int):
        self._spec, self._seed = spec, seed
        self._principles = read_constitution(spec.constitution)
        self._scorer = OptionScorer(judging, ("A", "B"), spec.seq_len, rows)

    def preferred(self, contests: Sequence[tuple[Messages, tuple[str, str]]], first: int) -> list[int | None]:
        """0 or 1, the better answer of each; None: it can't be told. `first` numbers them, for the principles."""
        spec, numbers = self._spec, range(first, first + len(contests))
        drawn = [draw(self._principles, self._seed, i, 0).text for i in numbers]
        full = [
            Contest(messages, principle, answers)
            for principle, (messages, answers) in zip(drawn, contests, strict=True)
        ]
        found: list[int | None] = []
        for both in asked_in_both_orders(self._scorer.logprobs, full, spec.template):
            told = preference(*both.tolist())
            unclear = np.isnan(both).any() or told.fault(spec.min_margin, spec.agreement) is not None
            found.append(None if unclear else int(told.log_odds < 0))
        return found


def asked_in_both_orders(score: Score, contests: Sequence[Contest], template: str) -> np.ndarray:
    """[N, 2, 2] nats: of "A" and "B", with the first answer as A and as B; NaN for a question that is too long."""
    asked = [_question(template, contest, order) for contest in contests for order in ((0, 1), (1, 0))]
    return score(asked).reshape(len(contests), 2, 2)


def judge(config: JudgeConfig, workdir: Path) -> dict[str, Any]:
    """Writes pairs and dataset; returns the report.

    Raises:
      ConfigError: no model, prompts or constitution, a bad one, or no pair that was kept.
    """
    if not config.init_from:
        raise ConfigError("give config.init_from: the model that answers.")
    principles = read_constitution(config.constitution)
    prompts = read_prompts(config.prompts, config.max_prompts)
    prepare_compiler()
    policy = LoadedModel(config.init_from, config.run)
    judging = LoadedModel(config.judge, config.run) if config.judge else policy
    paths = dict.fromkeys(("init_from", "judge", "prompts", "constitution"))
    principle_texts = [principle.text for principle in principles]
    key = hash_of("judge", configs.to_dict(config) | paths, prompts, principle_texts, policy.key, judging.key)
    if is_current(workdir / "preferences", key):
        return json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    remove_leftovers(workdir)
    configs.save(config, workdir / "config.json")
    writer = Writer(policy, config.sampling)
    scorer = OptionScorer(judging, ("A", "B"), config.judge_seq_len, config.sampling.rows)
    make = lambda numbers: judged(writer.write, scorer.logprobs, prompts, numbers, principles, config)
    rows = list(in_shards(workdir / "shards", key, len(prompts), config.shard, make, "judge"))
    report = _report(rows)
    pairs = [_pair(row) for row in rows if row["dropped"] is None]
    atomic_write(workdir / JUDGED, lines(rows))
    atomic_write(workdir / PAIRS, lines(pairs))
    atomic_write(workdir / "report.json", json.dumps(report, indent=1) + "\n")
    if not pairs:
        raise ConfigError(f"no pair was kept: {report['dropped']}. {workdir / JUDGED} shows each of them.")
    records = (
        tuple(
            answer_record(pair["prompt"], pair[side], None, policy.tokenizer, f"pair {i}")
            for side in ("chosen", "rejected")
        )
        for i, pair in enumerate(pairs)
    )
    facts = {"key": key, "judge": report} | describe(policy.tokenizer)
    write_dataset(workdir / "preferences", records, "preference", facts)
    return report


def judged(
    write: Write,
    score: Score,
    prompts: Sequence[Messages],
    numbers: Iterable[int],
    principles: tuple[Principle, ...],
    config: JudgeConfig,
) -> list[Row]:
    """Both answers to the prompts with these numbers, and what the judge says of them in both orders."""
    numbers = list(numbers)
    twice = [i for i in numbers for _ in range(2)]
    seeds = [seed_of(config.seed, i, place % 2) for place, i in enumerate(twice)]
    written = write([prompts[i] for i in twice], seeds)
    rows = []
    for i, answers in zip(numbers, zip(written[::2], written[1::2], strict=True), strict=True):
        faults = [f"an answer {answer.fault}" for answer in answers if answer.fault is not None]
        same = "the answers are the same" if answers[0].text == answers[1].text else None
        rows.append(
            {
                "prompt": i,
                "messages": list(prompts[i]),
                "answers": [answer.text for answer in answers],
                "principle": draw(principles, config.seed, i, 0).text,
                "logprobs": None,
                "dropped": faults[0] if faults else same,
            }
        )
    going = [row for row in rows if row["dropped"] is None]
    contests = [Contest(row["messages"], row["principle"], tuple(row["answers"])) for row in going]
    for row, both in zip(going, asked_in_both_orders(score, contests, config.template), strict=True):
        if np.isnan(both).any():
            row["dropped"] = "the question to the judge is longer than judge_seq_len"
            continue
        row["logprobs"] = both.tolist()
        row["dropped"] = preference(*both.tolist()).fault(config.min_margin, config.agreement)
    return rows


def _question(template: str, contest: Contest, order: tuple[int, int]) -> Messages:
    first, second = (contest.answers[i] for i in order)
    dialogue = shown(contest.messages)
    text = fill(template, prompt=dialogue, principle=contest.principle, first=first, second=second)
    return [{"role": "user", "content": text}]


def _pair(row: Row) -> dict[str, Any]:
    found = preference(*row["logprobs"])
    chosen, rejected = row["answers"] if found.log_odds > 0 else reversed(row["answers"])
    return {
        "prompt": row["messages"],
        "chosen": chosen,
        "rejected": rejected,
        "probability": max(found.probability, 1 - found.probability),
        "principle": row["principle"],
    }


def _report(rows: Sequence[Row]) -> dict[str, Any]:
    found = [preference(*row["logprobs"]) for row in rows if row["logprobs"] is not None]
    kept = [preference(*row["logprobs"]) for row in rows if row["dropped"] is None]
    certain = [max(item.probability, 1 - item.probability) for item in kept]
    return {
        "prompts": len(rows),
        "kept": len(kept),
        "mean_probability": float(np.mean(certain)) if kept else None,
        "mean_leaning": float(np.mean([item.leaning for item in found])) if found else None,
        "dropped": dropped_counts(rows),
    }


def main(config: JudgeConfig, workdir: Path) -> int:
    report = judge(config, workdir)
    print(f"{workdir / 'preferences'}: {report['kept']:,} pairs of {report['prompts']:,} prompts")
    print(f"  the judge's mean probability of the chosen answer: {report['mean_probability']:.1%}")
    print(f"  its leaning to the answer that stands first: {report['mean_leaning']:+.2f} nats")
    print_dropped(report)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(configs.run(main, JudgeConfig, description=DESCRIPTION))

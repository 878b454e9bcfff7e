"""`python -m rl.alignment.revise`: sample an answer, criticise it by a principle, revise it (constitutional AI).

    workdir/shards/KEY/00000.jsonl   finished prompts, in shards
    workdir/stages.jsonl             each prompt's answer, principles, critiques, revisions, and why it was dropped
    workdir/chat/                    the prompts with their last revisions, as a chat dataset to fine-tune on
    workdir/report.json              how many were kept and changed, and what was dropped for which reason

The same command, given again, goes on from what is finished. Bai et al. 2022, arXiv:2212.08073, section 3.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import configs
from configs import ConfigError, atomic_write, exits
from configs.files import remove_leftovers
from configs.typed import check_at_least
from data.shards import hash_of, is_current, write_dataset
from data.tokenize import answer_record, describe
from model.compilation import prepare_compiler
from rl.alignment.constitution import Principle, draw, read_constitution
from rl.alignment.shards import Row, dropped_counts, in_shards, lines, print_dropped, seed_of
from rl.alignment.writer import SamplingSpec, Writer, Written
from rl.loaded import LoadedModel, Messages
from rl.prompts import read_prompts
from train.config import Execution

DESCRIPTION = __doc__ or ""
Write = Callable[[Sequence[Messages], Sequence[int]], list[Written]]
STAGES = "stages.jsonl"


@dataclasses.dataclass(frozen=True)
class ReviseConfig:
    """Which model revises its answers to which prompts, by which principles."""

    init_from: str = ""  # run folder, checkpoint, Hugging Face folder or GGUF file
    prompts: str = ""  # a dataset of kind "prompt", or JSONL of prompts or dialogues
    constitution: str = ""  # JSON or Markdown: see rl/alignment/constitution.py
    rounds: int = 2  # of critique and revision, each by a principle drawn for it
    max_prompts: int = 0  # the first ones; 0: all
    shard: int = 64  # prompts that are written to disk together
    seed: int = 0
    sampling: SamplingSpec = SamplingSpec()
    run: Execution = Execution()

    def __post_init__(self):
        check_at_least(1, rounds=self.rounds, shard=self.shard)
        check_at_least(0, max_prompts=self.max_prompts, seed=self.seed)


def revise(config: ReviseConfig, workdir: Path) -> dict[str, Any]:
    """Writes stages and dataset; returns the report.

    Raises:
      ConfigError: no model, prompts or constitution, a bad one, or no revision that can be used.
    """
    if not config.init_from:
        raise ConfigError("give config.init_from: the model that answers, criticises and revises.")
    principles = read_constitution(config.constitution)
    prompts = read_prompts(config.prompts, config.max_prompts)
    prepare_compiler()
    loaded = LoadedModel(config.init_from, config.run)
    settings = configs.to_dict(config) | {"init_from": None, "prompts": None, "constitution": None}
    key = hash_of("revise", settings, prompts, [dataclasses.astuple(p) for p in principles], loaded.key)
    if is_current(workdir / "chat", key):
        return json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    remove_leftovers(workdir)
    configs.save(config, workdir / "config.json")
    writer = Writer(loaded, config.sampling)
    make = lambda numbers: revised(writer.write, prompts, numbers, principles, config.rounds, config.seed)
    rows = list(in_shards(workdir / "shards", key, len(prompts), config.shard, make, "revise"))
    report = _report(rows)
    atomic_write(workdir / STAGES, lines(rows))
    atomic_write(workdir / "report.json", json.dumps(report, indent=1) + "\n")
    kept = _going(rows)
    if not kept:
        raise ConfigError(
            f"no revision can be used: {report['dropped']}. {workdir / STAGES} shows each stage."
        )
    records = (
        answer_record(
            row["messages"], row["rounds"][-1]["revision"], None, loaded.tokenizer, f"prompt {row['prompt']}"
        )
        for row in kept
    )
    write_dataset(
        workdir / "chat", records, "chat", {"key": key, "revise": report} | describe(loaded.tokenizer)
    )
    return report


def revised(
    write: Write,
    prompts: Sequence[Messages],
    numbers: Iterable[int],
    principles: tuple[Principle, ...],
    rounds: int,
    seed: int,
) -> list[Row]:
    """The stages of the prompts with these numbers. A prompt is dropped at the first text with a fault."""
    rows = [
        {"prompt": i, "messages": list(prompts[i]), "answer": "", "rounds": [], "dropped": None}
        for i in numbers
    ]

    def stage(number: int, name: str, dialogues: Sequence[Messages]) -> Iterator[tuple[Row, str]]:
        going = _going(rows)
        seeds = [seed_of(seed, row["prompt"], number) for row in going]
        for row, written in zip(going, write(dialogues, seeds), strict=True):
            if written.fault is not None:
                row["dropped"] = f"{name} {written.fault}"
            yield row, written.text

    for row, text in stage(0, "the answer", [row["messages"] for row in rows]):
        row["answer"] = text
    for turn in range(rounds):
        drawn = {row["prompt"]: draw(principles, seed, row["prompt"], turn) for row in rows}
        dialogues = [_critique_dialogue(row, drawn[row["prompt"]]) for row in _going(rows)]
        for row, text in stage(2 * turn + 1, "a critique", dialogues):
            row["rounds"].append({"principle": drawn[row["prompt"]].text, "critique": text})
        dialogues = [_revision_dialogue(row, drawn[row["prompt"]]) for row in _going(rows)]
        for row, text in stage(2 * turn + 2, "a revision", dialogues):
            row["rounds"][-1]["revision"] = text
    return rows


def _going(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["dropped"] is None]


def _critique_dialogue(row: Row, principle: Principle) -> Messages:
    """The prompt, the last answer, and the request for a critique of it."""
    revisions = [made["revision"] for made in row["rounds"] if "revision" in made]
    said = revisions[-1] if revisions else row["answer"]
    return [*row["messages"], _says("assistant", said), _says("user", principle.critique_request)]


def _revision_dialogue(row: Row, principle: Principle) -> Messages:
    critique = _says("assistant", row["rounds"][-1]["critique"])
    return [*_critique_dialogue(row, principle), critique, _says("user", principle.revision_request)]


def _says(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _report(rows: Sequence[Row]) -> dict[str, Any]:
    kept = _going(rows)
    return {
        "prompts": len(rows),
        "kept": len(kept),
        "changed": sum(row["rounds"][-1]["revision"] != row["answer"] for row in kept),
        "dropped": dropped_counts(rows),
    }


def main(config: ReviseConfig, workdir: Path) -> int:
    report = revise(config, workdir)
    counts = f"{report['kept']:,} of {report['prompts']:,} prompts, {report['changed']:,} answers changed"
    print(f"{workdir / 'chat'}: {counts}")
    print_dropped(report)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(configs.run(main, ReviseConfig, description=DESCRIPTION))

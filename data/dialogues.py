"""`python -m data.dialogues`: problems with verifiers as dialogues to fine-tune on and preferences to learn from.

workdir/chat/{train,validation}          dialogues in the chat template, trained on what the assistant says
workdir/preferences/{train,validation}   pairs of a right and a wrong answer
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import configs
from data.load import load_tokenizer
from data.shards import hash_of, is_current, read_manifest
from data.tasks import INSTRUCTION, Split, TaskSpec, dialogue, generate, preference_pairs
from data.tokenize import fingerprint, write_chat_dataset, write_preference_dataset

DESCRIPTION = __doc__ or ""


@dataclasses.dataclass(frozen=True)
class DialogueConfig:
    """Which problems, how many, and how the answer is asked for."""

    tokenizer: str = ""  # tokenizer, model or run folder; its chat template writes the dialogues
    tasks: tuple[TaskSpec, ...] = (TaskSpec("chain_sum"),)
    instruction: str = INSTRUCTION  # follows each question
    dialogues: int = 2000  # different problems answered right
    pairs: int = 1000  # problems with a preferred and a rejected answer
    validation: int = 100  # problems of each kind held out
    seed: int = 0


def write_dialogues(config: DialogueConfig, workdir: Path) -> dict[str, dict[str, int]]:
    """Makes the datasets that are missing or out of date; returns {folder: {"records", "tokens"}}."""
    if not config.tokenizer:
        raise configs.ConfigError("give config.tokenizer: a tokenizer, model or run folder.")
    tokenizer = load_tokenizer(config.tokenizer)
    configs.save(config, workdir / "config.json")
    counts = {}
    sizes: dict[Split, tuple[int, int]] = {
        "train": (config.dialogues, config.pairs),
        "validation": (config.validation, config.validation),
    }
    for split, (dialogues, pairs) in sizes.items():
        key = hash_of("dialogues", configs.to_dict(config), fingerprint(tokenizer), split)
        facts = {"key": key, "sources": [{"name": "reasoning-gym", "licence": "Apache-2.0"}]}
        chat, preferences = workdir / "chat" / split, workdir / "preferences" / split
        if not is_current(chat, key):
            problems = generate(config.tasks, split, dialogues, config.seed)
            write_chat_dataset((dialogue(p, config.instruction) for p in problems), tokenizer, chat, facts)
        if not is_current(preferences, key):
            problems = generate(config.tasks, split, pairs, config.seed + 1)
            write_preference_dataset(
                preference_pairs(problems, config.instruction), tokenizer, preferences, facts
            )
        for folder in (chat, preferences):
            manifest = read_manifest(folder)
            counts[str(folder.relative_to(workdir))] = {k: manifest[k] for k in ("records", "tokens")}
    return counts


def main(config: DialogueConfig, workdir: Path) -> int:
    for folder, count in write_dialogues(config, workdir).items():
        print(f"{workdir / folder}: {count['records']:,} records, {count['tokens']:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(configs.run(main, DialogueConfig, description=DESCRIPTION))

"""A policy that answers in the asked format, tasks that it can learn, and configs of runs with them."""

import dataclasses
import json

import numpy as np
import pytest

import configs
import data
from data.tasks import TaskSpec, generate
from rl.config import RLConfig
from rl.rounds import RoundsConfig
from train.config import TrainConfig
from train.trainer import train

COUNTING = {"min_words": 1, "max_words": 1}


def fine_tuned(root, dialogues, steps, more_texts=()):
    """A toy that was trained on these dialogues alone."""
    texts = [m["content"] for d in dialogues * 20 for m in d]
    tokenizer = data.train_tokenizer("bpe", [*texts, *more_texts], 280, digits=1)
    tokenizer.save(root / "tokenizer")
    data.write_chat_dataset(dialogues, tokenizer, root / "chat")
    config = {
        "tokenizer": str(root / "tokenizer"),
        "steps": steps,
        "model": {
            "width": 32,
            "layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 16,
            "ffn_width": 64,
        },
        "data": {"mixture": {str(root / "chat"): 1.0}, "seq_len": 120, "batch_size": 16},
        "optimizer": {"peak_lr": 1e-2},
        "schedule": {"warmup_steps": 5},
        "mesh": {"data": 8},
    }
    train(configs.build(TrainConfig, configs.overlay(TrainConfig, config)), root / "sft")
    return root / "sft"


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """A policy that answers in the asked format, with a number from 1 to 5 drawn at random."""
    problems = generate([TaskSpec("letter_counting", COUNTING)], "train", 150, 0)
    drawn = np.random.default_rng(0).integers(1, 6, len(problems))
    problems = [dataclasses.replace(p, answer=str(n)) for p, n in zip(problems, drawn)]
    dialogues = [data.tasks.dialogue(p, "") for p in problems]
    return fine_tuned(tmp_path_factory.mktemp("policy"), dialogues, 60)


def make_config(policy, **changes):
    config = {
        "init_from": str(policy),
        "tasks": [
            {
                "name": "letter_counting",
                "config": COUNTING,
            }
        ],
        "instruction": "",
        "problems": 100,
        "evaluate_problems": 10,
        "steps": 24,
        "rollout": {"prompts": 8, "group": 8, "max_new_tokens": 24, "seq_len": 120},
        "optimizer": {"peak_lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 5, "keep": 2},
    } | changes
    return configs.build(RLConfig, configs.overlay(RLConfig, config))


def rounds_config(policy, train, **changes):
    """Rounds on `tasks`; `train` are keys of the fine-tuning in them."""
    config = {
        "init_from": str(policy),
        "tasks": [{"name": "letter_counting", "config": COUNTING}],
        "instruction": "",
        "problems": 40,
        "evaluate_problems": 20,
        "rollout": {"prompts": 20, "group": 8, "max_new_tokens": 24, "seq_len": 120},
    } | changes
    tuning = {
        "steps": 15,
        "data": {"seq_len": 120, "batch_size": 16},
        "schedule": {"warmup_steps": 2},
        "mesh": {"data": 8},
    }
    config["train"] = tuning | train | {"optimizer": {"weight_decay": 0.0} | train.get("optimizer", {})}
    return configs.build(RoundsConfig, configs.overlay(RoundsConfig, config))


def rows_of(workdir, split="train"):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]

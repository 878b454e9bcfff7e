"""Rounds of sampling and fine-tuning: the best answers, pairs, what is known; cut off and given again."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import configs
import data
from data.tasks import TaskSpec, generate
from rl import rounds
from rl.rollout import Rollout
from rl.rounds import RoundsConfig
from train.algorithms import DPO
from train.config import TrainConfig

from .conftest import COUNTING, fine_tuned, rounds_config
from .test_rl import trajectories


def test_rounds_of_the_best_of_n_answers_raise_the_accuracy_and_go_on_where_they_were_cut_off(
    policy, tmp_path
):
    config = rounds_config(policy, {"optimizer": {"peak_lr": 3e-3}}, rounds=2)
    final = rounds.run(config, tmp_path)
    assert final["accuracy"] > final["accuracy_at_start"] + 0.2 and final["accuracy"] > 0.6
    rows = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3] and rows[0]["sampled"] == 320
    assert rows[1]["solved"] > rows[0]["solved"]
    tokenizer = data.load_tokenizer(policy)
    for record in data.open_dataset(tmp_path / "round-1" / "answers"):
        answer = tokenizer.decode(record.tokens[record.mask].tolist())
        assert answer.rstrip().endswith("</answer>") or "</answer>" in answer  # and it was right
    before = (tmp_path / "round-1" / "answers" / "manifest.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "round-2" / "train")  # cut off in the second round's training
    (tmp_path / "rounds.jsonl").write_text(json.dumps(rows[0]) + "\n")  # and before its row was written
    assert rounds.run(config, tmp_path)["accuracy"] == final["accuracy"]
    assert (tmp_path / "round-1" / "answers" / "manifest.json").stat().st_mtime_ns == before
    assert [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()] == rows
    newest = shutil.copytree(tmp_path / "round-2" / "train", tmp_path / "moved")
    shutil.rmtree(tmp_path / "round-1" / "train")
    shutil.copytree(
        newest, tmp_path / "round-1" / "train"
    )  # the second round's policy has become another one
    with pytest.raises(configs.ConfigError, match="round-2/train has learned from answers of another policy"):
        rounds.run(config, tmp_path)
    assert [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()] == rows
    with pytest.raises(configs.ConfigError, match="holds rounds of another config"):
        rounds.run(dataclasses.replace(config, keep=2), tmp_path)
    hopeless = dataclasses.replace(config, min_reward=5.0)
    with pytest.raises(configs.ConfigError, match="none of 320 answers earned enough"):
        rounds.run(hopeless, tmp_path / "hopeless")
    assert not (tmp_path / "hopeless" / "round-1" / "answers").exists()


def test_the_best_answers_are_kept_once_each_best_first():
    group = [
        Rollout(None, text, dataclasses.replace(trajectories(1)[0], stop_reason=stop))
        for text, stop in (("a", "stop"), ("b", "stop"), ("b", "stop"), ("c", "length"), ("d", "stop"))
    ]
    config = RoundsConfig(keep=2, min_reward=0.5)
    kept = rounds.best(group, np.array([0.6, 2.0, 2.0, 3.0, 0.4]), config)
    assert [rollout.text for rollout in kept] == ["b", "a"]
    pairs = RoundsConfig(learn_from="pairs", min_gap=1.0, train=TrainConfig(algorithm=DPO()))
    better, worse = rounds.pair(group, np.array([0.6, 2.0, 2.0, 3.0, 0.4]), pairs)
    assert (better.text, worse.text) == ("b", "d")  # "c" was cut short
    assert rounds.pair(group, np.array([0.6, 1.0, 1.0, 3.0, 0.4]), pairs) is None
    with pytest.raises(ValueError, match="Give train.algorithm.kind=DPO"):
        RoundsConfig(learn_from="pairs")


def test_iterative_dpo_on_pairs_that_verifiers_rank_raises_the_accuracy(policy, tmp_path):
    train = {"algorithm": {"kind": "DPO"}, "optimizer": {"peak_lr": 1e-3}}
    final = rounds.run(rounds_config(policy, train, learn_from="pairs"), tmp_path)
    assert final["accuracy"] > final["accuracy_at_start"] + 0.2
    assert data.open_dataset(tmp_path / "round-1" / "answers").kind == "preference"


SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
TWO_TASKS = [{"name": "letter_counting", "config": COUNTING}, {"name": "chain_sum", "config": SUMS}]


@pytest.fixture(scope="module")
def half_knowing(tmp_path_factory):
    """It has seen right answers to one task, and numbers drawn at random to the other."""
    problems = generate([TaskSpec(**task) for task in TWO_TASKS], "train", 300, 0)
    rng = np.random.default_rng(0)
    drawn = lambda p: dataclasses.replace(p, answer=str(rng.integers(20, 200)))
    problems = [p if p.task == "letter_counting" else drawn(p) for p in problems]
    dialogues = [data.tasks.dialogue(p, "") for p in problems]
    return fine_tuned(tmp_path_factory.mktemp("half_knowing"), dialogues, 150, ["I don't know."] * 50)


def test_a_model_that_learns_to_abstain_answers_less_and_is_right_more_often(half_knowing, tmp_path):
    train = {"steps": 60, "optimizer": {"peak_lr": 3e-3}, "schedule": {"warmup_steps": 5}}
    config = rounds_config(
        half_knowing,
        train,
        tasks=TWO_TASKS,
        learn_from="knowledge",
        rounds=1,
        problems=100,
        evaluate_problems=60,
        rollout={"prompts": 50, "group": 8, "max_new_tokens": 24, "seq_len": 120},
    )
    final = rounds.run(config, tmp_path)
    assert 0.2 < final["coverage"] < 0.8
    # answering as many problems at random would be right as often as before
    assert final["precision"] > final["accuracy_at_start"] + 0.2

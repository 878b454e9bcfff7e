"""Learning without verifiers, by reward models, judges and teachers; labels of steps from rollouts."""

from __future__ import annotations

import collections
import dataclasses
import json
import types

import jax
import numpy as np
import pytest

import configs
import data
import model
from data.rows import row_of
from data.shards import write_dataset
from data.tasks import Problem, TaskSpec, generate, prompt
from model.formats.checkpoint import save_native
from rl import rounds, shepherd
from rl.config import RLConfig, RolloutSpec
from rl.loop import run
from rl.problems import held_out_problems, training_problems
from rl.rollout import Rollout
from rl.rounds import RoundsConfig
from rl.scoring import RewardScorer
from rl.trajectory import Trajectory, batch_of
from train.algorithms.rewards import at_end
from train.checkpoints import tokenizer_files
from train.config import Execution, TrainConfig
from train.models import Model
from train.trainer import train

from .conftest import COUNTING, make_config, rounds_config, rows_of

ASKED = [
    problem.question
    for split, count in (("train", 70), ("validation", 10))
    for problem in generate([TaskSpec("letter_counting", COUNTING)], split, count, 1)
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Prompts without answers, as JSONL."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ASKED))
    return path


@pytest.fixture(scope="module")
def teacher(policy, tmp_path_factory):
    """It answers 3 to everything, with the tokenizer of the policy."""
    root = tmp_path_factory.mktemp("teacher")
    tokenizer = data.load_tokenizer(policy)
    dialogues = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "<answer>3</answer>"}]
        for text in ASKED[:60]
    ]
    data.write_chat_dataset(dialogues, tokenizer, root / "chat")
    config = {
        "init_from": str(policy),
        "steps": 40,
        "data": {"mixture": {str(root / "chat"): 1.0}, "seq_len": 120, "batch_size": 16},
        "optimizer": {"peak_lr": 5e-3},
        "schedule": {"warmup_steps": 5},
        "mesh": {"data": 8},
    }
    train(configs.build(TrainConfig, configs.overlay(TrainConfig, config)), root / "run")
    return root / "run"


def test_prompts_of_a_file_are_split_by_their_text_and_rounds_take_others(questions):
    spec = dataclasses.make_dataclass("Spec", ["tasks", "prompts", "problems", "evaluate_problems", "seed"])
    whole = spec((), str(questions), 1000, 100, 0)
    train_, held = training_problems(whole), held_out_problems(whole)
    texts = [p.question for p in [*train_, *held]]
    assert len(set(texts)) == len(texts) == 80 and 2 <= len(held) <= 20
    assert prompt(train_[0], "never seen") == [{"role": "user", "content": train_[0].question}]
    few = dataclasses.replace(whole, problems=20)
    first, second, again = (training_problems(few, part) for part in (0, 1, 0))
    assert first == again and not {p.id for p in first} & {p.id for p in second}


def test_a_student_learns_on_its_own_answers_what_the_teacher_would_say_and_resumes(
    policy, teacher, questions, tmp_path
):
    config = make_config(
        policy,
        prompts=str(questions),
        algorithm={"kind": "OnPolicyDistillation", "teacher": str(teacher)},
        steps=12,
    )
    final = run(config, tmp_path / "whole")
    rows = rows_of(tmp_path / "whole")
    assert max(row["mismatch_kl"] for row in rows) < 1e-5
    assert rows[-1]["divergence"] < 0.2 * rows[0]["divergence"]
    assert "correct" not in rows[0] and "accuracy" not in rows_of(tmp_path / "whole", "validation")[-1]
    samples = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    said = [row["completion"] for row in samples if row["step"] == 12]
    assert sum("<answer>3</answer>" in text for text in said) >= len(said) - 1
    run(config, tmp_path / "parts", stop_at=5)
    assert run(config, tmp_path / "parts")["divergence"] == final["divergence"]


@pytest.fixture(scope="module")
def rewarding(policy, tmp_path_factory):
    """A reward model that was shown that 3 is the better answer."""
    root = tmp_path_factory.mktemp("reward")
    tokenizer = data.load_tokenizer(policy)
    pairs = []
    for i, text in enumerate(ASKED[:60]):
        asked = [{"role": "user", "content": text}]
        other = str([1, 2, 4, 5][i % 4])
        sides = ("3", other)
        pairs.append(
            tuple(
                data.tokenize.answer_record(asked, f"<answer>{n}</answer>", None, tokenizer, "")
                for n in sides
            )
        )
    write_dataset(root / "pairs", pairs, "preference", data.tokenize.describe(tokenizer))
    config = {
        "init_from": str(policy),
        "algorithm": {"kind": "RewardModel"},
        "steps": 150,
        "data": {"mixture": {str(root / "pairs"): 1.0}, "seq_len": 120, "batch_size": 16},
        "optimizer": {"peak_lr": 5e-3},
        "schedule": {"warmup_steps": 5},
        "mesh": {"data": 8},
    }
    assert (
        train(configs.build(TrainConfig, configs.overlay(TrainConfig, config)), root / "run")["accuracy"]
        > 0.9
    )
    return root / "run"


def test_a_reward_is_read_at_the_same_token_of_a_pair_and_of_a_rollout(rewarding):
    tokenizer, run_ = data.load_tokenizer(rewarding), Execution()
    cfg, params = model.load(rewarding)
    asked = [{"role": "user", "content": ASKED[-1]}]
    record = data.tokenize.answer_record(asked, "<answer>3</answer>", None, tokenizer, "")
    row = {name: x[None] for name, x in row_of(record, 120, 0).items()}
    wanted = at_end(Model(cfg, params, train=False).read_head(row, "reward"), row)
    ids = record.tokens[: np.flatnonzero(record.mask)[-1] + 1]  # as the engine ends: with the stop token
    mask = record.mask[: len(ids)]
    rollout = Trajectory(ids, np.zeros(len(ids), np.float32), mask, {}, 0, "stop")
    found = RewardScorer.load(str(rewarding), run_, 120).scores([rollout])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    batch = batch_of([rollout], np.zeros(1, np.float32), 120, 1)
    np.testing.assert_allclose(
        at_end(Model(cfg, params).read_head(batch, "reward"), batch), wanted, rtol=1e-5
    )


def test_ppo_on_prompts_raises_the_reward_models_score_and_its_value_begins_as_that(
    policy, rewarding, questions, tmp_path
):
    from train.learner import Learner, make_plan
    from train.mesh import make_mesh
    from train.start import policy_start

    algorithm = {"kind": "PPO", "reward": str(rewarding), "kl_weight": 0.01, "minibatches": 2, "epochs": 2}
    config = make_config(
        policy, prompts=str(questions), algorithm=algorithm, steps=16, optimizer={"peak_lr": 2e-3}
    )
    tokenizer = data.load_tokenizer(policy)
    plan = make_plan(
        config,
        config.algorithm,
        policy_start(config, config.algorithm.roles()["policy"], tokenizer),
        make_mesh(config.mesh, jax.devices()[:1]),
    )
    learner = Learner(config, plan, tokenizer)
    value, reward = learner.state.params["value"], learner.frozen["reward"]
    assert np.abs(reward["reward_head"]).max() > 0
    np.testing.assert_array_equal(value["value_head"], reward["reward_head"])
    run(config, tmp_path)
    scores = [row["score"] for row in rows_of(tmp_path)]
    assert np.mean(scores[-4:]) > np.mean(scores[:4]) + 0.5
    held = [row["score"] for row in rows_of(tmp_path, "validation")]
    assert held[-1] > held[0] + 0.5


def test_prompts_without_anything_that_rewards_them_are_refused(questions):
    with pytest.raises(configs.ConfigError, match=r"OnPolicyDistillation with\n? ?config.algorithm.teacher"):
        configs.build(RLConfig, {"init_from": "x", "prompts": str(questions)})
    with pytest.raises(configs.ConfigError, match=r"give config.reward_model, or config.judge"):
        configs.build(RoundsConfig, {"init_from": "x", "prompts": str(questions)})
    with pytest.raises(configs.ConfigError, match="set learn_from=pairs"):
        configs.build(RoundsConfig, {"init_from": "x", "judge": {"constitution": "c.md"}})


class PrefersThree:
    """A judge whose log-odds say that an answer of 3 is better; the first of two others."""

    def __init__(self, *_):
        self.asked = []

    def logprobs(self, dialogues):
        found = []
        for (message,) in dialogues:
            first, second = message["content"].split("|")[-2:]
            self.asked.append((first, second))
            odds = 2.0 * ((">3<" in first) - (">3<" in second)) + 0.5  # it leans to the first
            found.append([-np.log1p(np.exp(-odds)), -np.log1p(np.exp(odds))])
        return np.array(found)


def test_online_dpo_on_pairs_that_a_judge_orders_makes_the_preferred_answer_likelier(
    policy, questions, tmp_path, monkeypatch
):
    constitution = tmp_path / "constitution.md"
    constitution.write_text("- Prefer three.\n")
    monkeypatch.setattr("rl.alignment.judge.OptionScorer", PrefersThree)
    template = "{prompt}|{principle}|{first}|{second}"
    config = rounds_config(
        policy,
        {"algorithm": {"kind": "DPO"}, "optimizer": {"peak_lr": 1e-3}},
        prompts=str(questions),
        learn_from="pairs",
        judge={"constitution": str(constitution), "template": template},
        rounds=1,
        problems=64,
        rollout={"prompts": 32, "group": 6, "max_new_tokens": 24, "seq_len": 120},
    )
    rounds.run(config, tmp_path / "run")
    tokenizer = data.load_tokenizer(policy)
    text = lambda record: tokenizer.decode(record.tokens[record.mask].tolist())
    pairs = [tuple(map(text, pair)) for pair in data.open_dataset(tmp_path / "run" / "round-1" / "answers")]
    assert len(pairs) > 5
    assert all(">3<" in chosen and ">3<" not in rejected for chosen, rejected in pairs)  # others are left out

    def share(source):
        engine, tokens = make_engine(source)
        asked = [tokenizer.apply_chat_template(prompt(p))[0] for p in training_problems(config)[:40]]
        outputs = engine.generate([tokens(ids, seed) for seed, ids in enumerate(asked)])
        return np.mean([">3<" in tokenizer.decode(out.tokens) for out in outputs])

    assert share(tmp_path / "run" / "round-1" / "train") > share(policy) + 0.3


def make_engine(source):
    from serve import Engine, Request, SamplingParams

    cfg, params = model.load(source)
    engine = Engine(cfg, params, data.load_tokenizer(source), max_rows=40, max_length=120)
    return engine, lambda ids, seed: Request(ids, SamplingParams(max_tokens=24, temperature=1.0, seed=seed))


class Scripted:
    """A sampler with one solution of three lines; completions are right by a table of the step that they begin with."""

    def __init__(self, tokenizer, right):
        self.tokenizer, self.right, self.asked = tokenizer, right, collections.Counter()

    def rollout(self, problem, text, correct):
        before = self.tokenizer.apply_chat_template(prompt(problem, ""))[0]
        ids = [*before, *self.tokenizer.encode(text), self.tokenizer.eos_ids[0]]
        mask = np.arange(len(ids)) >= len(before)
        zeros = np.zeros(len(ids), np.float32)
        trajectory = Trajectory(np.array(ids, np.int32), zeros, mask, {"correct": float(correct)}, 0, "stop")
        return Rollout(problem, text, trajectory)

    def sample(self, problems, spec, seed):
        return [[self.rollout(p, "one\n\n two\nthree", True)] * spec.group for p in problems]

    def complete(self, begun, spec, seeds):
        assert len(set(seeds)) == len(begun)
        found = []
        for problem, tokens in begun:
            text = self.tokenizer.decode(list(tokens))
            self.asked[text] += 1
            found.append(self.rollout(problem, text, self.asked[text] <= self.right[text.strip()]))
        return found


@pytest.mark.parametrize("labels", ["share", "any"])
def test_a_steps_label_is_the_share_of_right_completions(policy, labels):
    tokenizer = data.load_tokenizer(policy)
    problems = [Problem("p", "t", "q", "a")]
    spec = RolloutSpec(group=1)
    config = shepherd.ShepherdConfig(completions=4, rollout=spec, instruction="", labels=labels)
    sampler = Scripted(tokenizer, {"one": 3, "one\n\n two": 0})
    (row,) = shepherd.labelled(sampler, tokenizer, problems, range(1), config)
    assert row["completions"] == ["one", "two", "three"] and row["dropped"] is None
    assert row["labels"] == ([0.75, 0.0, 1.0] if labels == "share" else [1.0, 0.0, 1.0])
    assert sorted(sampler.asked.values()) == [4, 4]
    record, written = shepherd._record(row)
    up_to = [tokenizer.decode(record.tokens[: end + 1].tolist()) for end in np.flatnonzero(record.mask)]
    assert [text.rstrip()[-3:] for text in up_to] == ["one", "two", "ree"]
    assert written.dtype == np.float32


def test_steps_of_a_token_with_two_ends_are_told():
    tokenizer = types.SimpleNamespace(eos_ids=[9], bytes_of=lambda i: [b"a", b"\nb\nc", b"\n", b"d "][i])
    assert shepherd.step_ends([0, 1, 2, 3, 9], tokenizer) == [("a", 0), ("b", 1), ("c", 1), ("d", 3)]


def test_rollouts_of_a_model_become_a_dataset_that_a_process_reward_model_learns_from(
    policy, tmp_path, monkeypatch
):
    task = {"name": "letter_counting", "config": COUNTING}
    settings = {
        "init_from": str(policy),
        "tasks": [task],
        "instruction": "",
        "problems": 12,
        "completions": 2,
        "shard": 6,
        "rollout": {"group": 2, "max_new_tokens": 24, "seq_len": 120},
    }
    config = configs.build(shepherd.ShepherdConfig, configs.overlay(shepherd.ShepherdConfig, settings))
    whole = shepherd.labelled

    def cut(*args):
        if args[3].start:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(shepherd, "labelled", cut)
    with pytest.raises(KeyboardInterrupt):
        shepherd.label_steps(config, tmp_path / "labels")
    monkeypatch.setattr(shepherd, "labelled", whole)
    report = shepherd.label_steps(config, tmp_path / "labels")
    assert report["solutions"] == 24 and report["kept"] > 12
    again = shepherd.label_steps(config, tmp_path / "labels")
    assert again == report
    dataset = data.open_dataset(tmp_path / "labels" / "steps")
    assert len(dataset) == report["kept"] and dataset.kind == "steps"
    run_of = {
        "init_from": str(policy),
        "algorithm": {"kind": "ProcessRewardModel"},
        "steps": 2,
        "data": {"mixture": {str(tmp_path / "labels" / "steps"): 1.0}, "seq_len": 120, "batch_size": 8},
        "mesh": {"data": 8},
    }
    final = train(configs.build(TrainConfig, configs.overlay(TrainConfig, run_of)), tmp_path / "prm")
    assert np.isfinite(final["loss"])


def test_a_teacher_of_another_vocabulary_is_refused(policy, questions, tmp_path):
    cfg = model.decoder(64, 32, 2, 4, 2, 8, 48)
    tokenizer = data.train_tokenizer("bpe", ["other words"] * 4, 262)
    cfg = cfg.replace(vocab_size=tokenizer.vocab_size)
    save_native(tmp_path / "other", cfg, model.init(cfg, jax.random.key(0)), tokenizer_files(tokenizer))
    config = make_config(
        policy,
        prompts=str(questions),
        algorithm={"kind": "OnPolicyDistillation", "teacher": str(tmp_path / "other")},
    )
    with pytest.raises(configs.ConfigError, match="has another vocabulary"):
        run(config, tmp_path / "run")

"""RL: advantages and the objective are their formulas, sampler and trainer agree, a tiny policy learns and resumes."""

import dataclasses
import json
import os
import shutil
import time

import jax
import numpy as np
import pytest

import configs
import data
import model
from data.tasks import Problem, TaskSpec, generate
from model import decoder, init
from model.formats.checkpoint import save_native
from rl import loop, rounds
from rl.advantages import group_advantages, has_signal
from rl.config import RLConfig
from rl.loop import run
from rl.rollout import Rollout, problems_of_step
from rl.rounds import RoundsConfig
from rl.trajectory import Trajectory, batch_of
from rl.verifiers import Verdict, Verifiers, score_math
from train.algorithms import DPO, GRPO, objective_of
from train.checkpoints import tokenizer_files
from train.config import TrainConfig
from train.trainer import train

CFG = decoder(64, 32, 2, 4, 2, 8, 48)
COUNTING = {"min_words": 1, "max_words": 1}


def test_advantages_are_standardised_within_the_group():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]])
    got = group_advantages(rewards)
    np.testing.assert_allclose(got[0], np.array([1, -1, -1, 1]) * 0.5 / np.std(rewards[0], ddof=1), rtol=1e-4)
    np.testing.assert_array_equal(got[1], 0.0)
    np.testing.assert_allclose(got.mean(axis=1), 0.0, atol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, normalise_std=False)[2], [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_array_equal(has_signal(rewards), [True, False, True])
    np.testing.assert_array_equal(group_advantages(np.array([[3.0]])), 0.0)


def trajectories(count=4, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        before, after = rng.integers(2, 5), rng.integers(1, 6)
        tokens = rng.integers(0, 64, before + after).astype(np.int32)
        mask = np.arange(before + after) >= before
        made.append(
            Trajectory(
                tokens, np.where(mask, -rng.random(before + after), 0).astype(np.float32), mask, {}, 0, "stop"
            )
        )
    return made


def test_grpo_is_its_formula_token_by_token():
    params, made = init(CFG, jax.random.key(0)), trajectories()
    advantages = np.array([1.0, -2.0, 0.5, -1.0], np.float32)
    objective = objective_of(GRPO(temperature=0.7, clip_low=0.1, clip_high=0.3), CFG)
    loss, metrics = objective(params, batch_of(made, advantages, 12, 5))
    total = weight = kl = 0.0
    for t, a in zip(made, advantages):
        logits = np.asarray(model.apply(CFG, params, t.tokens[None]).logits[0], np.float64) / 0.7
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i in np.flatnonzero(t.mask):
            log_ratio = logprobs[i - 1, t.tokens[i]] - t.logprobs[i]
            ratio = np.exp(log_ratio)
            total -= min(ratio * a, np.clip(ratio, 0.9, 1.3) * a)
            kl += ratio - 1 - log_ratio
            weight += 1
    assert float(loss.weight) == weight
    assert float(loss.total) == pytest.approx(total, rel=1e-4)
    assert float(metrics["mismatch_kl"].total) == pytest.approx(kl, rel=1e-3)


def test_a_batch_refuses_what_does_not_fit():
    made = trajectories()
    with pytest.raises(ValueError, match="holds 3"):
        batch_of(made, np.zeros(4), 2, 4)
    with pytest.raises(ValueError, match="do not fit into 3 rows"):
        batch_of(made, np.zeros(4), 12, 3)


def test_problems_come_in_shuffled_epochs():
    problems = list(range(10))
    steps = [problems_of_step(problems, s, 4, seed=3) for s in range(5)]
    flat = [p for step in steps for p in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == problems
    assert flat[:10] != flat[10:]
    assert steps[2] == problems_of_step(problems, 2, 4, seed=3)


def slow_scorer(problem, answer):
    if answer == "hang":
        time.sleep(60)
    if answer == "die":
        os._exit(1)
    if answer == "raise":
        raise RuntimeError("a parser failed")
    return 1.0 if answer == problem.answer else 0.0


def test_a_verifier_that_hangs_dies_or_raises_scores_zero_and_the_others_are_kept():
    problem = Problem("p", "t", "q", "yes")
    answers = ["yes", "hang", "no", "die", "yes", None, "raise", "hang", "yes"]
    with Verifiers(slow_scorer, workers=2, timeout=3.0) as verifiers:
        verdicts = verifiers.score([problem] * len(answers), answers)
    assert [v.value for v in verdicts] == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert [v.timed_out for v in verdicts] == [a == "hang" for a in answers]


def test_math_is_compared_as_mathematics_and_a_bomb_is_killed():
    problems = [Problem("p", "t", "q", gold) for gold in ("1/2", "\\frac{3}{4}", "7", "7")]
    answers = ["0.5", "0.75", "8", "2003^{2002^{2001}}"]
    with Verifiers(score_math, timeout=8.0) as verifiers:
        assert [v.value for v in verifiers.score(problems, answers)] == [1, 1, 0, 0]


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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(make_config(policy), workdir)


def rows_of(workdir, split="train"):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def test_sampler_and_trainer_agree_at_every_step(whole):
    rows = rows_of(whole[0])
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert max(row["mismatch_kl"] for row in rows) < 1e-5
    assert all(row["groups_dropped"] == 8 * (1 - row["groups_with_signal"]) for row in rows)


def test_reward_goes_up(whole):
    # The answers it was shown were drawn at random; the verifier knows that most letters stand once in a word.
    rewards = [row["reward"] for row in rows_of(whole[0])]
    assert np.mean(rewards[-6:]) > np.mean(rewards[:6]) + 0.15


def test_rl_resumes_between_steps_bit_for_bit(policy, whole, tmp_path):
    run(make_config(policy), tmp_path, stop_at=7)
    final = run(make_config(policy), tmp_path)
    assert final["step"] == 24
    ours, theirs = (jax.tree.leaves(model.load(path)[1]) for path in (tmp_path, whole[0]))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_without_a_policy_or_with_too_long_prompts_says_so(policy, tmp_path):
    with pytest.raises(ValueError, match="give config.init_from"):
        run(configs.build(RLConfig, configs.overlay(RLConfig, {})), tmp_path)
    rollout = {"prompts": 8, "group": 8, "max_new_tokens": 119, "seq_len": 120}
    with pytest.raises(ValueError, match="Raise seq_len to"):
        run(make_config(policy, rollout=rollout), tmp_path / "long")


def test_a_native_save_carries_its_tokenizer(policy, tmp_path):
    cfg, params = model.load(policy)
    tokenizer = data.load_tokenizer(policy)
    save_native(tmp_path / "copy", cfg, params, tokenizer_files(tokenizer))
    assert data.load_tokenizer(tmp_path / "copy").encode("7 + 5") == tokenizer.encode("7 + 5")


class NoSignal(Verifiers):
    """Every answer earns the same."""

    def score(self, problems, answers):
        return [Verdict(0.0)] * len(answers)


def test_a_step_without_signal_changes_nothing_and_still_says_how_far_sampler_and_trainer_are(
    policy, whole, tmp_path, monkeypatch
):
    """The run goes on from steps that have left momentum in the optimizer."""
    shutil.copytree(whole[0], tmp_path / "run")
    config = make_config(policy, steps=26, reward={"format_weight": 0.0}, algorithm={"minibatches": 2})
    monkeypatch.setattr(loop, "Verifiers", NoSignal)
    run(config, tmp_path / "run")
    before, after = (jax.tree.leaves(model.load(path)[1]) for path in (whole[0], tmp_path / "run"))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    rows = rows_of(tmp_path / "run")[-2:]
    assert [row["groups_with_signal"] for row in rows] == [0, 0] and all(row["skipped"] == 0 for row in rows)
    assert all(abs(row["mismatch_kl"]) < 1e-5 for row in rows)


@pytest.mark.parametrize("verifiers", [Verifiers, NoSignal])
def test_a_sampler_that_disagrees_with_the_trainer_ends_the_run(policy, tmp_path, monkeypatch, verifiers):
    """Here its log-probabilities are of another temperature. It is seen where nothing is learned, too."""
    monkeypatch.setattr(loop, "Verifiers", verifiers)
    sample = loop.Sampler.sample

    def off(self, problems, spec, seed):
        groups = sample(self, problems, spec, seed)
        for rollout in [r for group in groups for r in group]:
            rollout.trajectory.logprobs[:] *= 1.5
        return groups

    monkeypatch.setattr(loop.Sampler, "sample", off)
    with pytest.raises(
        loop.SamplerMismatch, match=r"KL\(sampler \|\| trainer\) is .* above config.max_mismatch_kl"
    ):
        run(make_config(policy, reward={"format_weight": 0.0}), tmp_path)


def test_a_run_that_has_begun_needs_its_first_model_no_more(policy, whole, tmp_path):
    run(make_config(shutil.copytree(policy, tmp_path / "first")), tmp_path / "run", stop_at=2)
    shutil.rmtree(tmp_path / "first")
    config = make_config(tmp_path / "first", steps=3)
    assert run(config, tmp_path / "run")["step"] == 3


def test_dropped_answers_count_as_sampled_and_not_as_trained_on():
    cfg = model.decoder(64, 32, 2, 4, 2, 8, 48)
    kept, dropped = (loop._Rate(cfg, 16, 1) for _ in range(2))
    for rate, trained in ((kept, 100), (dropped, 50)):
        rate.add(1.0, 100, 100)  # the first step compiles
        rate.add(1e6, 100, trained)
    assert kept.overall()["trained_tokens_per_second"] == 2 * dropped.overall()["trained_tokens_per_second"]
    assert kept.overall()["tokens_per_second"] == dropped.overall()["tokens_per_second"]
    # sampling is one part, training three
    assert dropped.overall()["mfu"] / kept.overall()["mfu"] == pytest.approx((1 + 1.5) / 4)


def ppo_config(policy, **changes):
    algorithm = {"kind": "PPO", "kl_weight": 0.01, "minibatches": 2, "epochs": 2} | changes
    return make_config(policy, algorithm=algorithm, steps=16, optimizer={"peak_lr": 2e-3})


def test_ppo_raises_the_reward_and_resumes_bit_for_bit(policy, tmp_path):
    run(ppo_config(policy, kl_target=1.0, kl_horizon=500), tmp_path / "whole")
    rows = rows_of(tmp_path / "whole")
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
    assert rows[-1]["value_loss"] < rows[0]["value_loss"] and rows[-1]["kl"] > 0
    assert len({row["kl_weight"] for row in rows}) == 16  # it follows its target
    assert max(row["mismatch_kl"] for row in rows) < 1e-5
    run(ppo_config(policy, kl_target=1.0, kl_horizon=500), tmp_path / "parts", stop_at=7)
    final = run(ppo_config(policy, kl_target=1.0, kl_horizon=500), tmp_path / "parts")
    assert final["step"] == 16 and final["reward"] == rows[-1]["reward"]
    ours, theirs = (jax.tree.leaves(model.load(tmp_path / name)[1]) for name in ("whole", "parts"))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_reward_model_without_its_head_is_refused(policy, tmp_path):
    with pytest.raises(
        configs.ConfigError, match=r"algorithm.reward=.* has no head 'reward' \(its heads: none\)"
    ):
        run(ppo_config(policy, reward=str(policy)), tmp_path)


def test_rounds_of_the_best_of_n_answers_raise_the_accuracy_and_go_on_where_they_were_cut_off(
    policy, tmp_path
):
    config = {
        "init_from": str(policy),
        "tasks": [{"name": "letter_counting", "config": COUNTING}],
        "instruction": "",
        "rounds": 2,
        "problems": 40,
        "evaluate_problems": 20,
        "rollout": {"prompts": 20, "group": 8, "max_new_tokens": 24, "seq_len": 120},
        "train": {
            "steps": 15,
            "data": {"seq_len": 120, "batch_size": 16},
            "optimizer": {"peak_lr": 3e-3, "weight_decay": 0.0},
            "schedule": {"warmup_steps": 2},
            "mesh": {"data": 8},
        },
    }
    config = configs.build(RoundsConfig, configs.overlay(RoundsConfig, config))
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
    assert rounds.run(config, tmp_path)["accuracy"] == final["accuracy"]
    assert (tmp_path / "round-1" / "answers" / "manifest.json").stat().st_mtime_ns == before
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
    config = {
        "init_from": str(policy),
        "tasks": [{"name": "letter_counting", "config": COUNTING}],
        "instruction": "",
        "learn_from": "pairs",
        "problems": 40,
        "evaluate_problems": 20,
        "rollout": {"prompts": 20, "group": 8, "max_new_tokens": 24, "seq_len": 120},
        "train": {
            "algorithm": {"kind": "DPO"},
            "steps": 15,
            "data": {"seq_len": 120, "batch_size": 16},
            "optimizer": {"peak_lr": 1e-3, "weight_decay": 0.0},
            "schedule": {"warmup_steps": 2},
            "mesh": {"data": 8},
        },
    }
    final = rounds.run(configs.build(RoundsConfig, configs.overlay(RoundsConfig, config)), tmp_path)
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
    config = {
        "init_from": str(half_knowing),
        "tasks": TWO_TASKS,
        "instruction": "",
        "learn_from": "knowledge",
        "rounds": 1,
        "problems": 100,
        "evaluate_problems": 60,
        "rollout": {"prompts": 50, "group": 8, "max_new_tokens": 24, "seq_len": 120},
        "train": {
            "steps": 60,
            "data": {"seq_len": 120, "batch_size": 16},
            "optimizer": {"peak_lr": 3e-3, "weight_decay": 0.0},
            "schedule": {"warmup_steps": 5},
            "mesh": {"data": 8},
        },
    }
    final = rounds.run(configs.build(RoundsConfig, configs.overlay(RoundsConfig, config)), tmp_path)
    assert 0.2 < final["coverage"] < 0.8
    # answering as many problems at random would be right as often as before
    assert final["precision"] > final["accuracy_at_start"] + 0.2


def test_a_run_that_has_begun_goes_on_without_naming_its_first_model_unless_a_reference_needs_it(
    policy, tmp_path
):
    run(make_config(policy, steps=2), tmp_path / "grpo", stop_at=1)
    assert (
        run(dataclasses.replace(make_config(policy, steps=2), init_from=None), tmp_path / "grpo")["step"] == 2
    )
    run(ppo_config(policy), tmp_path / "ppo", stop_at=1)
    with pytest.raises(
        configs.ConfigError, match="give config.init_from: the reference is the policy as it was"
    ):
        run(dataclasses.replace(ppo_config(policy), init_from=None), tmp_path / "ppo")

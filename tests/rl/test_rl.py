"""RL: advantages and the objective are their formulas, sampler and trainer agree, a tiny policy learns and resumes."""

import dataclasses
import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import configs
import data
import model
from configs.exits import Stopped
from configs.paths import complete_steps
from data.tasks import Problem
from model import decoder, init
from model.formats.checkpoint import save_native
from rl import loop
from rl.advantages import group_advantages, has_signal
from rl.config import RLConfig
from rl.loop import run
from rl.rollout import problems_of_step
from rl.trajectory import Trajectory, batch_of
from rl.verifiers import Verdict, Verifiers, score_math
from train.algorithms import GRPO, objective_of
from train.checkpoints import tokenizer_files

from .conftest import make_config, rows_of

CFG = decoder(64, 32, 2, 4, 2, 8, 48)


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
    with pytest.raises(ValueError, match="more than rollout.seq_len=2"):
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


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(make_config(policy), workdir)


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
    run(make_config(policy), tmp_path, stop_at=20)  # where the held-out problems were asked
    final = run(make_config(policy), tmp_path)
    assert final["step"] == 24
    assert rows_of(tmp_path, "validation") == rows_of(whole[0], "validation")
    run(make_config(policy), tmp_path)  # asks the held-out problems again, and says it once
    assert rows_of(tmp_path, "validation") == rows_of(whole[0], "validation")
    ours, theirs = (jax.tree.leaves(model.load(path)[1]) for path in (tmp_path, whole[0]))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("sent", "raised"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_rl_that_is_asked_to_stop_in_an_evaluation_saves_its_step(
    policy, tmp_path, monkeypatch, sent, raised
):
    evaluate = loop._Run._evaluate

    def interrupted(self, step):
        if step == 1:
            os.kill(os.getpid(), sent)
        return evaluate(self, step)

    monkeypatch.setattr(loop._Run, "_evaluate", interrupted)
    with pytest.raises(raised):
        run(make_config(policy, steps=2, evaluate_every=1), tmp_path)
    assert complete_steps(tmp_path / "checkpoints") == [1]


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


def test_a_step_begins_with_nothing_that_the_evaluation_before_it_left_in_the_engine(
    policy, tmp_path, monkeypatch
):
    """A run that goes on from there has not evaluated, and pages taken from a cache round otherwise."""
    asked, sample, greedy = [], loop.Sampler.sample, loop.Sampler.greedy

    def watched(method):
        def call(self, *args, **options):
            asked.append((method.__name__, self._engine.stats.pages_cached))
            return method(self, *args, **options)

        return call

    for method in (sample, greedy):
        monkeypatch.setattr(loop.Sampler, method.__name__, watched(method))
    run(make_config(policy, steps=2, evaluate_every=1), tmp_path)
    assert asked == [("greedy", 0), ("sample", 0)] * 2 + [("greedy", 0)]


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


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ({"rollout": {"temperature": 0}}, "config.rollout.temperature=0 has no log-probabilities"),
        ({"rollout": {"group": 1}}, "config.rollout.group=1: GRPO compares"),
        ({"algorithm": {"kind": "GRPO", "clip_low": -1}}, "clip_low=-1.0; wanted at least 0"),
        ({"algorithm": {"kind": "PPO", "dual_clip": 0.5}}, "dual_clip=0.5; wanted more than 1"),
        ({"algorithm": {"kind": "PPO", "gamma": 2}}, "gamma=2.0 and lam=0.95; wanted 0 to 1"),
        ({"algorithm": {"kind": "PPO", "temperature": 0}}, "temperature=0.0; wanted more than 0, or None"),
        ({"reward": {"timeout": 0}}, "timeout=0.0; wanted more than 0"),
    ],
)
def test_a_number_that_no_reinforcement_learning_can_use_is_refused(key, said):
    with pytest.raises(configs.ConfigError, match=re.escape(said)):
        configs.build(RLConfig, configs.overlay(RLConfig, key))

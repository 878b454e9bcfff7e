"""PPO: advantages are their definition, and a bandit ends at the closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import decoder
from tests.policy import adamw
from train.advantages import gae, whiten
from train.algorithms.ppo import PPO, VALUE, last_choice
from train.models import bind
from train.start import with_head
from train.step import make_train_step, new_state

from .test_experts import fresh, jit

CFG = decoder(8, 16, 1, 2, 1, 8, 16)


def test_gae_is_its_definition_and_skips_what_the_policy_did_not_write():
    rng = np.random.default_rng(0)
    mask = np.array(
        [[0, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]], np.float32
    )
    rewards, values = (rng.normal(size=mask.shape).astype(np.float32) * mask for _ in range(2))
    wanted = np.zeros_like(mask)
    for row in range(3):
        places = np.flatnonzero(mask[row])
        for i, t in enumerate(places):
            for j, u in enumerate(places[i:]):
                following = values[row, places[i + j + 1]] if i + j + 1 < len(places) else 0.0
                delta = rewards[row, u] + 0.9 * following - values[row, u]
                wanted[row, t] += (0.9 * 0.7) ** j * delta
    advantages, returns = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=0.9, lam=0.7)
    np.testing.assert_allclose(advantages, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, (wanted + values) * mask, rtol=1e-5, atol=1e-6)
    white = np.asarray(whiten(advantages, jnp.asarray(mask)))[mask > 0]
    assert white.mean() == pytest.approx(0, abs=1e-6) and white.std() == pytest.approx(1, rel=1e-4)
    np.testing.assert_array_equal(last_choice(jnp.asarray(mask)).sum(1), [1, 1, 0])
    assert last_choice(jnp.asarray(mask))[0, 6] == 1


@pytest.mark.parametrize("value", [0.1, 1000.1, -3e4 + 0.3])
def test_equal_advantages_are_white_at_zero(value):
    np.testing.assert_allclose(
        whiten(jnp.full((2, 7), value), jnp.ones((2, 7))), jnp.zeros((2, 7)), atol=1e-6
    )


def test_the_penalty_follows_its_target():
    ppo = PPO(kl_target=2.0, kl_horizon=100)
    assert ppo.next_kl_weight(0.1, 2.0, 50) == pytest.approx(0.1)
    assert ppo.next_kl_weight(0.1, 2.2, 50) == pytest.approx(0.1 * 1.05)
    assert ppo.next_kl_weight(0.1, 50.0, 50) == pytest.approx(0.1 * 1.1)  # clipped at a fifth
    assert ppo.next_kl_weight(0.1, 0.0, 50) == pytest.approx(0.1 * 0.9)
    assert PPO().next_kl_weight(0.1, 50.0, 50) == 0.1


def bandit_batch(answers, logprobs, rewards):
    """Rows of a prompt [7] and one answer: the policy's choice is the target of the first token."""
    rows = len(answers)
    column = lambda x, dtype: np.asarray(x, dtype).reshape(rows, 1)
    return {
        "tokens": np.full((rows, 1), 7, np.int32),
        "targets": column(answers, np.int32),
        "segment_ids": np.ones((rows, 1), np.int32),
        "positions": np.zeros((rows, 1), np.int32),
        "loss_weights": np.ones((rows, 1), np.float32),
        "sampler_logprobs": column(logprobs, np.float32),
        "rewards": np.asarray(rewards, np.float32),
    }


@pytest.mark.parametrize("beta", [0.5, pytest.param(0.25, marks=pytest.mark.slow)])
def test_a_bandit_of_five_answers_ends_at_reference_times_exp_reward_over_beta(beta):
    algorithm = PPO(kl_weight=beta, minibatches=1, whiten=False, clip=0.2, value_weight=1.0)
    rewards = np.array([1.0, 0.2, -0.5, 0.6, 0.0, 0, 0, 0])
    start = fresh(CFG)
    cfgs = {"policy": CFG, "reference": CFG, "value": with_head(CFG, VALUE)}
    params = {"policy": start, "value": fresh(cfgs["value"])}
    optimizers = {name: adamw(cfgs[name], peak_lr=2e-3, weight_decay=0.0) for name in params}
    roles = algorithm.roles()
    step = jit(make_train_step(algorithm, cfgs, optimizers))
    prepare = jit(
        lambda state, batch: algorithm.prepare(bind(cfgs, roles, state.params | {"reference": start}), batch)
    )
    one = jnp.full((1, 1), 7)

    @jit
    def distribution(params):
        return jax.nn.log_softmax(
            bind(cfgs, {"policy": roles["policy"]}, {"policy": params})["policy"](one).logits[0, 0]
        )

    state, rng = new_state(params, optimizers), np.random.default_rng(0)
    reference = np.asarray(distribution(start), np.float64)
    distributions = []
    for i in range(700):
        logprobs = np.asarray(distribution(state.params["policy"]), np.float64)
        probabilities = np.exp(logprobs) / np.exp(logprobs).sum()
        answers = rng.choice(8, 128, p=probabilities)
        batch = prepare(state, bandit_batch(answers, logprobs[answers], rewards[answers]))
        state, metrics = step(state, {"reference": start}, batch)
        if i >= 500:
            distributions.append(probabilities)
    wanted = np.exp(reference + rewards / beta)
    wanted /= wanted.sum()
    found = np.mean(distributions, axis=0)
    assert 0.5 * np.abs(np.exp(reference) - wanted).sum() > 0.1  # it had a way to go
    assert 0.5 * np.abs(found - wanted).sum() < 0.03, (found, wanted)
    assert float(metrics["mismatch_kl"].mean()) < 1e-3


def test_a_reward_models_score_is_added_and_the_value_learns_the_return():
    """One answer, whose reward is fixed: the value of its state becomes the return."""
    algorithm = PPO(kl_weight=0.0, minibatches=1, value_clip=None, value_weight=1.0)
    cfg = with_head(CFG, VALUE)
    cfgs = {"policy": CFG, "reference": CFG, "value": cfg}
    params = {"policy": fresh(CFG), "value": fresh(cfg)}
    optimizers = {name: adamw(cfgs[name], peak_lr=1e-2, weight_decay=0.0) for name in params}
    step, roles = jit(make_train_step(algorithm, cfgs, optimizers)), algorithm.roles()
    frozen = {"reference": params["policy"]}
    state = new_state(params, optimizers)
    prepare = jit(lambda state, batch: algorithm.prepare(bind(cfgs, roles, state.params | frozen), batch))
    for _ in range(60):
        batch = prepare(state, bandit_batch([3] * 8, [-1.0] * 8, [0.7] * 8))
        state, metrics = step(state, frozen, batch)
    assert float(batch["old_values"][0, 0]) == pytest.approx(0.7, abs=0.05)
    assert float(metrics["score"].mean()) == pytest.approx(0.7)

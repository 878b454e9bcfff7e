"""Losses of post-training against TRL's and OpenRLHF's own methods (tests/goldens/make_losses.py), and closed forms."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import losses

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "losses.npz")


def total(x, g):
    """[B] sums over the completion."""
    return jnp.sum(x * g["mask"], axis=1)


def average(x, g):
    return total(x, g) / g["mask"].sum(axis=1)


def pair(of, g, *names):
    return [part for name in names for part in (of(g[name], g)[0::2], of(g[name], g)[1::2])]


def by_sequence(loss_BT, g):
    return jnp.mean(jnp.sum(loss_BT, axis=1) / g["mask"].sum(axis=1))


def by_token(loss_BT, g):
    return jnp.sum(loss_BT) / g["mask"].sum()


def policy_gradient(g):
    old = jax.lax.stop_gradient(g["old_logprobs"])
    return g["logprobs"], old, g["advantages"], g["mask"]


def surrogate(g, **options):
    old, advantages = map(jax.lax.stop_gradient, (g["old_logprobs"], g["token_advantages"]))
    return losses.ppo_policy(g["logprobs"], old, advantages, g["mask"], 0.2, 0.3, **options)


def value_loss(g, clip):
    old, returns = map(jax.lax.stop_gradient, (g["old_values"], g["returns"]))
    return by_token(2 * losses.ppo_value(g["values"], old, returns, g["mask"], clip), g) / 2


def kto(g):
    weights = jnp.ones(len(g["mask"]))
    z = losses.kto_reference_point(total(g["kl_logprobs"], g), total(g["ref_logprobs"], g), weights)
    policy, reference = total(g["logprobs"], g), total(g["ref_logprobs"], g)
    return jnp.mean(losses.kto(policy, reference, g["desired"] == 1, z, 0.3, 1.0, 1.5))


def reward(g, margin=False, centring=0.0):
    chosen, rejected = g["rewards"][0::2], g["rewards"][1::2]
    return jnp.mean(losses.reward_model(chosen, rejected, g["margins"] if margin else 0.0, centring))


def jsd(g, beta, temperature):
    return by_token(losses.jsd(g["student_logits"], g["teacher_logits"], beta, temperature) * g["mask"], g)


PAIRS = ("logprobs", "ref_logprobs")


def reordered(of, g):
    chosen, rejected, ref_chosen, ref_rejected = pair(of, g, *PAIRS)
    return chosen, rejected, ref_chosen, ref_rejected


CASES = {
    "dpo": lambda g: jnp.mean(losses.dpo(*reordered(total, g), 0.3)),
    "hinge": lambda g: jnp.mean(losses.hinge(*reordered(total, g), 0.3)),
    "ipo": lambda g: jnp.mean(losses.ipo(*reordered(average, g), 0.3)),
    "dpo_averaged": lambda g: jnp.mean(losses.dpo(*reordered(average, g), 2.0)),
    "robust_dpo": lambda g: jnp.mean(losses.robust_dpo(*reordered(total, g), 0.3, 0.2)),
    "cpo_smoothed": lambda g: jnp.mean(losses.cpo(*pair(total, g, "logprobs"), 0.3, 0.2)),
    "simpo": lambda g: jnp.mean(losses.simpo(*pair(average, g, "logprobs"), 2.0, 0.8)),
    "orpo": lambda g: jnp.mean(losses.orpo(*pair(average, g, "logprobs"), 0.25)),
    "kto": kto,
    "reward": reward,
    "reward_margin_centred": lambda g: reward(g, True, 0.1),
    "forward_kl": lambda g: jsd(g, 0.0, 1.0),
    "reverse_kl": lambda g: jsd(g, 1.0, 1.0),
    "jsd": lambda g: jsd(g, 0.3, 2.0),
    "grpo": lambda g: jnp.mean(losses.grpo(*policy_gradient(g), 0.2, 0.28)),
    "grpo_kl": lambda g: jnp.mean(
        losses.grpo(*policy_gradient(g), 0.2, 0.28, jax.lax.stop_gradient(g["ref_logprobs"]), 0.2)
    ),
    "dapo": lambda g: by_token(losses.ppo_policy(*policy_gradient(g), 0.2, 0.28), g),
    "dr_grpo": lambda g: jnp.sum(losses.ppo_policy(*policy_gradient(g), 0.2, 0.28)) / (len(g["mask"]) * 20),
    "gspo": lambda g: jnp.mean(losses.gspo(*policy_gradient(g), 0.05, 0.1)),
    "cispo": lambda g: by_token(losses.cispo(*policy_gradient(g), max_ratio=1.2), g),
    "ppo_policy": lambda g: by_token(surrogate(g), g),
    "ppo_dual_clip": lambda g: by_token(surrogate(g, dual_clip=1.5), g),
    "ppo_value": lambda g: value_loss(g, 0.2),
    "ppo_value_plain": lambda g: value_loss(g, None),
    "pairwise": reward,
    "pairwise_margin": lambda g: reward(g, True),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_those_of_trl_and_openrlhf(name):
    given = {key: jnp.asarray(GOLDENS[key]) for key in GOLDENS if "/" not in key}
    floats = {key: x for key, x in given.items() if x.dtype == jnp.float32}
    loss, grads = jax.value_and_grad(lambda floats: CASES[name](given | floats))(floats)
    np.testing.assert_allclose(loss, GOLDENS[f"{name}/loss"], rtol=1e-5, atol=1e-6)
    compared = 0
    for key, grad in grads.items():
        golden = f"{name}/grad_{key}"
        if golden in GOLDENS:
            np.testing.assert_allclose(grad, GOLDENS[golden], rtol=1e-5, atol=1e-6, err_msg=key)
            compared += 1
    assert compared >= 1


def test_every_golden_has_its_case():
    assert {key.split("/")[0] for key in GOLDENS if "/" in key} == set(CASES)


def test_kl_of_equal_distributions_is_zero_and_of_disjoint_ones_is_large():
    logits = jnp.array([[2.0, -1.0, 0.5]])
    for beta in (0.0, 0.3, 1.0):
        assert float(losses.jsd(logits, logits, beta)[0]) == pytest.approx(0.0, abs=1e-6)
    disjoint = jnp.array([[0.0, -jnp.inf]]), jnp.array([[-jnp.inf, 0.0]])
    assert float(losses.jsd(*disjoint, 0.5)[0]) == pytest.approx(np.log(2), rel=1e-6)
    grad = jax.grad(lambda x: losses.jsd(x, disjoint[1], 0.5)[0])(jnp.array([[0.0, -5.0]]))
    assert np.isfinite(grad).all()


def test_top_k_kl_is_exact_with_all_but_one_token_and_a_lower_bound_otherwise():
    rng = np.random.default_rng(1)
    student, teacher = (jax.nn.log_softmax(jnp.asarray(3 * rng.normal(size=(50, 9)))) for _ in range(2))
    whole = losses.jsd(student, teacher, 0.0)
    order = jnp.argsort(-teacher, axis=-1)
    chosen = lambda x, k: jnp.take_along_axis(x, order[:, :k], axis=-1)
    exact = losses.top_k_kl(chosen(student, 8), chosen(teacher, 8), tail_floor=0.0)
    np.testing.assert_allclose(exact, whole, rtol=2e-4, atol=1e-5)
    coarse = losses.top_k_kl(chosen(student, 3), chosen(teacher, 3))
    assert (
        (coarse <= whole + 1e-5).all()
        and (coarse >= -1e-6).all()
        and float(coarse.mean()) > 0.5 * float(whole.mean())
    )


def test_log1mexp_is_accurate_and_its_gradient_finite_at_both_ends():
    x = np.array([-1e-5, -1e-3, -0.1, -0.6931, -0.6932, -1.0, -20.0, -100.0])
    wanted = np.log(-np.expm1(x))
    np.testing.assert_allclose(losses.log1mexp(jnp.asarray(x, jnp.float32)), wanted, rtol=2e-4, atol=1e-30)
    grads = jax.vmap(jax.grad(losses.log1mexp))(jnp.asarray([0.0, -1e-5, -0.5, -1.0, -200.0]))
    assert np.isfinite(grads).all()
    chosen = jnp.array([0.0, -1e-8])  # a completion of probability one
    assert np.isfinite(jax.grad(lambda c: losses.orpo(c, c - 1).sum())(chosen)).all()


def test_kto_of_a_completion_like_its_reference_is_a_half():
    zero = jnp.zeros(2)
    loss = losses.kto(zero, zero, jnp.array([True, False]), jnp.zeros(()), 0.1, 1.0, 3.0)
    np.testing.assert_allclose(loss, [0.5, 1.5])


def test_kl_estimators_have_the_right_mean_and_the_gradients_that_are_claimed():
    """Exact expectations over a policy of four tokens."""
    logits, reference = jnp.array([0.3, -1.0, 2.0, 0.1]), jax.nn.log_softmax(jnp.array([1.0, 0.0, 0.5, -0.5]))

    def expected(estimator, logits, sampler):
        return jnp.sum(jnp.exp(sampler) * estimator(jax.nn.log_softmax(logits), reference))

    policy = jax.nn.log_softmax(logits)
    kl = lambda logits: jnp.sum(
        jnp.exp(jax.nn.log_softmax(logits)) * (jax.nn.log_softmax(logits) - reference)
    )
    for estimator in (losses.kl_k1, losses.kl_k3):
        assert float(expected(estimator, logits, policy)) == pytest.approx(float(kl(logits)), rel=1e-5)
    as_loss = lambda estimator: jax.grad(lambda x: expected(estimator, x, policy))(logits)
    np.testing.assert_allclose(as_loss(losses.kl_k1), jnp.zeros(4), atol=1e-6)
    np.testing.assert_allclose(as_loss(losses.kl_k2), jax.grad(kl)(logits), rtol=1e-4, atol=1e-6)
    assert np.abs(as_loss(losses.kl_k3) - jax.grad(kl)(logits)).max() > 0.05


def grpo_with_kl(logprobs, old, advantages, mask):
    return losses.grpo(logprobs, old, advantages, mask, ref_logprobs=old, beta=0.1)


def masked_value(values, old, returns, mask):
    return losses.ppo_value(values, old, jnp.broadcast_to(returns[:, None], values.shape), mask)


def masked_steps(logits, labels, _, mask):
    return losses.process_reward(logits, jnp.exp(labels), mask)


@pytest.mark.parametrize("anything", [500.0, -500.0, -np.inf, np.nan])
@pytest.mark.parametrize(
    "loss",
    [losses.ppo_policy, losses.grpo, grpo_with_kl, losses.gspo, losses.cispo, masked_value, masked_steps],
)
def test_what_is_outside_the_mask_changes_neither_loss_nor_gradient(loss, anything):
    rng = np.random.default_rng(2)
    logprobs, old = (-np.abs(rng.normal(size=(3, 5))).astype(np.float32) for _ in range(2))
    mask = (np.arange(5) < np.array([5, 2, 0])[:, None]).astype(np.float32)
    advantages = rng.normal(size=3).astype(np.float32)
    hostile = np.where(mask > 0, logprobs, anything).astype(np.float32)
    total_of = lambda x: jnp.sum(loss(x, old, jnp.asarray(advantages), jnp.asarray(mask)))
    (a, grad_a), (b, grad_b) = (jax.value_and_grad(total_of)(jnp.asarray(x)) for x in (logprobs, hostile))
    assert float(a) == float(b)
    np.testing.assert_array_equal(np.where(mask > 0, grad_a, 0), grad_a)
    np.testing.assert_array_equal(grad_a, grad_b)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("loss", [losses.ppo_policy, losses.gspo])
def test_a_clipped_ratio_that_overflows_has_no_gradient(loss, dual_clip):
    if loss is losses.gspo and dual_clip is not None:
        pytest.skip("GSPO has no dual clip")
    options = {} if loss is losses.gspo else {"dual_clip": dual_clip}
    advantages = np.array([2.0, 0.0] if dual_clip is None else [2.0, 0.0, -2.0], np.float32)
    old = jnp.full((len(advantages), 1), -200.0)
    mask, start = jnp.ones_like(old), jnp.zeros_like(old)
    total_of = lambda x: jnp.sum(loss(x, old, jnp.asarray(advantages), mask, 0.2, 0.2, **options))
    found, gradient = jax.value_and_grad(total_of)(start)
    assert float(found) == pytest.approx(-1.2 * 2.0 + (0 if dual_clip is None else dual_clip * 2.0))
    np.testing.assert_array_equal(gradient, jnp.zeros_like(start))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_a_token_that_neither_may_say_leaves_the_divergence_and_its_gradient_as_they_are(beta):
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 2, 4)).astype(np.float32)
    longer = lambda x: np.concatenate([x, np.full((2, 1), -np.inf, np.float32)], axis=1)
    of = lambda s, t: jax.value_and_grad(lambda s: jnp.sum(losses.jsd(s, jnp.asarray(t), beta)))(
        jnp.asarray(s)
    )
    (a, grad_a), (b, grad_b) = of(student, teacher), of(longer(student), longer(teacher))
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    np.testing.assert_allclose(grad_b, np.pad(grad_a, [(0, 0), (0, 1)]), rtol=1e-5, atol=1e-7)


def test_process_reward_with_a_share_as_label_is_least_at_that_share():
    mask = jnp.array([[0.0, 1.0]])
    loss = lambda logit: losses.process_reward(jnp.full((1, 2), logit), jnp.full((1, 2), 0.75), mask)
    at_share = float(jnp.log(3.0))
    assert float(jax.grad(lambda x: loss(x).sum())(at_share)) == pytest.approx(0.0, abs=1e-6)
    assert float(loss(0.0)[0, 0]) == 0.0 and float(loss(0.0)[0, 1]) == pytest.approx(np.log(2), rel=1e-6)

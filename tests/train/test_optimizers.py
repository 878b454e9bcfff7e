"""Optimizers against torch's own (tests/goldens/make_optimizers.py) and papers' formulas; precision of parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import decoder, init
from tests.policy import adamw, policy_state
from train.algorithms import LanguageModelling
from train.optimizers import Adafactor, AdamW, Lion, Muon, Sophia, make_optimizer
from train.optimizers.muon import matrices
from train.presets import Hybrid, Mixture
from train.rounding import apply_updates, stochastic_round, with_masters
from train.schedules import Constant, Cosine
from train.step import make_train_step, new_state

from .test_experts import fresh, jit
from .test_step import packed_batch

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "optimizers.npz")
CFG = decoder(64, 16, 1, 2, 1, 8, 24)


def trace(optimizer, start, grads):
    """Parameters after each step, of an optimizer on one matrix that decays."""
    params, found = {"w": jnp.asarray(start)}, []
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update({"w": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        found.append(np.asarray(params["w"]))
    return np.stack(found)


def of_matrix(spec, direction, lr=0.02):
    return optax.chain(direction, optax.add_decayed_weights(spec.weight_decay), optax.scale(-lr))


@pytest.mark.parametrize(
    ("name", "spec", "tolerance"),
    [("adamw", AdamW(weight_decay=0.1), 1e-6), ("lion", Lion(weight_decay=0.5), 1e-6)],
)
def test_three_steps_are_those_of_torch(name, spec, tolerance):
    found = trace(of_matrix(spec, spec.direction(CFG)), GOLDENS["start"], GOLDENS["grads"])
    np.testing.assert_allclose(found, GOLDENS[name], rtol=1e-5, atol=tolerance)


def test_adafactors_updates_are_those_of_torch():
    direction = dataclasses.replace(Adafactor(), min_factored=2).direction(CFG)
    state, params = direction.init({"w": jnp.asarray(GOLDENS["start"])}), {"w": jnp.asarray(GOLDENS["start"])}
    for grad, wanted in zip(GOLDENS["grads"], GOLDENS["adafactor_update"], strict=True):
        updates, state = direction.update({"w": jnp.asarray(grad)}, state, params)
        np.testing.assert_allclose(-updates["w"], wanted, rtol=2e-3, atol=2e-4)
    # one row and one column in place of a matrix
    assert max(x.size for x in jax.tree.leaves(state)) == 12


def test_one_step_of_muon_is_that_of_torch_for_every_matrix_of_a_model():
    """Torch iterates in bfloat16. The model's own maps have several axes, stacked layers and experts."""
    cfg = Mixture(16, 2, 2, 1, 8, ffn_width=12, num_experts=4).build(64).replace(scan=True)
    params = fresh(cfg)
    is_matrix = matrices(cfg)
    spec = Muon(weight_decay=0.0)
    optimizer = optax.chain(spec.direction(cfg), optax.scale(-0.02))
    rng = np.random.default_rng(1)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    updates, _ = jit(optimizer.update)(grads, optimizer.init(params), params)
    flat = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(updates)}
    chosen = {jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(is_matrix) if x}
    assert any("experts" in name for name in chosen) and "['embedding']" not in chosen
    for name, update in flat.items():
        if name not in chosen:
            np.testing.assert_allclose(np.abs(update), 0.02, rtol=1e-3)  # Adam's first step
    matrix = next(x for name, x in flat.items() if name.endswith("['mixer']['q']"))
    for layer in np.asarray(matrix).reshape(2, 16, -1):  # 16 inputs, 2 heads of 8
        values = np.linalg.svd(layer / (0.02 * 0.2 * 4), compute_uv=False)
        assert 0.6 < values.min() and values.max() < 1.3, values  # Newton-Schulz ends near 1
    start, grad = GOLDENS["start"], GOLDENS["grads"][0]
    alone = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers(0, 1)}),
        optax.stateless(lambda u, _: jax.tree.map(lambda x: spec._scaled(x, ((0,), (1,))), u)),
    )
    found = trace(of_matrix(Muon(weight_decay=0.1), alone), start, [grad])
    moved, wanted = found[0] - start, GOLDENS["muon"][0] - start
    assert np.linalg.norm(moved - wanted) < 0.02 * np.linalg.norm(wanted)


def test_sophia_is_algorithm_three_of_the_paper_and_its_estimate_is_the_hessians_diagonal():
    spec = Sophia(b1=0.9, b2=0.8, gamma=0.05, interval=2)
    scales = jnp.array([[4.0, 1.0, 0.25]])
    quadratic = lambda params: jnp.sum(scales * params["w"] ** 2) / 2
    optimizer = spec.direction(CFG)
    params = {"w": jnp.array([[1.0, -2.0, 3.0]])}
    state = optimizer.init(params)
    momentum = hessian = np.zeros((1, 3))
    for step in range(4):
        grads = jax.grad(quadratic)(params)
        updates, state = optimizer.update(grads, state, params, obj_fn=quadratic)
        if step % 2 == 0:  # Hutchinson's estimate is exact where the Hessian is diagonal
            hessian = 0.8 * hessian + 0.2 * np.asarray(scales)
        momentum = 0.9 * momentum + 0.1 * np.asarray(grads["w"])
        wanted = np.clip(momentum / np.maximum(0.05 * hessian, 1e-12), -1, 1)
        np.testing.assert_allclose(updates["w"], wanted, rtol=1e-5)
        params = {"w": params["w"] - 0.1 * updates["w"]}


@pytest.mark.parametrize(
    "spec", [Sophia(peak_lr=1e-2, interval=2), Muon(peak_lr=1e-2), Lion(3e-3), Adafactor(1e-2)]
)
def test_each_optimizer_lowers_the_loss_through_the_train_step(spec):
    optimizers = {"policy": make_optimizer(spec, Constant(0), 10, CFG)}
    step = jit(make_train_step(LanguageModelling(), {"policy": CFG}, optimizers, 2))
    state, seen = new_state({"policy": fresh(CFG)}, optimizers), []
    for _ in range(10):
        state, metrics = step(state, {}, packed_batch())
        seen.append(float(metrics["loss"].mean()))
    assert seen[-1] < seen[0] - 0.3, seen


def test_matrices_of_a_hybrid_are_muons_and_the_rest_adams():
    cfg = Hybrid(
        16, 2, 2, 1, 8, ffn_width=12, attention_every=2, recurrent_heads=2, recurrent_head_dim=8
    ).build(64)
    flat = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(matrices(cfg))}
    assert flat["['block_1']['mixer']['q']"] and flat["['block_0']['ffn']['up']"]
    assert not flat["['embedding']"] and not flat["['final_norm']['scale']"]


def test_stochastic_rounding_is_right_in_expectation_and_exact_where_nothing_is_lost():
    values = jnp.asarray([1.0, 1.0 + 2**-9, -3.001, 1e-30, 65504.3, 0.0, np.inf, np.nan], jnp.float32)
    many = jax.vmap(lambda key: stochastic_round(values, jnp.bfloat16, key).astype(jnp.float32))(
        jax.random.split(jax.random.key(0), 4000)
    )
    np.testing.assert_array_equal(many[:, 0], 1.0)
    np.testing.assert_array_equal(many[:, 5], 0.0)
    assert np.isinf(many[:, 6]).all() and np.isnan(many[:, 7]).all()
    np.testing.assert_allclose(many[:, 1:5].mean(axis=0), values[1:5], rtol=3e-4)
    assert len(np.unique(many[:, 1])) == 2  # the two neighbours, and nothing else


def test_masters_and_stochastic_rounding_take_the_small_steps_that_bfloat16_loses():
    """A thousand steps of 1e-4 from 1: half a unit in the last place of bfloat16 is 2e-3 there."""
    params = {"w": jnp.ones(4096, jnp.bfloat16)}
    sgd = optax.scale(-1.0)
    ends = {}
    for name, optimizer, rounding in (
        ("nearest", sgd, "nearest"),
        ("stochastic", sgd, "stochastic"),
        ("masters", with_masters(sgd), "nearest"),
    ):

        def body(i, carry, optimizer=optimizer, rounding=rounding):
            params, state = carry
            grads = {"w": jnp.full(4096, 1e-4)}
            updates, state = optimizer.update(grads, state, params)
            return apply_updates(params, updates, rounding, jax.random.key(i)), state

        end, _ = jax.lax.fori_loop(0, 1000, body, (params, optimizer.init(params)))
        assert end["w"].dtype == jnp.bfloat16
        ends[name] = float(end["w"].astype(jnp.float32).mean())
    assert ends["nearest"] == 1.0
    assert ends["stochastic"] == pytest.approx(0.9, abs=2e-3)
    assert ends["masters"] == pytest.approx(0.9, abs=2e-3)


def test_masters_follow_the_float32_run_bit_for_bit():
    """With gradients that do not depend on the parameters, bfloat16 parameters are the rounded ones of float32."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for _ in range(20)]
    start = jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16)
    adam = optax.adam(1e-2)
    full, kept = {"w": start.astype(jnp.float32)}, {"w": start}
    masters = with_masters(adam)
    states = [adam.init(full), masters.init(kept)]
    for grad in grads:
        updates, states[0] = adam.update({"w": grad}, states[0], full)
        full = optax.apply_updates(full, updates)
        updates, states[1] = masters.update({"w": grad}, states[1], kept)
        kept = apply_updates(kept, updates, "nearest", jax.random.key(0))
    np.testing.assert_array_equal(states[1].masters["w"], full["w"])
    np.testing.assert_array_equal(kept["w"], full["w"].astype(jnp.bfloat16))


def test_a_moving_average_is_that_of_the_parameters():
    optimizer = adamw(CFG, peak_lr=1e-2)
    step = make_train_step(LanguageModelling(), {"policy": CFG}, {"policy": optimizer}, average_decay=0.75)
    state = new_state({"policy": fresh(CFG)}, {"policy": optimizer}, average=True)
    wanted = state.params["policy"]
    run = jit(step)
    for _ in range(3):
        state, _ = run(state, {}, packed_batch())
        wanted = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, wanted, state.params["policy"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.extra["average"], wanted
    )
    assert policy_state(fresh(CFG), optimizer).extra.keys() == {"skipped"}


def final_loss(spec, text, seed, steps=200):
    """Of a model that reads bytes: the mean loss of the last steps, each on new rows of the text."""
    cfg = decoder(256, 64, 2, 4, 2, 16, 176, tied_head=True, rope_theta=1000.0)
    params = jit(init, static_argnums=0)(cfg, jax.random.key(seed))
    optimizers = {"policy": make_optimizer(spec, Cosine(20, 0.1), steps, cfg)}
    step = jax.jit(make_train_step(LanguageModelling(), {"policy": cfg}, optimizers), donate_argnums=0)
    state, rng, losses = new_state({"policy": params}, optimizers, seed), np.random.default_rng(seed), []
    ones = np.ones((16, 64), np.int32)
    fixed = {"segment_ids": ones, "loss_weights": ones.astype(np.float32)}
    fixed["positions"] = np.tile(np.arange(64, dtype=np.int32), (16, 1))
    for _ in range(steps):
        starts = rng.integers(0, len(text) - 65, 16)
        rows = np.stack([text[s : s + 65] for s in starts]).astype(np.int32)
        state, metrics = step(state, {}, fixed | {"tokens": rows[:, :-1], "targets": rows[:, 1:]})
        losses.append(metrics["loss"])
    return float(np.mean([loss.mean() for loss in losses[-20:]]))


@pytest.mark.slow
def test_muon_is_below_adamw_at_equal_tokens_on_shakespeare(shared):
    """Each at the best of its own learning rates, chosen on a seed that is not counted."""
    text = np.frombuffer((shared / "data" / "pretrain-text" / "tinyshakespeare.txt").read_bytes(), np.uint8)
    rates = (3e-3, 1e-2, 3e-2)
    best = {
        kind: min(rates, key=lambda lr, kind=kind: final_loss(kind(peak_lr=lr), text, 100))
        for kind in (AdamW, Muon)
    }
    for seed in range(3):
        adamw_loss, muon_loss = (final_loss(kind(peak_lr=best[kind]), text, seed) for kind in (AdamW, Muon))
        print(
            f"seed {seed}: AdamW at {best[AdamW]:g} {adamw_loss:.3f}, Muon at {best[Muon]:g} {muon_loss:.3f}"
        )
        assert muon_loss < adamw_loss

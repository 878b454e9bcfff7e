"""The loss and its gradient are the same number whatever the microbatches, the packing and the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies

from configs import ConfigError
from model import MESH_AXES, ShardingRules, decoder, init, load_config
from tests.meshes import assert_divided, compiled
from tests.model.conftest import GOLDENS
from tests.model.tpu import needs_libtpu
from tests.policy import adamw, language_modelling, objective_of, policy_state, policy_step, prepared
from train.algorithms import DPO, LanguageModelling
from train.config import MeshSpec
from train.mesh import make_mesh, param_shardings, place_batch
from train.optimizers import clip_by_global_norm, decay_mask
from train.schedules import WSD, Cosine, learning_rate
from train.step import accumulate

CFG = decoder(64, 32, 2, 4, 2, 8, 48, qk_norm=True)
RULES = ShardingRules()


def packed_batch(rows=8, length=16, seed=0):
    """Rows of two documents of random lengths and some padding, with a random loss mask."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (rows, length + 1)).astype(np.int32)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        first, end = rng.integers(2, length - 4), rng.integers(length - 3, length + 1)
        segments[row, :first], segments[row, first:end] = 1, 2
        positions[row, :first], positions[row, first:end] = np.arange(first), np.arange(end - first)
    weights = ((segments > 0) & (rng.random((rows, length)) < 0.7)).astype(np.float32)
    targets, tokens = tokens[:, 1:], tokens[:, :-1]
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": weights,
        "segment_ids": segments,
        "positions": positions,
    }


@pytest.fixture(scope="module")
def params():
    return init(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def reference(params):
    """(gradient of the mean loss, mean loss) of the batch on one device in one piece."""
    grads, (loss, _) = jax.jit(lambda p, b: accumulate(language_modelling(CFG), p, b, 1))(
        params, packed_batch()
    )
    return jax.tree.map(lambda g: g / loss.weight, grads), loss


def assert_same(tree, other, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=tolerance), tree, other)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_change_neither_loss_nor_gradient(params, reference, microbatches):
    objective = language_modelling(CFG)
    grads, (loss, _) = jax.jit(lambda p, b: accumulate(objective, p, b, microbatches))(params, packed_batch())
    assert float(loss.weight) == float(reference[1].weight)
    assert float(loss.total) == pytest.approx(float(reference[1].total), rel=1e-6)
    assert_same(jax.tree.map(lambda g: g / loss.weight, grads), reference[0])


SPLIT_RESIDUAL = dataclasses.replace(RULES, act_embed=("tensor",))


@pytest.mark.parametrize(
    "axes, rules",
    [
        ({"data": 8}, RULES),
        ({"fsdp": 8}, RULES),
        ({"tensor": 2, "data": 1}, RULES),
        ({"fsdp": 2, "tensor": 2}, RULES),
        ({"fsdp": 2, "tensor": 2}, SPLIT_RESIDUAL),
    ],
)
def test_eight_devices_give_the_gradient_of_one(params, reference, axes, rules):
    count = int(np.prod(list(axes.values())))
    mesh = make_mesh(MeshSpec(**{"data": 1} | axes), jax.devices()[:count])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(CFG, mesh, rules))
        batch = place_batch(packed_batch(), mesh, rules)
        objective = language_modelling(CFG, rules)
        parts = 1 if count == 8 else 2  # a microbatch has a row for each device
        step = compiled(jax.jit(lambda p, b: accumulate(objective, p, b, parts, rules)), placed, batch)
        grads, (loss, _) = step(placed, batch)
    one = jax.jit(lambda p, b: accumulate(language_modelling(CFG), p, b, parts))
    assert_divided(compiled(one, params, packed_batch()), step, 1.2 / count, 0.9)
    assert float(loss.total) == pytest.approx(float(reference[1].total), rel=1e-5)
    assert_same(jax.tree.map(lambda g: g / loss.weight, jax.device_get(grads)), reference[0])


def test_scanned_blocks_give_the_loss_of_unrolled_ones(params, reference):
    from model.layout import relayout

    cfg, stacked = relayout(CFG, params, scan=True)
    grads, (loss, _) = accumulate(language_modelling(cfg.replace(remat="full")), stacked, packed_batch(), 1)
    assert float(loss.total) == pytest.approx(float(reference[1].total), rel=1e-5)
    _, grads = relayout(cfg, grads, scan=False)
    assert_same(jax.tree.map(lambda g: g / loss.weight, grads), reference[0])


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(params):
    optimizer = adamw(CFG)

    class Exploding(LanguageModelling):
        def loss(self, models, batch, rng):
            loss, metrics = super().loss(models, batch, rng)
            return dataclasses.replace(loss, total=loss.total * batch["explode"][0]), metrics

    step = jax.jit(policy_step(CFG, optimizer, Exploding()))
    good = packed_batch() | {"explode": np.ones((8,), np.float32)}
    bad = packed_batch() | {"explode": np.full((8,), np.inf, np.float32)}
    state, _ = step(policy_state(params, optimizer), good)
    after, metrics = step(state, bad)
    assert int(after.extra["skipped"]) == 1 and float(metrics["skipped"].total) == 1
    assert int(after.step) == 2
    jax.tree.map(
        np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state)
    )
    again, metrics = step(after, good)
    assert int(again.extra["skipped"]) == 1 and float(metrics["skipped"].total) == 0


def test_a_step_in_which_nothing_counts_changes_nothing(params):
    optimizer = adamw(CFG)
    step = jax.jit(policy_step(CFG, optimizer))
    state, _ = step(policy_state(params, optimizer), packed_batch())  # there is momentum now
    empty = packed_batch() | {"loss_weights": np.zeros((8, 16), np.float32)}
    after, metrics = step(state, empty)
    assert int(after.extra["skipped"]) == 0 and int(after.step) == 2 and float(metrics["skipped"].total) == 0
    jax.tree.map(
        np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state)
    )


def test_decay_spares_whatever_multiplies_no_vector():
    """Names that PyTorch's code of these models exempts: norms, biases, A_log, D, time steps, sinks."""
    spared, decayed = set(), set()
    for name in (
        "cohere",
        "jamba",
        "mamba2",
        "qwen3_next",
        "rwkv7",
        "recurrent_gemma",
        "gpt_oss",
        "flan_t5",
        "blt",
    ):
        mask = decay_mask(load_config(GOLDENS / name))
        for path, decays in jax.tree_util.tree_leaves_with_path(mask):
            (decayed if decays else spared).add(path[-1].key)
    assert {
        "scale",
        "A_log",
        "D",
        "dt_bias",
        "sinks",
        "relative",
        "r_k",
        "k_k",
        "norm",
        "conv_bias",
    } <= spared
    assert {"embedding", "q", "down", "conv", "router", "gate"} <= decayed and spared & decayed <= {"a"}


def test_decay_spares_norms_and_biases():
    mask = decay_mask(CFG)
    assert mask["embedding"] and mask["block_0"]["mixer"]["q"] and mask["block_1"]["ffn"]["down"]
    assert not mask["final_norm"]["scale"] and not mask["block_0"]["mixer"]["q_norm"]["scale"]


def test_schedules_rise_hold_and_fall_where_they_say():
    cosine = learning_rate(Cosine(warmup_steps=10, final_fraction=0.1), 1.0, 110)
    assert float(cosine(0)) == pytest.approx(0.1)
    assert float(cosine(10)) == pytest.approx(1.0)
    assert float(cosine(60)) == pytest.approx(0.55, abs=1e-6)
    assert float(cosine(110)) == pytest.approx(0.1, abs=1e-6)
    wsd = learning_rate(WSD(warmup_steps=10, decay_steps=20, final_fraction=0.1), 1.0, 110)
    assert float(wsd(89)) == pytest.approx(1.0)
    assert float(wsd(100)) == pytest.approx(0.55, abs=1e-6)
    assert float(wsd(110)) == pytest.approx(0.1, abs=1e-6)


def test_adamw_is_that_of_the_paper(params):
    """One step by hand: with g the clipped gradient, m/sqrt(v) after bias correction is sign(g) (nearly)."""
    optimizer = adamw(CFG, peak_lr=0.5, weight_decay=0.1, clip_norm=0.0)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 3.0), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    expected = params["embedding"] - 0.5 * (1.0 + 0.1 * params["embedding"])
    np.testing.assert_allclose(new["embedding"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["final_norm"]["scale"], params["final_norm"]["scale"] - 0.5, rtol=1e-5)


def test_dpo_is_its_formula_and_starts_at_log_two(params):
    batch = packed_batch()
    batch["loss_weights"][:2] = 1.0
    algorithm = DPO(beta=0.3, label_smoothing=0.1)
    objective = objective_of(algorithm, CFG)
    with_reference = lambda reference: prepared(
        algorithm, CFG, {"policy": params, "reference": reference}, batch
    )
    loss, metrics = objective(params, with_reference(params))
    assert float(loss.mean()) == pytest.approx(np.log(2), abs=1e-5)
    other = init(CFG, jax.random.key(1))
    placed = with_reference(other)
    loss, metrics = objective(params, placed)
    ratios = with_reference(params)["reference_logprobs"] - placed["reference_logprobs"]
    ratios = ratios * batch["loss_weights"]
    delta = 0.3 * (ratios.sum(1)[0::2] - ratios.sum(1)[1::2])
    expected = np.mean(0.9 * np.log1p(np.exp(-delta)) + 0.1 * np.log1p(np.exp(delta)))
    assert float(loss.mean()) == pytest.approx(float(expected), rel=1e-4)
    assert float(metrics["accuracy"].mean()) == pytest.approx(float((delta > 0).mean()))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (MeshSpec(data=3), "asks for 3 devices, and there are 8"),
        (MeshSpec(data=-1, tensor=3), "multiple of 3 devices"),
        (MeshSpec(data=-1, fsdp=-1), "at most one axis may be -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error_with_its_mend(spec, said):
    with pytest.raises(ConfigError, match=said):
        make_mesh(spec)


@needs_libtpu
def test_a_mesh_may_divide_an_axis_of_the_torus():
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v6e:16x16").devices
    mesh = make_mesh(MeshSpec(data=1, fsdp=64, tensor=4), list(chips))
    assert (mesh.shape["fsdp"], mesh.shape["tensor"]) == (64, 4) and mesh.axis_names == MESH_AXES
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in chips)


def test_an_axis_that_does_not_divide_is_named():
    mesh = make_mesh(MeshSpec(data=1, tensor=8))
    with pytest.raises(
        ConfigError, match=r"tensor = 8 do not divide the axis 'kv_heads' \(2\).*sharding.kv_heads=\(\)"
    ):
        param_shardings(CFG, mesh, RULES)
    rules = dataclasses.replace(RULES, kv_heads=(), heads=(), act_kv_heads=(), act_heads=())
    assert set(mesh.shape) == set(MESH_AXES)
    param_shardings(CFG, mesh, rules)


def test_gradients_of_bfloat16_parameters_are_divided_in_float32(params):
    """A divisor rounded to bfloat16 would be off by up to 0.4 %."""
    seen = optax.GradientTransformation(
        lambda p: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), p),
        lambda grads, _, p: (jax.tree.map(jnp.zeros_like, p), grads),
    )
    params, batch = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), packed_batch()
    grads, (loss, _) = jax.jit(lambda p: accumulate(language_modelling(CFG), p, batch, 1))(params)
    state, _ = jax.jit(policy_step(CFG, seen))(policy_state(params, seen), batch)
    assert float(jnp.bfloat16(1 / loss.weight)) != pytest.approx(1 / float(loss.weight), rel=1e-3)
    jax.tree.map(
        lambda mean, g: np.testing.assert_allclose(mean, g.astype(jnp.float32) / loss.weight, rtol=1e-6),
        state.opt_state["policy"],
        grads,
    )


@pytest.mark.parametrize("scale", [0.01, 10.0], ids=["short", "too long"])
def test_clipping_equals_that_of_optax(params, scale):
    grads = jax.tree.map(lambda p: scale * p, params)
    (clipped, _), (wanted, _) = (
        make(1.5).update(grads, optax.EmptyState())
        for make in (clip_by_global_norm, optax.clip_by_global_norm)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, wanted)

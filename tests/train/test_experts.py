"""Mixtures of experts in training: their losses are added, their load is balanced with and without a loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import ShardingRules, decoder, init
from model.blocks.block import Block
from model.blocks.ffn import GatedMLP
from model.blocks.mixture_of_depths import MixtureOfDepths
from model.blocks.moe import MoE
from model.blocks.router import Router
from model.inspect.flops import forward_flops_per_token
from tests.meshes import assert_divided, compiled
from tests.model.conftest import applied
from tests.policy import adamw, language_modelling, objective_of, policy_state, policy_step, prepared
from train.algorithms import DPO
from train.config import MeshSpec
from train.mesh import make_mesh, param_shardings, place_batch
from train.presets import Mixture
from train.step import accumulate

from .test_step import packed_batch

jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
PLAIN = MoE(8, 2, GatedMLP(12), balance_loss=0.1, z_loss=0.01)
NO_LOSS = MoE(8, 2, GatedMLP(12), Router("sigmoid", choice_bias=True), balance_rate=0.01)


def model(moe, **changes):
    cfg = decoder(64, 16, 1, 2, 1, 8, 24, **changes)
    return cfg.replace(blocks=(dataclasses.replace(cfg.blocks[0], ffn=moe),))


def fresh(cfg):
    return jit(init, static_argnums=0)(cfg, jax.random.key(0))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_the_loss_is_the_objective_and_what_the_moe_layers_add(scan):
    dense, cfg = decoder(64, 16, 1, 2, 1, 8, 24), model(PLAIN, scan=scan)
    cfg = cfg.replace(blocks=dense.blocks + 2 * cfg.blocks)  # two MoE layers: their mean is added
    params, batch = fresh(cfg), packed_batch()
    batch["loss_weights"] = (batch["segment_ids"] > 0).astype(np.float32)
    loss, metrics = jit(language_modelling(cfg))(params, batch)
    value = {name: float(metric.mean()) for name, metric in metrics.items()}
    added = 0.1 * value["moe_load_balance"] + 0.01 * value["moe_z_loss"]
    assert float(loss.mean()) == pytest.approx(value["nll"] + added, rel=1e-5)
    assert set(value) == {
        "nll",
        "moe_load_balance",
        "moe_z_loss",
        "moe_entropy",
        "moe_dropped",
        "moe_max_load",
    }
    assert float(metrics["moe_entropy"].weight) == 2 * (batch["segment_ids"] > 0).sum()


def test_preferences_add_it_too():
    cfg = model(PLAIN)
    params, batch = fresh(cfg), packed_batch()
    batch["loss_weights"][:, 0] = 1.0  # every pair counts, and so much in the routers' losses as its tokens
    batch["segment_ids"] = np.maximum(batch["segment_ids"], 1)
    with_reference = lambda p, b: prepared(DPO(), cfg, {"policy": p, "reference": p}, b)
    loss, metrics = jit(lambda p, b: objective_of(DPO(), cfg)(p, with_reference(p, b)))(params, batch)
    added = 0.1 * metrics["moe_load_balance"].mean() + 0.01 * metrics["moe_z_loss"].mean()
    assert float(loss.mean()) == pytest.approx(np.log(2) + float(added), rel=1e-5)


DEFAULT = Mixture(16, 2, 2, 1, 8, ffn_width=12).build(64)
CHOICE_BIAS = Mixture(16, 2, 2, 1, 8, ffn_width=12, balance_rate=1e-3).build(64)
DEPTHS = DEFAULT.replace(
    blocks=(*DEFAULT.blocks, Block(MixtureOfDepths(DEFAULT.blocks[0], 0.5), None, None)),
)


def preferences(cfg):
    objective = objective_of(DPO(), cfg)
    return lambda p, b: objective(p, b | {"reference_logprobs": jnp.zeros(b["tokens"].shape)})


def of_microbatches(objective, params, batch, count):
    grads, (loss, _) = jit(lambda p, b: accumulate(objective, p, b, count))(params, batch)
    return jax.tree.map(lambda g: g / loss.weight, grads), float(loss.mean())


@pytest.mark.parametrize("cfg", [DEFAULT, CHOICE_BIAS, DEPTHS], ids=["losses", "choice bias", "depths"])
@pytest.mark.parametrize("objective", [language_modelling, preferences])
def test_microbatches_change_neither_loss_nor_gradient_of_an_moe(cfg, objective):
    assert cfg.blocks[0].ffn.balance_loss > 0 and cfg.blocks[0].ffn.z_loss > 0  # the defaults
    params, batch = fresh(cfg), packed_batch()
    batch["loss_weights"][:3] *= 0.1  # masks that differ between microbatches
    batch["loss_weights"][3] = 0
    wanted, loss = of_microbatches(objective(cfg), params, batch, 1)
    for count in (2, 4):
        grads, other = of_microbatches(objective(cfg), params, batch, count)
        assert other == pytest.approx(loss, rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, wanted)


def test_packing_changes_neither_loss_nor_gradient_of_an_moe():
    """Each document in a row of its own, padded, and several of them in one."""
    params, batch = fresh(DEFAULT), packed_batch(4, 16)
    alone = {key: np.zeros((8, 16), value.dtype) for key, value in batch.items()}
    for row, number in np.ndindex(4, 2):
        here = batch["segment_ids"][row] == number + 1
        for key in alone:
            alone[key][2 * row + number, : here.sum()] = batch[key][row][here]
    grads, loss = of_microbatches(language_modelling(DEFAULT), params, batch, 1)
    others, other = of_microbatches(language_modelling(DEFAULT), params, alone, 1)
    assert other == pytest.approx(loss, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), others, grads)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_eight_devices_give_the_gradient_of_one(scan):
    cfg, rules = model(dataclasses.replace(PLAIN, shared=GatedMLP(8)), scan=scan), ShardingRules()
    params, batch = fresh(cfg), packed_batch()
    gradient = lambda rules: jit(lambda p, b: accumulate(language_modelling(cfg, rules), p, b, 2, rules))
    alone = compiled(gradient(None), params, batch)
    wanted, (loss, _) = alone(params, batch)
    mesh = make_mesh(MeshSpec(data=1, fsdp=2, expert=2, tensor=2))
    cut = dataclasses.replace(rules, kv_heads=(), act_kv_heads=())  # there is one
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(cfg, mesh, cut))
        rows = place_batch(batch, mesh, cut)
        split = compiled(gradient(cut), placed, rows)
        found, (sharded_loss, _) = split(placed, rows)
    assert_divided(alone, split, 0.35, 0.6)
    assert float(sharded_loss.total) == pytest.approx(float(loss.total), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), found, wanted)


def test_the_choice_bias_moves_by_its_rate_and_is_seen_by_nothing_else():
    cfg = model(NO_LOSS)
    params, optimizer = fresh(cfg), adamw(cfg, peak_lr=0.1, clip_norm=1.0)
    params["block_0"]["ffn"]["choice_bias"] = jnp.ones(8)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    state = optimizer.init(params)
    updates, _ = jit(optimizer.update)(grads, state, params)
    bias = grads["block_0"]["ffn"]["choice_bias"]
    np.testing.assert_allclose(updates["block_0"]["ffn"]["choice_bias"], -0.01 * jnp.sign(bias), rtol=1e-6)
    grads["block_0"]["ffn"]["choice_bias"] = 1e6 * bias
    louder, _ = jit(optimizer.update)(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, louder, updates)


def max_load(cfg, params, batch):
    out = applied(cfg, params, batch["tokens"], batch["positions"], batch["segment_ids"])
    return float(out.aux["moe_max_load"].mean())


@pytest.mark.parametrize(
    "moe, lr, before, after",
    [
        (NO_LOSS, 0.0, 3.5, 1.4),
        (dataclasses.replace(PLAIN, router=Router(bias=True), balance_loss=1.0), 0.05, 3.5, 1.5),
    ],
    ids=["without a loss", "with a loss"],
)
def test_a_skewed_router_becomes_even(moe, lr, before, after):
    """Two of eight experts get nearly every token at first: a largest load of 4 means."""
    moe = dataclasses.replace(moe, router=dataclasses.replace(moe.router, bias=True))
    cfg = model(moe)
    params = fresh(cfg)
    params["block_0"]["ffn"]["router_bias"] = jnp.array([1.5, 1.5, 0, 0, 0, 0, 0, 0])
    params["block_0"]["ffn"]["router"] *= 0.3
    batch = packed_batch()
    assert max_load(cfg, params, batch) > before
    optimizer = adamw(cfg, peak_lr=lr, weight_decay=0.0)
    step = jit(policy_step(cfg, optimizer))
    state = policy_state(params, optimizer)
    for _ in range(60):
        state, _ = step(state, batch)
    assert max_load(cfg, state.params["policy"], batch) < after


def test_a_config_makes_an_moe_with_the_flops_of_its_dense_blocks():
    cfg = Mixture(16, 3, 2, 1, 8, ffn_width=12, shared_width=8, dense_layers=1, balance_rate=1e-3).build(64)
    kinds = [type(block.ffn) for block in cfg.blocks]
    assert kinds == [GatedMLP, MoE, MoE] and cfg.blocks[1].ffn.router.choice_bias
    dense = cfg.replace(blocks=cfg.blocks[:1] * 3)
    extra = forward_flops_per_token(cfg, 16) - forward_flops_per_token(dense, 16)
    assert extra == 2 * 2 * 16 * 8  # two routers
    optimizer = adamw(cfg)
    state = policy_state(fresh(cfg), optimizer)
    state, metrics = jit(policy_step(cfg, optimizer))(state, packed_batch())
    moved = state.params["policy"]["block_1"]["ffn"]["choice_bias"]
    assert np.max(np.abs(moved)) == pytest.approx(1e-3) and float(metrics["skipped"].total) == 0
    assert float(metrics["loss"].mean()) > float(metrics["nll"].mean())

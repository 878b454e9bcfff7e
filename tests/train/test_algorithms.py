"""Every algorithm: its loss and gradient are the same number however the batch is padded, cut and placed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import ShardingRules, decoder
from tests.meshes import assert_divided, compiled
from train import losses
from train.algorithms import DPO, GRPO, KTO, ORPO, LanguageModelling, ProcessRewardModel, RewardModel, SimPO
from train.algorithms.kto import mismatched
from train.algorithms.rewards import REWARD, at_end
from train.config import MeshSpec
from train.mesh import make_mesh, param_shardings, place_batch
from train.models import Role, bind
from train.presets import Mixture
from train.step import accumulate

from .test_experts import fresh, jit

DENSE = decoder(64, 16, 1, 2, 1, 8, 24, heads=(REWARD,))
MOE = Mixture(ffn_width=12, num_experts=4).put_into(DENSE)
RULES = ShardingRules(kv_heads=(), act_kv_heads=())  # there is one
ALGORITHMS = {
    "lm": LanguageModelling(z_loss=1e-2),
    "lm with noise": LanguageModelling(
        label_smoothing=0.1, neftune_alpha=5.0, fim_rate=0.7, fim_ids=(61, 62, 63)
    ),
    "dpo": DPO(beta=0.5, label_smoothing=0.1, nll_weight=0.2),
    "ipo": DPO("ipo", beta=0.5),
    "orpo": ORPO(),
    "simpo": SimPO(nll_weight=0.1),
    "kto": KTO(beta=0.5, undesired_weight=1.3),
    "reward model": RewardModel(),
    "process reward model": ProcessRewardModel(),
    "grpo": GRPO(temperature=0.7),
}


def pairs(rows=8, length=16, seed=0, vocab=64):
    """Pairs of completions of one prompt each; the last pair is empty, as where a batch is filled up."""
    rng = np.random.default_rng(seed)
    shape = (rows, length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    batch |= {
        name: np.zeros(shape, np.float32)
        for name in ("loss_weights", "step_labels", "sampler_logprobs", "advantages")
    }
    for pair in range(rows // 2 - 1):
        prompt = rng.integers(1, vocab, rng.integers(2, 5))
        for row in (2 * pair, 2 * pair + 1):
            completion = rng.integers(1, vocab, rng.integers(2, length - 4))
            document = np.concatenate([prompt, completion])
            n, first = len(document), len(prompt) - 1
            batch["tokens"][row, :n], batch["targets"][row, : n - 1] = document, document[1:]
            batch["segment_ids"][row, :n], batch["positions"][row, :n] = 1, np.arange(n)
            batch["loss_weights"][row, first : n - 1] = 1
            batch["step_labels"][row, first : n - 1] = rng.random(n - 1 - first)
            batch["sampler_logprobs"][row, first : n - 1] = -4 + rng.normal(size=n - 1 - first)
            batch["advantages"][row, first : n - 1] = rng.normal()
    return batch | {"labels": rng.integers(0, 2, rows).astype(np.int32)}


def random_params(cfg, seed=0):
    params = fresh(cfg)
    keys = jax.random.split(jax.random.key(seed), 2)
    return params | {"reward_head": jax.random.normal(keys[0], params["reward_head"].shape)}


def gradients(cfg, params, reference, batch, microbatches, rules=None, parts=1):
    """{algorithm: (mean gradient, mean loss, weight)}, all in one program."""
    found = {}
    for name, algorithm in ALGORITHMS.items():
        roles = algorithm.roles()
        models = lambda policy, roles=roles: bind(
            dict.fromkeys(roles, cfg), roles, {"policy": policy, "reference": reference}, rules, parts
        )
        prepared = algorithm.prepare(models(params), batch) | {"row": jnp.arange(len(batch["tokens"]))}
        objective = lambda policy, part, a=algorithm, models=models: a.loss(
            models(policy), part, jax.random.key(0)
        )
        grads, (loss, _) = accumulate(objective, params, prepared, microbatches, rules)
        scaled = jax.tree.map(lambda g, w=loss.weight: g / w, grads)
        found[name] = scaled, loss.mean(), loss.weight
    return found


@functools.cache
def alone(cfg):
    params, reference = random_params(cfg), jax.tree.map(lambda x: 1.1 * x, random_params(cfg))
    program = compiled(jit(functools.partial(gradients, cfg, microbatches=1)), params, reference, pairs())
    return params, reference, program, program(params, reference, pairs())


def assert_same(found, wanted, rtol=2e-4, atol=2e-5):
    for name, (grads, loss, weight) in wanted.items():
        assert float(found[name][2]) == pytest.approx(float(weight), rel=1e-6), name
        assert float(found[name][1]) == pytest.approx(float(loss), rel=1e-5), name
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name),
            found[name][0],
            grads,
        )


@pytest.mark.parametrize("cfg", [DENSE, pytest.param(MOE, marks=pytest.mark.slow)], ids=["dense", "moe"])
def test_four_microbatches_give_the_gradient_of_one(cfg):
    params, reference, _, wanted = alone(cfg)
    run = jit(functools.partial(gradients, cfg, microbatches=4, parts=4))
    assert_same(run(params, reference, pairs()), wanted)


@pytest.mark.parametrize("cfg", [DENSE, pytest.param(MOE, marks=pytest.mark.slow)], ids=["dense", "moe"])
def test_padding_and_empty_pairs_change_nothing(cfg):
    params, reference, _, wanted = alone(cfg)
    wider = {name: np.zeros((12, *[24] * (x.ndim - 1)), x.dtype) for name, x in pairs().items()}
    for name, x in pairs().items():
        wider[name][tuple(slice(0, n) for n in x.shape)] = x
    run = jit(functools.partial(gradients, cfg, microbatches=1))
    assert_same(run(params, reference, wider), wanted)


@pytest.mark.parametrize(
    ("cfg", "axes"),
    [
        (DENSE, {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param(MOE, {"data": 2, "fsdp": 2, "expert": 2}, marks=pytest.mark.slow),
    ],
    ids=["dense", "moe"],
)
def test_eight_devices_give_the_gradient_of_one(cfg, axes):
    params, reference, one, wanted = alone(cfg)
    mesh = make_mesh(MeshSpec(**{"data": 1} | axes))
    with jax.set_mesh(mesh):
        layout = param_shardings(cfg, mesh, RULES)
        placed = [jax.device_put(tree, layout) for tree in (params, reference)]
        batch = place_batch(pairs(), mesh, RULES)
        program = compiled(
            jit(functools.partial(gradients, cfg, microbatches=1, rules=RULES)), *placed, batch
        )
        found = jax.device_get(program(*placed, batch))
    assert_divided(one, program, 0.4, 0.7)
    assert_same(found, wanted, rtol=1e-3, atol=3e-4)


def test_the_reference_point_of_kto_is_that_of_completions_behind_other_prompts():
    batch = pairs(rows=8)
    swapped = jax.device_get(mismatched({k: jnp.asarray(v) for k, v in batch.items()}))
    for row in range(8):
        before = (row - 1) % 8
        counted = np.flatnonzero(batch["loss_weights"][row])
        if not len(counted) or not batch["loss_weights"][before].any():
            assert not swapped["loss_weights"][row].any()
            continue
        prompt = batch["tokens"][before][: np.flatnonzero(batch["loss_weights"][before])[0] + 1]
        completion = batch["targets"][row][counted]
        document = np.concatenate([prompt, completion])[:17]
        n = len(document) - 1
        np.testing.assert_array_equal(swapped["tokens"][row, :n], document[:-1])
        np.testing.assert_array_equal(swapped["targets"][row, :n], document[1:])
        weights = np.zeros(16)
        weights[len(prompt) - 1 : n] = 1
        np.testing.assert_array_equal(swapped["loss_weights"][row], weights)
        assert swapped["segment_ids"][row].sum() == n


def test_kto_is_its_formula_on_the_models_log_probabilities():
    params, reference, _, wanted = alone(DENSE)
    batch = pairs()

    def logprob(weights, row_batch):
        models = bind({"policy": DENSE}, {"policy": Role(trained=True)}, {"policy": weights})
        scores = models["policy"].scored(row_batch).scores
        return np.asarray((scores.logprobs * row_batch["loss_weights"]).sum(1))

    other = {k: np.asarray(v) for k, v in mismatched({k: jnp.asarray(v) for k, v in batch.items()}).items()}
    real, real_other = (x["loss_weights"].any(axis=1) for x in (batch, other))
    z = max(0.0, float((logprob(params, other) - logprob(reference, other))[real_other].mean()))
    ratio = logprob(params, batch) - logprob(reference, batch)
    expected = losses.kto(ratio, np.zeros(8), batch["labels"] == 1, jnp.asarray(z), 0.5, 1.0, 1.3)
    assert float(wanted["kto"][1]) == pytest.approx(float(np.asarray(expected)[real].mean()), rel=1e-4)


def test_a_reward_is_read_at_the_last_token_of_a_completion():
    batch = pairs()
    places = np.broadcast_to(np.arange(16, dtype=np.float32), (8, 16))
    read = np.asarray(at_end(jnp.asarray(places), {k: jnp.asarray(v) for k, v in batch.items()}))
    lengths = batch["segment_ids"].sum(axis=1)
    np.testing.assert_array_equal(read, np.maximum(lengths - 1, 0))
    cut = {k: v[:, :6] if v.ndim == 2 else v for k, v in batch.items()}  # the next token is in no row
    read = np.asarray(at_end(jnp.asarray(places[:, :6]), {k: jnp.asarray(v) for k, v in cut.items()}))
    np.testing.assert_array_equal(read, np.minimum(np.maximum(lengths - 1, 0), 5))


def test_the_loss_of_a_chosen_algorithm_has_no_gradient_through_what_it_prepares():
    """Else a reference that is the policy itself would cancel the policy's own gradient."""
    params = random_params(DENSE)
    batch = {k: jnp.asarray(v) for k, v in pairs().items()}
    algorithm = dataclasses.replace(ALGORITHMS["dpo"], label_smoothing=0.0, nll_weight=0.0)
    roles = algorithm.roles()
    both = lambda p: bind(dict.fromkeys(roles, DENSE), roles, {"policy": p, "reference": p})

    def loss(p):
        return algorithm.loss(both(p), algorithm.prepare(both(p), batch), jax.random.key(0))[0].mean()

    value, grads = jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(np.log(2), rel=1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-3

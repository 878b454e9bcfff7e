"""Objectives are the same numbers whether the logits of their targets are ever in memory or not."""

import jax
import numpy as np
import pytest

from model import ShardingRules
from model.kernels import cross_entropy
from tests.meshes import assert_divided, compiled
from tests.policy import language_modelling, objective_of
from train.algorithms import GRPO
from train.config import MeshSpec
from train.mesh import make_mesh, param_shardings, place_batch
from train.step import accumulate

from .test_experts import fresh, jit
from .test_mtp import model
from .test_step import packed_batch

RULES = ShardingRules(kv_heads=(), act_kv_heads=())  # there is one


def rl_batch():
    batch, rng = packed_batch(), np.random.default_rng(1)
    of_tokens = lambda: rng.normal(size=batch["tokens"].shape).astype(np.float32)
    return batch | {"sampler_logprobs": of_tokens() - 4, "advantages": of_tokens()}


OBJECTIVES = {
    "pretraining": lambda rules: language_modelling(model(1), rules, z_loss=1e-2),
    "rl": lambda rules: objective_of(GRPO(temperature=0.7), model(1), rules),
}


@pytest.mark.parametrize(
    "name",
    [name if i == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(OBJECTIVES)],
)
def test_a_mesh_in_tiles_gives_the_loss_and_gradient_of_whole_logits(name, monkeypatch):
    cfg, batch = model(1), rl_batch()
    params = fresh(cfg)
    gradient = lambda n, rules: jit(lambda p, b: accumulate(OBJECTIVES[name](rules), p, b, n, rules))
    alone = compiled(gradient(2, None), params, batch)
    wanted, (loss, metrics) = alone(params, batch)
    monkeypatch.setattr(cross_entropy, "WHOLE_LOGITS_BYTES", 0)
    mesh = make_mesh(MeshSpec(data=1, fsdp=2, tensor=2, context=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(cfg, mesh, RULES))
        rows = place_batch(batch, mesh, RULES)
        program = compiled(gradient(2, RULES), placed, rows)
        split, (split_loss, split_metrics) = program(placed, rows)
    assert_divided(alone, program, 0.3, 0.6)
    assert float(split_loss.total) == pytest.approx(float(loss.total), rel=1e-5)
    for key, value in metrics.items():
        assert float(split_metrics[key].total) == pytest.approx(float(value.total), rel=1e-5), key
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-4), split, wanted)

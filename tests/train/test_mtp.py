"""Training on later tokens: the loss is its formula however the batch is cut, and a module learns what it should."""

import json

import jax
import numpy as np
import pytest

from model import RMSNorm, ShardingRules, decoder
from model.readouts.mtp import ParallelMTP, SequentialMTP
from tests.meshes import assert_divided, compiled
from tests.model.conftest import applied
from tests.policy import adamw, language_modelling, policy_state, policy_step
from train.config import MeshSpec
from train.mesh import make_mesh, param_shardings, place_batch
from train.presets import MTP, Llama, Mixture
from train.schedules import Cosine
from train.step import accumulate
from train.trainer import train

from .conftest import make_config
from .test_experts import fresh, jit
from .test_step import packed_batch

SPEC = Llama(16, 1, 2, 1, 8, ffn_width=24)
RULES = ShardingRules(kv_heads=(), act_kv_heads=())  # there is one


def model(tokens=2, layout="sequential"):
    cfg = decoder(64, 16, 1, 2, 1, 8, 24)
    return MTP(tokens, layout).put_into(cfg)


def test_the_loss_is_the_formula_written_as_loops():
    cfg, batch = model(2), packed_batch(rows=4)
    params = fresh(cfg)
    loss, metrics = jit(language_modelling(cfg, mtp_weight=0.4))(params, batch)
    out = jit(applied, static_argnums=0)(
        cfg, params, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    logprobs = [np.asarray(jax.nn.log_softmax(logits)) for logits in (out.logits, *out.mtp_logits)]
    lost, counted, right = np.zeros(3), np.zeros(3), np.zeros(3)
    for row in range(4):
        for i in range(16):
            for k in range(3):
                same = i + k < 16 and batch["segment_ids"][row, i] == batch["segment_ids"][row, i + k] != 0
                if same and batch["loss_weights"][row, i + k]:
                    target = batch["targets"][row, i + k]
                    lost[k] -= logprobs[k][row, i, target]
                    counted[k] += 1
                    right[k] += logprobs[k][row, i].argmax() == target
    assert float(loss.weight) == counted[0]
    assert float(loss.total) == pytest.approx(lost[0] + 0.4 * (lost[1] + lost[2]) / 2, rel=1e-5)
    for k in (1, 2):
        nll, accuracy = metrics[f"mtp_{k}_nll"], metrics[f"mtp_{k}_accuracy"]
        assert float(nll.total) == pytest.approx(lost[k], rel=1e-5)
        assert float(nll.weight) == float(accuracy.weight) == counted[k] > 0
        assert float(accuracy.total) == right[k]
    assert float(metrics["nll"].total) == pytest.approx(lost[0], rel=1e-5)


def test_without_weight_it_is_not_there():
    cfg, batch = model(1), packed_batch(rows=4)
    grads, (loss, metrics) = jit(lambda p, b: accumulate(language_modelling(cfg, mtp_weight=0), p, b, 1))(
        fresh(cfg), batch
    )
    assert set(metrics) == {"nll"} and float(loss.total) == float(metrics["nll"].total)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads["mtp_1"]))


def same_gradient(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-4), found, wanted)


@pytest.mark.slow
def test_cutting_and_splitting_the_batch_changes_neither_loss_nor_gradient():
    cfg, batch = model(2), packed_batch()
    params = fresh(cfg)
    gradient = lambda n, rules: jit(lambda p, b: accumulate(language_modelling(cfg, rules), p, b, n, rules))
    alone = compiled(gradient(2, None), params, batch)
    wanted, (loss, metrics) = alone(params, batch)
    mesh = make_mesh(MeshSpec(data=1, fsdp=2, tensor=2, context=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(cfg, mesh, RULES))
        rows = place_batch(batch, mesh, RULES)
        program = compiled(gradient(2, RULES), placed, rows)
        found, (split, split_metrics) = program(placed, rows)
    assert_divided(alone, program, 0.3, 0.6)
    assert float(split.total) == pytest.approx(float(loss.total), rel=1e-5)
    assert float(split.weight) == float(loss.weight)
    for name, value in metrics.items():
        assert float(split_metrics[name].total) == pytest.approx(float(value.total), rel=1e-5)
    same_gradient(found, wanted)


@pytest.mark.slow
def test_packing_changes_neither_loss_nor_gradient():
    """Each document in a row of its own, against two in a row."""
    cfg, batch = model(2), packed_batch(rows=4)
    params, apart = fresh(cfg), {key: np.zeros((8, 16), value.dtype) for key, value in batch.items()}
    for row in range(4):
        for segment in (1, 2):
            of_document = batch["segment_ids"][row] == segment
            for key, value in batch.items():
                apart[key][2 * row + segment - 1, : of_document.sum()] = value[row, of_document]
    gradient = lambda b: jit(lambda p, b: accumulate(language_modelling(cfg), p, b, 1))(params, b)
    (wanted, (loss, _)), (found, (alone, _)) = gradient(batch), gradient(apart)
    assert float(alone.total) == pytest.approx(float(loss.total), rel=1e-5)
    assert float(alone.weight) == float(loss.weight)
    same_gradient(found, wanted)


def triples(rows=32, seed=0):
    """Two random numbers below 5, then their sum modulo 5, each kind with tokens of its own, again and again.

    Only the sum counts as a target: at the second number for the next token, at the first for the one after it.
    """
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 5, (2, rows, 6))
    tokens = np.stack([x, y + 5, (x + y) % 5 + 10], axis=-1).reshape(rows, 18).astype(np.int32)
    at = np.broadcast_to(np.arange(17), (rows, 17))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": (at % 3 == 1).astype(np.float32),
        "segment_ids": np.ones((rows, 17), np.int32),
        "positions": at.astype(np.int32),
    }


def trained(kind, steps=250):
    cfg = model(1, kind).replace(vocab_size=15)
    optimizer = adamw(cfg, steps, Cosine(10), peak_lr=1e-2, weight_decay=0.0)
    step, state = jit(policy_step(cfg, optimizer)), policy_state(fresh(cfg), optimizer)
    for i in range(steps):
        state, _ = step(state, triples(seed=i))
    _, metrics = jit(language_modelling(cfg))(state.params["policy"], triples(rows=64, seed=10_000))
    return {name: float(value.mean()) for name, value in metrics.items()}


@pytest.mark.slow
def test_a_module_that_reads_the_next_token_learns_to_say_the_one_after_it():
    """At the first number the sum is known to who also reads the second, to others not: one in five is right."""
    reads, does_not = trained("sequential"), trained("parallel")
    assert reads["nll"] < 0.05 and does_not["nll"] < 0.05  # both know the sum at the second number
    assert reads["mtp_1_accuracy"] > 0.95 and reads["mtp_1_nll"] < 0.2
    assert does_not["mtp_1_accuracy"] < 0.4 and does_not["mtp_1_nll"] > np.log(5) - 0.1


def test_a_config_makes_mtp_of_blocks_like_the_last():
    moe = {"num_experts": 4, "dense_layers": 1, "balance_rate": 1e-3}
    cfg = Mixture(16, 2, 2, 1, 8, ffn_width=12, norm_eps=1e-4, **moe, mtp=MTP(2)).build(64)
    assert cfg.mtp == SequentialMTP(cfg.blocks[-1:] * 2, RMSNorm(1e-4))
    assert Llama().build(64).mtp is None
    parallel = Llama(mtp=MTP(1, "parallel")).build(64)
    assert parallel.mtp == ParallelMTP(parallel.blocks[-1:])
    with pytest.raises(ValueError, match="tokens=-1; wanted at least 0"):
        MTP(-1)


@pytest.mark.slow
def test_experts_of_a_module_are_balanced_with_the_others():
    cfg = Mixture(16, 1, 2, 1, 8, ffn_width=12, num_experts=4, balance_rate=1e-3, mtp=MTP(1)).build(64)
    optimizer = adamw(cfg)
    state = policy_state(fresh(cfg), optimizer)
    state, metrics = jit(policy_step(cfg, optimizer))(state, packed_batch(rows=2))
    moved = state.params["policy"]["mtp_1"]["block_0"]["ffn"]["choice_bias"]
    assert np.max(np.abs(moved)) == pytest.approx(1e-3)
    assert float(metrics["moe_entropy"].weight) == 2 * (packed_batch(rows=2)["segment_ids"] > 0).sum()


@pytest.mark.slow
def test_a_run_trains_it_from_scratch_and_logs_it(corpus, tmp_path):
    """Counting: the token after the next is two more."""
    final = train(make_config(corpus, model={"mtp": {"tokens": 1}}), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], [row for row in rows if row["split"] == "train"][-1]
    assert last["mtp_1_nll"] < first["mtp_1_nll"] - 1 and final["validation_mtp_1_accuracy"] > 0.3
    assert last["loss"] == pytest.approx(last["nll"] + 0.3 * last["mtp_1_nll"] * last_share(), rel=0.1)


def last_share():
    """Of the next tokens that also have one after them: documents have 12 tokens."""
    return 10 / 11

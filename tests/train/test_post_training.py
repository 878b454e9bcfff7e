"""Post-training through the trainer: preferences and rewards are learned, from any start and in any precision."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import configs
import data
import model
from data.conversations import ConversationConfig, write_conversations
from data.shards import TokenRecord, write_dataset
from model.adapters import is_adapter
from model.formats.convert import convert
from model.weights import is_quantized
from train.config import TrainConfig
from train.learner import Learner
from train.setup import prepare_run
from train.teacher import TeacherCache, TeacherConfig, write_cache
from train.trainer import train

from .conftest import leaves, make_config

MESH = {"mesh": {"data": 8, "fsdp": 1}, "sharding": {"vocab": []}}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """After four rising numbers the better answer falls again, and the worse one goes on rising.

    The model of `uninterrupted` goes on rising. Held-out prompts start where no training prompt does.
    """
    root = tmp_path_factory.mktemp("answers")
    rng, record = np.random.default_rng(0), lambda tokens: TokenRecord(tokens, np.arange(7) >= 4)
    held_out = np.arange(12, 60, 6)
    starts = {"train": np.setdiff1d(np.arange(10, 60), held_out), "validation": held_out}
    for split, numbers in starts.items():
        numbers = rng.choice(numbers, 160)
        up = [np.arange(s, s + 7, dtype=np.int32) for s in numbers]
        back = [np.array([s, s + 1, s + 2, s + 3, s + 2, s + 1, s], np.int32) for s in numbers]
        pairs = [(record(better), record(worse)) for better, worse in zip(back, up, strict=True)]
        write_dataset(root / "pairs" / split, pairs, "preference")
        labelled = [(r, good) for pair in pairs for r, good in zip(pair, (1, 0), strict=True)]
        write_dataset(root / "labelled" / split, labelled, "labelled")
    # the planted preference of a reward model: of answers of random numbers the better one has the number 5
    for split, count in (("train", 800), ("validation", 160)):
        numbers = rng.integers(10, 60, (count, 2, 7)).astype(np.int32)
        numbers[:, 1, :4] = numbers[:, 0, :4]
        numbers[np.arange(count), 0, rng.integers(4, 7, count)] = 5
        write_dataset(root / "planted" / split, [tuple(map(record, pair)) for pair in numbers], "preference")
    return root


def tuned(corpus, answers, start, algorithm, kind="pairs", **changes):
    folder = lambda split: {str(answers / kind / split): 1.0}
    base = {
        "init_from": str(start),
        "tokenizer": None,
        "steps": 40,
        "algorithm": algorithm,
        "data": {
            "mixture": folder("train"),
            "validation": folder("validation"),
            "batch_size": 32,
            "seq_len": 8,
        },
        "optimizer": {"peak_lr": 3e-3, "weight_decay": 0.0},
        "checkpoint": {"every": 40},
    }
    for key, value in changes.items():
        base[key] = (
            base[key] | value if isinstance(base.get(key), dict) and isinstance(value, dict) else value
        )
    return make_config(corpus, **(MESH | base))


# Conservative DPO, hinge and IPO have their optimum at a finite margin: log(9) / beta, 1 / beta, and 1 / (2 beta) a
# token. The start prefers the worse answers by tens of nats, so beta is small enough to go beyond that.
METHODS = {
    "DPO": {"kind": "DPO"},
    "conservative DPO": {"kind": "DPO", "label_smoothing": 0.1, "beta": 0.02},
    "robust DPO": {"kind": "DPO", "variant": "robust", "label_smoothing": 0.1},
    "hinge": {"kind": "DPO", "variant": "hinge", "beta": 0.01},
    "IPO": {"kind": "DPO", "variant": "ipo", "beta": 0.02},
    "ORPO": {"kind": "ORPO", "beta": 0.5},
    "SimPO": {"kind": "SimPO"},
    "KTO": {"kind": "KTO"},
}
QUICK = ("DPO", "SimPO", "KTO")


def prefers_the_better(path, answers):
    """The share of held-out pairs whose better answer is likelier."""
    cfg, params = model.load(path)
    pairs = list(data.open_dataset(answers / "pairs" / "validation"))
    tokens = np.stack([record.tokens for pair in pairs for record in pair])
    logprobs = jax.nn.log_softmax(model.apply(cfg, params, tokens[:, :-1]).logits)
    chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[:, 3:, 0].sum(axis=1)
    return float((chosen[0::2] > chosen[1::2]).mean())


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=[] if name in QUICK and seed == 0 else pytest.mark.slow)
        for name in METHODS
        for seed in range(3)
    ],
)
def test_each_method_lifts_the_accuracy_on_held_out_preferences(
    corpus,
    answers,
    uninterrupted,
    tmp_path,
    name,
    seed,
):
    kind = "labelled" if name == "KTO" else "pairs"
    steps = {"steps": 80} if name in ("ORPO", "IPO") else {}
    config = tuned(corpus, answers, uninterrupted[0], METHODS[name], kind, seed=seed, **steps)
    train(config, tmp_path)
    assert prefers_the_better(uninterrupted[0], answers) < 0.2
    assert prefers_the_better(tmp_path, answers) > 0.8


def test_a_reward_model_ranks_held_out_pairs_and_loads_with_its_head(
    corpus,
    answers,
    uninterrupted,
    tmp_path,
):
    config = tuned(corpus, answers, uninterrupted[0], {"kind": "RewardModel"}, "planted", steps=120)
    final = train(config, tmp_path / "reward")
    assert final["validation_accuracy"] > 0.9 and final["validation_brier"] < 0.1
    cfg, params = model.load(tmp_path / "reward")
    assert [head.name for head in cfg.heads] == ["reward"]
    pairs = list(data.open_dataset(answers / "planted" / "validation"))
    tokens = np.stack([record.tokens for pair in pairs for record in pair])
    rewards = np.asarray(model.apply(cfg, params, tokens).heads["reward"])[:, -1]
    assert (rewards[0::2] > rewards[1::2]).mean() > 0.9
    # the rewards of a pair are centred
    assert abs(rewards.mean()) < 0.5 * np.abs(rewards).mean()


@pytest.mark.parametrize("adapters", [{"kind": "LoRA", "rank": 4}, {"kind": "QLoRA", "rank": 4, "block": 16}])
def test_a_reference_of_new_adapters_is_the_policy_without_them_and_takes_no_memory(
    corpus,
    answers,
    uninterrupted,
    tmp_path,
    adapters,
):
    config = tuned(corpus, answers, uninterrupted[0], {"kind": "DPO"}, adapters=adapters)
    setup = prepare_run(config)
    learner = Learner(config, setup.plan, setup.tokenizer)
    assert not learner.frozen and learner.plan.roles["reference"].without_adapters
    full = prepare_run(tuned(corpus, answers, uninterrupted[0], {"kind": "DPO"}))
    other = Learner(full.config, full.plan, full.tokenizer)
    bytes_of = lambda *trees: sum(x.nbytes for x in jax.tree.leaves(trees))
    base = bytes_of(other.params)
    assert bytes_of(other.frozen) == base
    held, adapters_alone = bytes_of(learner.state.params, learner.frozen), bytes_of(learner.averaged_params())
    assert held < 1.5 * base and adapters_alone == 0
    batch = {k: jnp.asarray(v) for k, v in next(data.make_run_batches(config.data, 4, "preference")).items()}
    with jax.set_mesh(learner.mesh):
        reference = learner.prepare(batch)["reference_logprobs"]
        policy = learner._models(learner.state.params, {}, 1)["policy"].logprobs(batch)
    np.testing.assert_allclose(reference, policy, rtol=1e-4, atol=1e-4)  # new adapters have no effect


def test_a_reference_with_trained_adapters_has_its_own_over_the_same_base(
    corpus,
    answers,
    uninterrupted,
    tmp_path,
):
    """Adapters of an earlier run are trained further; the reference has them as they were."""
    down = {"mixture": {str(corpus / "down"): 1.0}, "validation": {}, "batch_size": 8, "seq_len": 24}
    adapters = {"kind": "LoRA", "rank": 4}
    first = tuned(
        corpus, answers, uninterrupted[0], {"kind": "LanguageModelling"}, adapters=adapters, data=down
    )
    train(first, tmp_path / "first")
    config = tuned(corpus, answers, tmp_path / "first", {"kind": "DPO"}, steps=6)
    setup = prepare_run(config)
    learner = Learner(config, setup.plan, setup.tokenizer)
    assert all(is_adapter(path) for path in flatten_dict(learner.frozen["reference"]))
    batch = {k: jnp.asarray(v) for k, v in next(data.make_run_batches(config.data, 4, "preference")).items()}
    with jax.set_mesh(learner.mesh):
        before = learner.prepare(batch)["reference_logprobs"]
        for _ in range(3):
            learner.step(learner.prepare(batch))
        after = learner.prepare(batch)["reference_logprobs"]
        policy = learner._models(learner.state.params, learner.frozen, 1)["policy"].logprobs(batch)
    np.testing.assert_array_equal(before, after)
    assert np.abs(policy - after).max() > 0.05
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop_at=3)
    assert train(config, tmp_path / "parts")["loss"] == whole["loss"]


def test_qlora_learns_over_a_frozen_base_and_resumes_bit_for_bit(
    corpus,
    answers,
    uninterrupted,
    tmp_path,
):
    adapters = {"kind": "QLoRA", "rank": 8, "block": 16}
    precision = {"params": "bfloat16"}
    config = tuned(
        corpus,
        answers,
        uninterrupted[0],
        {"kind": "DPO"},
        adapters=adapters,
        precision=precision,
        steps=60,
        optimizer={"peak_lr": 1e-2},
    )
    train(config, tmp_path / "whole")
    assert prefers_the_better(tmp_path / "whole", answers) > 0.8
    train(config, tmp_path / "parts", stop_at=25)
    train(config, tmp_path / "parts")
    for ours, theirs in zip(leaves(tmp_path / "parts"), leaves(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    flat = flatten_dict(model.load(tmp_path / "whole")[1])
    start = flatten_dict(prepare_run(config).plan.starts["policy"].load())
    for path, leaf in flat.items():
        if is_adapter(path):
            assert leaf.dtype == jnp.bfloat16
        else:
            jax.tree.map(np.testing.assert_array_equal, leaf, start[path])
    weights = [leaf for leaf in flat.values() if is_quantized(leaf)]
    assert all(leaf.kind == "nf4" and leaf.scales.dtype == jnp.uint8 for leaf in weights)
    bits = 8 * sum(leaf.nbytes for leaf in weights) / sum(leaf.size for leaf in weights)
    assert 4 < bits < 4 + 8 / 16 + 32 / 32 + 0.1  # blocks of 16, and an output's step for 32 inputs or more

    def logits(path):
        cfg, params = model.load(path)
        return model.apply(cfg.replace(dtype="float32"), params, np.arange(10, 30)[None]).logits

    for dtype, bound in ((None, 1e-4), ("bfloat16", 0.05)):
        convert(tmp_path / "whole", merged := tmp_path / f"merged_{dtype}", dtype=dtype, slot=0)
        assert not any(map(is_quantized, jax.tree.leaves(model.load(merged)[1], is_leaf=is_quantized)))
        np.testing.assert_allclose(logits(merged), logits(tmp_path / "whole"), rtol=bound, atol=4 * bound)


@pytest.mark.parametrize(
    "key", [{"adapters": {"kind": "QLoRA"}}, {"precision": {"frozen": "nf4"}}], ids=["adapters", "frozen"]
)
def test_blocks_that_do_not_fit_a_model_are_a_mistake_with_its_mend(
    corpus, answers, uninterrupted, tmp_path, key
):
    config = tuned(corpus, answers, uninterrupted[0], {"kind": "DPO"}, steps=1, **key)
    with pytest.raises(
        configs.ConfigError, match="blocks of 64 do not fit its inputs.*config.adapters.block sets"
    ):
        train(config, tmp_path)


@pytest.mark.parametrize("rounding", ["masters", "stochastic"])
def test_bfloat16_parameters_learn_like_float32_ones_and_resume_bit_for_bit(
    corpus,
    uninterrupted,
    tmp_path,
    rounding,
):
    config = make_config(corpus, precision={"params": "bfloat16", "rounding": rounding}, average_decay=0.8)
    final = train(config, tmp_path / "whole")
    assert final["validation_loss"] < uninterrupted[1]["validation_loss"] + 0.3
    assert final["validation_average_loss"] < 3.5
    train(config, tmp_path / "parts", stop_at=13)
    train(config, tmp_path / "parts")
    for ours, theirs in zip(leaves(tmp_path / "parts"), leaves(tmp_path / "whole"), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, theirs)
    other = make_config(corpus, precision={"params": "bfloat16", "rounding": "nearest"}, average_decay=0.8)
    with pytest.raises(configs.ConfigError, match="config.precision"):
        train(other, tmp_path / "parts")


def test_masters_begin_with_every_bit_of_a_float32_source(corpus, uninterrupted):
    precision = {"params": "bfloat16", "rounding": "masters"}
    config = make_config(corpus, init_from=str(uninterrupted[0]), tokenizer=None, precision=precision)
    setup = prepare_run(config)
    state = Learner(config, setup.plan, setup.tokenizer).state
    source = flatten_dict(model.load(uninterrupted[0])[1])
    masters = flatten_dict(state.opt_state["policy"].masters)
    assert {x.dtype for x in flatten_dict(state.params["policy"]).values()} == {jnp.dtype(jnp.bfloat16)}
    for path, kept in flatten_dict(state.params["policy"]).items():
        np.testing.assert_array_equal(masters[path], source[path])
        np.testing.assert_array_equal(kept, source[path].astype(jnp.bfloat16))


def test_any_model_that_can_be_described_can_be_pretrained(corpus, uninterrupted, tmp_path):
    """From its saved form in a file, from an architecture at a path, and by a preset."""
    cfg = model.load_config(uninterrupted[0])
    saved = cfg.to_dict() | {"max_length": 77}
    (tmp_path / "model.json").write_text(json.dumps(saved))
    for spec in (
        {"kind": "Saved", "path": str(tmp_path / "model.json")},
        {"kind": "Saved", "config": saved},
        {"kind": "Saved", "path": str(uninterrupted[0])},
        {
            "kind": "Hybrid",
            "width": 32,
            "layers": 2,
            "attention_every": 2,
            "recurrent_heads": 2,
            "num_kv_heads": 2,
        },
    ):
        config = make_config(corpus, steps=2) if spec["kind"] != "Hybrid" else make_config(corpus, steps=2)
        plain = configs.to_dict(config) | {"model": spec}
        built = prepare_run(configs.build(type(config), plain)).cfg
        assert built.max_length == 77 or "path" in spec or spec["kind"] == "Hybrid"
        if spec["kind"] == "Saved":
            assert built.blocks == cfg.blocks
    plain = configs.to_dict(make_config(corpus, steps=2)) | {"model": {"kind": "Saved", "config": saved}}
    assert train(configs.build(type(config), plain), tmp_path / "run")["step"] == 2
    for wrong, said in (
        ({"kind": "Saved"}, "needs either `path` or `config`"),
        ({"kind": "Saved", "config": {"kind": "Nonsense"}}, "no saved model config"),
    ):
        with pytest.raises(configs.ConfigError, match=said):
            prepare_run(configs.build(type(config), configs.to_dict(config) | {"model": wrong}))


def test_roles_that_do_not_fit_are_refused_with_the_mend(corpus, answers, uninterrupted, tmp_path):
    other = data.train_tokenizer("bpe", [f"word{i} and {i * i} more" for i in range(400)], 340)
    begun = shutil.copytree(uninterrupted[0], tmp_path / "other")
    newest = begun / "checkpoints" / "30" / "tokenizer"
    shutil.rmtree(newest)
    other.save(newest)
    config = tuned(corpus, answers, uninterrupted[0], {"kind": "DPO", "reference": str(begun)})
    with pytest.raises(
        configs.ConfigError, match=r"algorithm.reference=.* has another vocabulary \(340 tokens\)"
    ):
        prepare_run(config)
    missing = tuned(corpus, answers, uninterrupted[0], {"kind": "DPO", "reference": str(tmp_path / "no")})
    with pytest.raises((configs.ConfigError, FileNotFoundError), match="no"):
        prepare_run(missing)
    wrong = tuned(corpus, answers, uninterrupted[0], {"kind": "KTO"}, "pairs")
    with pytest.raises(configs.ConfigError, match="kind 'preference'; batches of kind 'labelled'"):
        prepare_run(wrong)
    hidden = {"kind": "Distillation", "teacher": str(uninterrupted[0]), "hidden_weight": 1.0}
    narrow = make_config(corpus, init_from=str(uninterrupted[0]), algorithm=hidden | {"teacher_width": 16})
    with pytest.raises(configs.ConfigError, match=r"teacher_width=16, and the hidden .* have 32 numbers"):
        prepare_run(narrow)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ({"algorithm": {"kind": "DPO", "beta": math.nan}}, "algorithm.beta=nan is no number"),
        ({"algorithm": {"kind": "DPO", "beta": math.inf}}, "beta=inf; wanted more than 0"),
        ({"algorithm": {"kind": "DPO", "nll_weight": -1}}, "nll_weight=-1.0; wanted at least 0"),
        ({"algorithm": {"kind": "ORPO", "beta": -1}}, "beta=-1.0; wanted at least 0"),
        ({"algorithm": {"kind": "SimPO", "beta": -1}}, "beta=-1.0; wanted more than 0"),
        ({"algorithm": {"kind": "KTO", "beta": 0}}, "beta=0.0; wanted more than 0"),
        ({"algorithm": {"kind": "KTO", "desired_weight": -1}}, "desired_weight=-1.0; wanted at least 0"),
        ({"algorithm": {"kind": "RewardModel", "centring": -1}}, "centring=-1.0; wanted at least 0"),
        (
            {"algorithm": {"kind": "Distillation", "teacher": "t", "temperature": 0}},
            "temperature=0.0; wanted more than 0",
        ),
        ({"optimizer": {"peak_lr": -1}}, "peak_lr=-1.0; wanted at least 0"),
        ({"optimizer": {"kind": "Muon", "weight_decay": math.inf}}, "weight_decay=inf; wanted at least 0"),
    ],
)
def test_a_number_that_no_run_can_use_is_refused(key, said):
    with pytest.raises(configs.ConfigError, match=re.escape(said)):
        configs.build(TrainConfig, configs.overlay(TrainConfig, key))


def test_kto_refuses_a_batch_without_another_prompt(corpus, answers, uninterrupted):
    config = tuned(corpus, answers, uninterrupted[0], {"kind": "KTO"}, "labelled")
    one = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=1))
    with pytest.raises(configs.ConfigError, match="batch_size=1: KTO compares each row .* Use at least 2"):
        prepare_run(one)


def test_a_narrow_student_learns_a_teachers_distribution_from_the_teacher_and_from_its_cache(
    corpus, uninterrupted, tmp_path
):
    student = {"width": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "ffn_width": 32}
    teacher = {"kind": "Distillation", "teacher": str(uninterrupted[0])}
    base = {"model": student, "steps": 40, "checkpoint": {"every": 40}}
    live = make_config(corpus, algorithm=teacher, **base)
    final = train(live, tmp_path / "live")
    assert final["validation_divergence"] < 1.0 and final["validation_nll"] < 3.0
    cache = TeacherConfig(
        str(uninterrupted[0]), 40, k=250, data=live.data, mesh=live.mesh, sharding=live.sharding
    )
    write_cache(cache, tmp_path / "cache", log=lambda line: None)
    (tmp_path / "cache" / "manifest.json").unlink()  # as if it had been cut off
    (tmp_path / "cache" / "rows-00000200.npz").unlink()
    read = make_config(corpus, algorithm={"kind": "Distillation", "cache": str(tmp_path / "cache")}, **base)
    with pytest.raises(configs.ConfigError, match="no finished cache"):
        train(read, tmp_path / "unfinished")
    write_cache(cache, tmp_path / "cache", log=lambda line: None)
    train(read, tmp_path / "read", stop_at=20)
    again = train(read, tmp_path / "read")
    # 250 of 264 tokens and one more outcome for the rest: nearly the whole distribution, in float16
    rows = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").open()] for run in ("live", "read")
    ]
    ours, theirs = ([row["divergence"] for row in run if row["split"] == "train"] for run in rows)
    np.testing.assert_allclose(theirs, ours, rtol=0.05, atol=0.01)
    assert again["step"] == 40
    assert again["validation_loss"] == again["validation_nll"] < 3.0 and "validation_divergence" not in again
    other = make_config(
        corpus, algorithm={"kind": "Distillation", "cache": str(tmp_path / "cache")}, **base, data={"seed": 3}
    )
    with pytest.raises(configs.ConfigError, match="written for other batches"):
        train(other, tmp_path / "other")


def test_a_cache_of_what_datasets_or_the_teacher_held_before_is_refused(corpus, uninterrupted, tmp_path):
    def write_tokens(first):
        rows = [TokenRecord(np.arange(s, s + 12, dtype=np.int32)) for s in range(first, first + 40)]
        shutil.rmtree(tmp_path / "tokens", ignore_errors=True)
        write_dataset(tmp_path / "tokens", rows, "tokens")

    write_tokens(5)
    teacher = shutil.copytree(uninterrupted[0], tmp_path / "teacher")
    data = {"mixture": {str(tmp_path / "tokens"): 1.0}, "validation": {}}
    kind = {"kind": "Distillation", "cache": str(tmp_path / "cache")}
    student = make_config(corpus, algorithm=kind, data=data, steps=2)
    cache = TeacherConfig(
        str(teacher), 2, k=4, data=student.data, mesh=student.mesh, sharding=student.sharding
    )
    write = lambda config=cache: write_cache(config, tmp_path / "cache", log=lambda line: None)
    write()
    TeacherCache(tmp_path / "cache", student.data, 16, 1.0)
    # as many rows, but the files have other ones
    with pytest.raises(configs.ConfigError, match="another teacher or of other batches"):
        write(dataclasses.replace(cache, steps=4, data=dataclasses.replace(cache.data, batch_size=4)))
    write_tokens(6)
    with pytest.raises(configs.ConfigError, match="datasets and what is in them"):
        train(student, tmp_path / "student")
    with pytest.raises(configs.ConfigError, match="another teacher or of other batches"):
        write()
    write_tokens(5)
    shutil.rmtree(teacher / "checkpoints" / "30")  # the one before is another model
    with pytest.raises(configs.ConfigError, match="another teacher or of other batches"):
        write()


def test_hidden_states_of_a_wider_teacher_are_matched_through_a_map(corpus, uninterrupted, tmp_path):
    student = {"width": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "ffn_width": 32}
    algorithm = {"kind": "Distillation", "teacher": str(uninterrupted[0]), "hidden_weight": 0.5}
    config = make_config(corpus, model=student, algorithm=algorithm | {"teacher_width": 32}, steps=30)
    train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    seen = [row["hidden"] for row in rows if row["split"] == "train"]
    assert seen[-1] < 0.75 * seen[0]  # 32 numbers from 16
    with pytest.raises(configs.ConfigError, match="give both, or neither"):
        make_config(corpus, algorithm=algorithm)
    with pytest.raises(configs.ConfigError, match="needs either `teacher` or `cache`"):
        make_config(corpus, algorithm={"kind": "Distillation"})


def planted_steps(count, seed):
    """Four steps "n m"; right ones count up by one. From the planted wrong step on, no step is right any more."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        wrong, at, steps = int(rng.integers(0, 5)), int(rng.integers(0, 5)), []
        for i in range(4):
            good = i != wrong
            steps.append(f"{at} {at + 1 if good else (at + rng.integers(3, 8)) % 10}")
            at = at + 1
        rows.append({"prompt": "Count.", "completions": steps, "labels": [i < wrong for i in range(4)]})
    return rows


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_a_process_reward_model_finds_the_planted_wrong_step(tmp_path, seed):
    tokenizer = data.train_tokenizer("bpe", ["Count. 0 1 2 3 4 5 6 7 8 9\n"] * 20, 264, digits=1)
    tokenizer.save(tmp_path / "tokenizer")
    for split, count in (("train", 600), ("validation", 120)):
        rows = planted_steps(count, seed + 10 * (split == "validation"))
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        wanted = ConversationConfig((str(tmp_path / f"{split}.jsonl"),), str(tmp_path / "tokenizer"))
        write_conversations(wanted, tmp_path / split)
    mixture = lambda split: {str(tmp_path / split / "steps" / "train"): 1.0}
    config = configs.build(
        TrainConfig,
        {
            "algorithm": {"kind": "ProcessRewardModel"},
            "tokenizer": str(tmp_path / "tokenizer"),
            "steps": 250,
            "seed": seed,
            "model": {
                "width": 32,
                "layers": 2,
                "num_heads": 2,
                "num_kv_heads": 1,
                "head_dim": 16,
                "ffn_width": 64,
            },
            "data": {
                "mixture": mixture("train"),
                "validation": mixture("validation"),
                "seq_len": 64,
                "batch_size": 32,
            },
            "optimizer": {"peak_lr": 1e-2, "weight_decay": 0.0},
            "schedule": {"warmup_steps": 10},
            "mesh": {"data": 8},
        },
    )
    final = train(config, tmp_path / "run")
    assert final["validation_accuracy"] > 0.9
    cfg, params = model.load(tmp_path / "run")
    found = 0
    for record, labels in data.open_dataset(tmp_path / "validation" / "steps" / "train"):
        logits = model.apply(cfg, params, record.tokens[None]).heads["reward"][0][record.mask]
        first = lambda right: int(np.argmin([*right, False]))
        found += first(np.asarray(logits) > 0) == first(labels > 0.5)
    assert found / 120 > 0.8


def test_fine_tuning_says_what_it_costs_on_the_text_that_the_model_knew(
    corpus, uninterrupted, tmp_path, capsys
):
    down = {"mixture": {str(corpus / "down"): 1.0}, "validation": {}}
    start = {"init_from": str(uninterrupted[0]), "tokenizer": None}
    known = str(corpus / "unseen_tokens")  # the validation data of that run
    final = train(make_config(corpus, **start, data=down, steps=20), tmp_path / "tuned")
    found = json.loads((tmp_path / "tuned" / "forgetting.json").read_text())
    assert found["before"][known]["nll"] == pytest.approx(uninterrupted[1]["validation_loss"], abs=0.05)
    assert final["forgetting"] == found["after"][known]["nll"] - found["before"][known]["nll"] > 0.5
    assert f"forgetting on {known}" in capsys.readouterr().out
    still = make_config(corpus, **start, data=down, steps=2, optimizer={"peak_lr": 0.0})
    assert train(still, tmp_path / "still")["forgetting"] == 0.0
    gone = make_config(corpus, **start, data=down, forgetting={"mixture": {str(tmp_path / "gone"): 1.0}})
    with pytest.raises(configs.ConfigError, match="gone is no dataset"):
        train(gone, tmp_path / "gone_run")
    assert "forgetting" not in uninterrupted[1]

"""The trainer end to end on a tiny task: it learns, resumes bit for bit, moves to another mesh, says what is wrong."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import configs
import data
import model
from configs.exits import Stopped
from configs.paths import complete_steps
from data.shards import TokenRecord, write_dataset
from data.tokenize import write_chat_dataset
from model import WeightedSum
from model.adapters import drop_adapters, merge_adapter, split_trained
from model.generate import generate
from model.logprobs import token_logprobs
from rl.config import RLConfig
from tests.policy import adamw, policy_state
from train import checkpoints, trainer
from train.config import Precision, SampleSpec, TrainConfig
from train.learner import Learner
from train.metrics import MetricsLog, Window, write_result
from train.optimizers import Lion
from train.references import fingerprint
from train.sampling import draw_samples
from train.setup import prepare_run
from train.stopping import Stopping
from train.trainer import TrainingDiverged, train

from .conftest import leaves, make_config


def test_a_tiny_model_learns_to_count(uninterrupted):
    workdir, final = uninterrupted
    assert final["step"] == 30
    assert final["validation_loss"] < 2.5 < np.log(320)  # of log(320) = 5.8 nats at the start
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["split"] == "train"] == [5, 10, 15, 20, 25, 30]
    rows = [r for r in rows if r["split"] == "train"]
    assert all(r["tokens_per_second"] > 0 and (r["mfu"] is None or 0 < r["mfu"] <= 1) for r in rows)


def test_a_finished_run_given_again_says_the_same_once(corpus, tmp_path):
    config = make_config(corpus, steps=4)
    first, again = train(config, tmp_path), train(config, tmp_path)
    assert again["validation_loss"] == first["validation_loss"] and again["step"] == 4
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "validation"] == [4]


def test_a_result_stays_whole_if_the_finished_command_is_given_again(tmp_path):
    read = lambda: json.loads((tmp_path / "result.json").read_text())
    write_result(tmp_path, {"loss": 2.0, "mfu": None, "margin": math.nan, "step": 4})
    assert read() == {"loss": 2.0, "mfu": None, "margin": None, "step": 4}
    write_result(tmp_path, {"validation_loss": 3.0, "step": 4})
    assert read() == {"loss": 2.0, "mfu": None, "margin": None, "step": 4, "validation_loss": 3.0}
    write_result(tmp_path, {"loss": 1.0, "step": 8})
    assert read() == {"loss": 1.0, "step": 8}


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(corpus, uninterrupted, tmp_path):
    train(make_config(corpus), tmp_path, stop_at=13)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["10", "13"]
    final = train(make_config(corpus), tmp_path)
    assert final["step"] == 30
    for ours, theirs in zip(leaves(tmp_path), leaves(uninterrupted[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_data_mixture_that_takes_over_midway_is_planned_learned_and_resumed(corpus, tmp_path, capsys):
    up, down = str(corpus / "tokens"), str(corpus / "down")
    mixture = {"phases": [{"weights": {down: 1.0}, "start": 0.5}], "packing": "best_fit"}
    config = make_config(corpus, data=mixture | {"validation": {str(corpus / "unseen_down"): 1.0}})
    whole = train(config, tmp_path / "whole")
    printed = capsys.readouterr().out
    shown = " ".join(printed.split())
    assert f"1 0 {up} 200 2,400 100.00% 2,880 1.20" in shown  # 120 rows of two documents of 12 tokens
    assert (
        f"2 15 {down} 200 2,400 100.00% 2,880 1.20" in shown and f"packing of {down}: 0.00% padding" in shown
    )
    assert whole["validation_loss"] < 2.5  # counting up alone never shows it how to count down
    train(config, tmp_path / "parts", stop_at=13)
    train(config, tmp_path / "parts", stop_at=20)
    train(config, tmp_path / "parts")
    for ours, theirs in zip(leaves(tmp_path / "parts"), leaves(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_goes_on_on_another_mesh(corpus, uninterrupted, tmp_path):
    train(make_config(corpus), tmp_path, stop_at=20)
    moved = {"data": 2, "fsdp": 2, "tensor": 2}
    sharding = {"embed": ["fsdp"], "vocab": ["tensor"], "kv_heads": [], "act_kv_heads": []}
    train(make_config(corpus, mesh=moved, sharding=sharding), tmp_path)
    for ours, theirs in zip(leaves(tmp_path), leaves(uninterrupted[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)


def test_a_checkpoint_says_all_about_itself(corpus, uninterrupted):
    workdir, _ = uninterrupted
    cfg, params = model.load(workdir)
    tokenizer = data.load_tokenizer(workdir)
    assert tokenizer.encode("the cat") == data.load_tokenizer(corpus / "tokenizer").encode("the cat")
    assert tokenizer.chat_template == data.load_tokenizer(corpus / "tokenizer").chat_template
    tokens = np.arange(10, 20)[None]
    guesses = np.asarray(model.apply(cfg, params, tokens).logits.argmax(-1))[0]
    assert np.mean(guesses[2:] == np.arange(13, 21)) >= 0.75  # it counts


def test_dpo_learns_to_prefer_the_chosen_answers(corpus, uninterrupted, tmp_path):
    config = make_config(
        corpus,
        algorithm={"kind": "DPO"},
        init_from=str(uninterrupted[0]),
        steps=15,
        data={
            "mixture": {str(corpus / "pairs"): 1.0},
            "validation": {str(corpus / "unseen_pairs"): 1.0},
            "batch_size": 16,
        },
        optimizer={"peak_lr": 1e-3},
        mesh={"data": 8, "fsdp": 1},
        sharding={"vocab": []},
    )
    final = train(config, tmp_path)
    assert final["validation_loss"] < 0.6 < np.log(2)
    assert final["validation_accuracy"] > 0.8


def test_a_reference_that_has_become_another_is_refused_on_resume(corpus, uninterrupted, tmp_path):
    begun = shutil.copytree(uninterrupted[0], tmp_path / "model")
    data = {"mixture": {str(corpus / "pairs"): 1.0}, "validation": {}, "batch_size": 16}
    mesh = {"mesh": {"data": 8, "fsdp": 1}, "sharding": {"vocab": []}}
    config = make_config(corpus, algorithm={"kind": "DPO"}, init_from=str(begun), steps=4, data=data, **mesh)
    train(config, tmp_path / "dpo", stop_at=2)
    said = (tmp_path / "dpo" / "config.json").read_bytes()
    for changes, refusal in (
        ({"optimizer": Lion()}, r"holds the state of another optimizer.* has policy/1/nu/"),
        ({"optimizer": dataclasses.replace(config.optimizer, clip_norm=0.0)}, "of another optimizer"),
        ({"precision": Precision(params="bfloat16")}, "keeps its parameters by config.precision"),
    ):
        with pytest.raises(configs.ConfigError, match=refusal):
            train(dataclasses.replace(config, **changes), tmp_path / "dpo")
    shutil.rmtree(begun / "checkpoints" / "30")  # the newest is now that of step 20
    with pytest.raises(configs.ConfigError, match="is not the reference that this run began with"):
        train(dataclasses.replace(config, log_every=3), tmp_path / "dpo")
    assert (tmp_path / "dpo" / "config.json").read_bytes() == said  # a refused config is not the run's
    shutil.rmtree(tmp_path / "dpo" / "checkpoints")  # killed before the first checkpoint: nothing is done yet
    assert train(config, tmp_path / "dpo", stop_at=1)["step"] == 1


def test_a_fingerprint_is_of_names_shapes_and_bits_alone(uninterrupted):
    _, params = model.load(uninterrupted[0])
    found = fingerprint(params)
    mesh = jax.make_mesh((8,), ("data",))
    place = lambda x: NamedSharding(mesh, P("data") if x.shape[0] % 8 == 0 else P())
    spread = jax.tree.map(lambda x: jax.device_put(x, place(x)), params)
    assert fingerprint(spread) == found
    for change in (
        lambda x: x.at[0].set(x[1]),
        lambda x: x[::-1],
        lambda x: x.astype("bfloat16"),
        lambda x: x.T,
    ):
        assert fingerprint(params | {"embedding": change(params["embedding"])}) != found


def test_a_run_that_has_begun_needs_the_model_that_it_began_from_no_more(corpus, uninterrupted, tmp_path):
    begun = shutil.copytree(uninterrupted[0], tmp_path / "model")
    config = make_config(corpus, init_from=str(begun), tokenizer=None, steps=4)
    train(config, tmp_path / "run", stop_at=2)
    shutil.rmtree(begun)
    assert train(config, tmp_path / "run")["step"] == 4


def test_the_state_holds_the_key_of_its_random_numbers(corpus, uninterrupted, tmp_path):
    keys = []
    for stop in (2, 4):
        train(make_config(corpus, steps=4, seed=7), tmp_path, stop_at=stop)
        setup = prepare_run(make_config(corpus, steps=4, seed=7), tmp_path)
        learner = Learner(setup.config, setup.plan, setup.tokenizer, tmp_path)
        keys.append(np.asarray(learner.state.rng))
        learner.close()
    np.testing.assert_array_equal(keys[0], jax.random.key_data(jax.random.key(7)))
    np.testing.assert_array_equal(keys[0], keys[1])


def test_a_checkpoint_of_an_earlier_version_is_refused_with_what_to_do(corpus, tmp_path, monkeypatch):
    config = make_config(corpus, steps=4, seed=7)
    whole = checkpoints._beside_policy
    earlier = lambda state: {name: part for name, part in whole(state).items() if name != "extra"}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_beside_policy", earlier)
        train(config, tmp_path, stop_at=2)
    with pytest.raises(configs.ConfigError, match=rf"earlier version.*config.init_from={tmp_path}"):
        train(config, tmp_path)


def test_samples_draw_no_token_that_pads_the_vocabulary(corpus, uninterrupted):
    cfg, params = model.load(uninterrupted[0])
    tokenizer = data.load_tokenizer(corpus / "tokenizer")
    assert cfg.vocab_size > tokenizer.vocab_size
    tempting = params | {"embedding": params["embedding"].at[tokenizer.vocab_size :].mul(50.0)}
    spec = SampleSpec(prompts=("the cat", "a dog"), max_new_tokens=8, temperature=2.0)
    rows = draw_samples(cfg, tempting, tokenizer, spec)
    assert len(rows) == 2
    free = generate(cfg, tempting, [[5, 6]], 8, temperature=2.0)
    assert max(free[0]) >= tokenizer.vocab_size  # which it would have drawn


def test_adapters_learn_another_task_while_all_else_stays_as_it_was(corpus, uninterrupted, tmp_path):
    config = make_config(
        corpus,
        init_from=str(uninterrupted[0]),
        adapters={"rank": 8, "alpha": 16.0, "decomposed": True},
        data={"mixture": {str(corpus / "down"): 1.0}, "validation": {str(corpus / "unseen_down"): 1.0}},
        steps=60,
        checkpoint={"every": 60},
    )
    train(config, tmp_path, stop_at=20)
    final = train(config, tmp_path)
    assert final["validation_loss"] < 3.0
    cfg, params = model.load(tmp_path)
    old_cfg, old = model.load(uninterrupted[0])
    base_cfg, base = drop_adapters(cfg, params)
    assert base_cfg == old_cfg and cfg.adapters.rank == 8
    assert all(map(np.array_equal, jax.tree.leaves(base), jax.tree.leaves(old)))
    down = np.arange(40, 30, -1)[None]
    loss = lambda cfg, params: -token_logprobs(model.apply(cfg, params, down[:, :-1]).logits, down[:, 1:])[0]
    before, after = (float(loss(*of)[0, 2:].mean()) for of in ((base_cfg, base), (cfg, params)))
    assert after < before - 2
    assert float(loss(*merge_adapter(cfg, params))[0, 2:].mean()) == pytest.approx(after, abs=1e-3)
    moments = policy_state(params, adamw(cfg)).opt_state
    sizes = [sum(x.size for x in jax.tree.leaves(of)) for of in (moments, split_trained(params)[0])]
    assert sizes[0] == 2 * sizes[1] + 2  # two moments of each, and two counts


def test_a_run_that_stays_not_finite_stops_with_advice(corpus, tmp_path):
    config = make_config(
        corpus,
        optimizer={"peak_lr": 1e30, "clip_norm": 0.0},
        schedule={"warmup_steps": 0},
        max_bad_steps=3,
    )
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row .* Lower config.optimizer.peak_lr"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"batch_size": 12}}, r"batch_size=12 is not a multiple of 8 .* Use 8"),
        ({"data": {"mixture": {}}}, "mixture is empty"),
        ({"tokenizer": None}, "give config.tokenizer"),
        ({"algorithm": {"kind": "DPO"}, "data": {"batch_size": 16}}, "give config.init_from"),
    ],
)
def test_what_does_not_fit_is_met_at_the_door(corpus, tmp_path, changes, said):
    config = make_config(corpus, **changes)
    if not changes.get("data", {"mixture": 1}).get("mixture", 1):
        config = configs.build(
            TrainConfig, configs.to_dict(config) | {"data": configs.to_dict(config.data) | {"mixture": {}}}
        )
    with pytest.raises(ValueError, match=said):
        train(config, tmp_path)


def written_with(tokenizer, folder):
    conversations = [[{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "sat"}]] * 40
    return str(write_chat_dataset(conversations, tokenizer, folder).folder)


@pytest.mark.parametrize("part", ["mixture", "validation"])
def test_a_dataset_of_another_tokenizer_is_refused_before_anything_is_written(corpus, tmp_path, part):
    other = data.train_tokenizer("bpe", ["entirely other words make other merges"] * 20, 264)
    larger = data.train_tokenizer("bpe", [f"word{i} and {i * i} more" for i in range(400)], 340)
    for name, tokenizer, said in (
        ("other", other, r"other was written with another tokenizer .* 264 tokens\) .*check_tokenizer=False"),
        ("larger", larger, r"larger was written with a tokenizer of 340 tokens, and the model has 320 rows"),
    ):
        folder = written_with(tokenizer, tmp_path / name)
        with pytest.raises(configs.ConfigError, match=said):
            train(make_config(corpus, data={part: {folder: 1.0}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = make_config(
        corpus, data={part: {str(tmp_path / "other"): 1.0}, "check_tokenizer": False, "seq_len": 256}
    )
    prepare_run(config)


def test_a_dataset_of_the_runs_own_tokenizer_is_taken(corpus, tmp_path, capsys):
    own = written_with(data.load_tokenizer(corpus / "tokenizer"), tmp_path / "own")
    prepare_run(make_config(corpus, data={"mixture": {own: 1.0}, "validation": {}}))
    assert "not checked" not in capsys.readouterr().out
    prepare_run(make_config(corpus))
    assert "tokens does not name its tokenizer" in capsys.readouterr().out


def test_validation_data_that_give_no_row_are_refused_before_the_first_step(corpus, tmp_path):
    write_dataset(tmp_path / "empty", [], "tokens")
    write_dataset(tmp_path / "long", [TokenRecord(np.arange(30, dtype=np.int32))], "chat")
    for name, said in (("empty", "they hold no tokens"), ("long", r"shortest needs 30\)\. Raise seq_len")):
        config = make_config(corpus, data={"validation": {str(tmp_path / name): 1.0}})
        with pytest.raises(configs.ConfigError, match=said):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_last_validation_that_fails_loses_no_step_and_is_made_up_for(corpus, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk of the validation data is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(trainer._Run, "_validate", fail)
        train(make_config(corpus, steps=3), tmp_path)
    assert complete_steps(tmp_path / "checkpoints") == [3]
    assert train(make_config(corpus, steps=3), tmp_path)["validation_loss"] > 0


def test_a_run_goes_on_with_its_own_model_alone(corpus, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "config.json").read_text()
    narrow = {"width": 48, "layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "ffn_width": 48}
    with pytest.raises(configs.ConfigError, match=r"another model .*: config\.model\.width=48 \(was 32\)\. "):
        train(make_config(corpus, model=narrow), tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    (tmp_path / "config.json").unlink()  # the checkpoint says it alone
    with pytest.raises(configs.ConfigError, match=r"model\.width=48 \(was 32\)"):
        train(make_config(corpus, model=narrow), tmp_path)
    other_ways = {"run": {"remat": "full", "scan": True}}
    assert prepare_run(make_config(corpus, **other_ways), tmp_path).cfg.remat == "full"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model": {"num_heads": 4, "num_kv_heads": 3}},
            r"config\.model: num_kv_heads=3 does not divide num_heads=4",
        ),
        ({"model": {"layers": 0}}, r"config\.model: layers=0"),
        ({"model": {"head_dim": 15}}, r"config\.model: head_dim=15; wanted an even"),
        ({"adapters": {"rank": 0}}, r"config\.adapters: rank=0; wanted at least 1"),
        ({"adapters": {"rank": 2, "targets": []}}, r"config\.adapters: .*targets=\(\)"),
        ({"microbatches": 0}, "config: microbatches=0"),
        ({"log_every": 0}, "config: log_every=0"),
        ({"steps": 0}, "config: steps=0"),
        ({"checkpoint": {"every": 0}}, r"config\.checkpoint: every=0"),
        ({"data": {"batch_size": 0}}, r"config\.data: batch_size=0"),
        ({"data": {"seq_len": 1}}, r"config\.data: seq_len=1"),
        (
            {"model": {"kind": "Mixture", "num_experts": 2, "experts_per_token": 3}},
            "experts_per_token=3; wanted at most",
        ),
    ],
)
def test_a_value_that_means_nothing_is_refused_with_its_key(changes, said):
    with pytest.raises(configs.ConfigError, match=said):
        configs.build(TrainConfig, configs.overlay(TrainConfig, changes))


def test_a_run_without_prompts_or_updates_is_refused_with_its_key():
    for part, key in (
        ("rollout", "prompts"),
        ("rollout", "group"),
        ("algorithm", "minibatches"),
        ("reward", "workers"),
    ):
        with pytest.raises(configs.ConfigError, match=rf"config\.{part}: {key}=0; wanted at least 1"):
            configs.build(RLConfig, configs.overlay(RLConfig, {part: {key: 0}}))


def test_adapters_that_fit_no_map_or_come_twice_are_refused(corpus, uninterrupted, tmp_path):
    spec = {"rank": 2, "targets": ["nosuch"]}
    start = {"init_from": str(uninterrupted[0]), "tokenizer": None}
    with pytest.raises(configs.ConfigError, match=r"targets=\('nosuch',\): no linear map .* mixer/q"):
        train(make_config(corpus, adapters=spec, **start), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    spec = {"rank": 2, "targets": ["q"]}
    train(make_config(corpus, adapters=spec, steps=1, **start), tmp_path / "adapted")
    again = make_config(corpus, adapters=spec, init_from=str(tmp_path / "adapted"), tokenizer=None)
    with pytest.raises(configs.ConfigError, match="has adapters already"):
        train(again, tmp_path / "run")
    wider = make_config(corpus, adapters=spec | {"rank": 4}, steps=2, **start)
    with pytest.raises(configs.ConfigError, match="rank=2.* asks for .*rank=4"):
        train(wider, tmp_path / "adapted")


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_killed_command_given_again_ends_like_one_that_was_not(corpus, uninterrupted, tmp_path, sent):
    config = make_config(corpus, mesh={"data": 1, "fsdp": 1}, sharding={"vocab": []}, steps=400)
    configs.save(config, tmp_path / "wanted.json")
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "train", f"--config={tmp_path / 'wanted.json'}", f"--workdir={workdir}"]
    environment = os.environ | {"XLA_FLAGS": ""}
    root = Path(__file__).resolve().parents[2]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes)
    deadline = time.monotonic() + 200
    while not list(workdir.glob("checkpoints/1?")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    _, said = process.communicate(timeout=120)
    if sent == signal.SIGTERM:
        assert process.returncode == 75 and "the same command goes on" in said
        assert not (workdir / "result.json").exists()
    out = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)
    assert out.returncode == 0, out.stderr
    assert "going on from step" in out.stdout
    assert json.loads((workdir / "result.json").read_text())["step"] == 400


@pytest.mark.parametrize(("sent", "raised"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("during", ["step", "_validate"])
def test_a_run_that_is_asked_to_stop_saves_its_step(corpus, tmp_path, monkeypatch, sent, raised, during):
    config = make_config(corpus, steps=4, validate_every=2)
    owner = Learner if during == "step" else trainer._Run
    plain, second_step = getattr(owner, during), 2 if during == "step" else 1
    calls = []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == second_step:
            os.kill(os.getpid(), sent)
        return plain(self, *args)

    monkeypatch.setattr(owner, during, interrupted)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(raised):
        train(config, tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert complete_steps(tmp_path / "checkpoints") == [2]


def test_a_second_interrupt_ends_the_run_at_once():
    with pytest.raises(KeyboardInterrupt), Stopping() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping.asked == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


def test_a_resumed_run_says_that_a_dataset_was_written_again(corpus, tmp_path, capsys):
    folder = shutil.copytree(corpus / "tokens", tmp_path / "tokens")
    config = make_config(corpus, steps=4)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture={str(folder): 1.0}))
    train(config, tmp_path / "run", stop_at=2)
    train(config, tmp_path / "run", stop_at=3)
    assert "written again" not in capsys.readouterr().out
    shutil.rmtree(folder)
    shutil.copytree(corpus / "down", folder)
    train(config, tmp_path / "run")
    assert f"warning: {folder} was written again since step 3" in capsys.readouterr().out


def test_validation_says_what_it_leaves_out(corpus, tmp_path, capsys):
    long = [TokenRecord(np.arange(5, 5 + n, dtype=np.int32), np.arange(n) > 2) for n in (6, 30, 6, 40, 50)]
    write_dataset(tmp_path / "chat", long, "chat")
    prepare_run(make_config(corpus, data={"validation": {str(tmp_path / "chat"): 1.0}}))
    said = f"3 of 5 records of {tmp_path / 'chat'} are longer than a row and left out of the validation"
    assert said in capsys.readouterr().out


def test_a_metric_of_nothing_is_no_zero():
    window, nothing = Window(), WeightedSum(np.float32(0), np.float32(0))
    window.add({"loss": nothing, "undesired_reward": nothing, "accuracy": WeightedSum.one(np.float32(1))})
    assert window.means() == {"loss": 0.0, "accuracy": 1.0}


def test_a_figure_that_is_not_known_is_null_in_the_log(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, "train", {"loss": 2.0, "mfu": None, "grad_norm": float("inf")})
    log.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 1, "split": "train", "loss": 2.0, "mfu": None, "grad_norm": None}

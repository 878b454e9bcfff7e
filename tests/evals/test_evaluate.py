"""Exact match through the engine, and the command: its files, its table, and what it does not do twice."""

import dataclasses
import json
import subprocess
import sys

import pytest

import configs
from data.tasks import TaskSpec as Task
from data.tasks import extract_answer, generate, score
from evals.config import EvalConfig, LMEval, TaskEval, TextEval
from evals.evaluate import evaluate
from evals.exact import exact_match, prompt_ids
from serve import EngineConfig
from tests.conftest import ROOT
from tests.evals.conftest import SENTENCES
from train.config import MeshSpec

SPELL = TaskEval("spell_backward", {"min_word_len": 3, "max_word_len": 4}, problems=6, max_new_tokens=8)


class Oracle:
    """Answers every prompt from a table, as an engine would."""

    def __init__(self, tokenizer, answers):
        self._tokenizer, self._answers = tokenizer, answers

    def generate(self, requests, progress=None):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        text = self._answers[tuple(request.prompt)]

        class Output:
            finish_reason, error, tokens = "stop", None, self._tokenizer.encode(text)

        Output.text = text
        return Output


def test_accuracy_and_format_are_those_of_known_answers(tokenizer):
    problems = generate([Task(SPELL.name, SPELL.config)], SPELL.split, SPELL.problems, SPELL.seed)
    texts = [f"<answer>{problem.answer}</answer>" for problem in problems[:3]]  # right
    texts += ["<answer>nothing</answer>", f"{problems[4].answer}", "<answer>" + problems[5].answer]
    prompts = [tuple(prompt_ids(SPELL, problem, tokenizer)) for problem in problems]
    oracle = Oracle(tokenizer, dict(zip(prompts, texts, strict=True)))
    result = exact_match(SPELL, lambda length: oracle, tokenizer)
    rows = {row.metric: row for row in result.rows}
    assert (rows["accuracy"].value, rows["accuracy"].n) == (0.5, 6)
    assert rows["accuracy"].stderr == pytest.approx((0.25 / 5) ** 0.5)
    assert rows["format"].value == pytest.approx(4 / 6)
    assert [item["completion"] for item in result.items] == texts


def test_the_engines_answers_are_those_of_plain_greedy_generation(engine, cfg, params, tokenizer):
    from model.generate import generate as plain

    result = exact_match(SPELL, lambda length: engine, tokenizer)
    problems = generate([Task(SPELL.name, SPELL.config)], SPELL.split, SPELL.problems, SPELL.seed)
    prompts = [prompt_ids(SPELL, problem, tokenizer) for problem in problems]
    wanted = plain(cfg, params, prompts, SPELL.max_new_tokens, stop_ids=tokenizer.eos_ids)
    for item, problem, ids in zip(result.items, problems, wanted, strict=True):
        # tokens of padding of the embedding are never sampled by the engine, so compare up to there
        if max(ids) < tokenizer.vocab_size:
            assert item["completion"] == tokenizer.decode(ids)
        assert item["correct"] == (score(problem, extract_answer(item["completion"])) >= 1)


def test_a_task_that_does_not_fit_or_is_unknown_is_a_config_error(engine, tokenizer):
    with pytest.raises(configs.ConfigError, match="spell_backward.*context"):
        exact_match(dataclasses.replace(SPELL, max_new_tokens=1000), lambda length: engine, tokenizer)
    with pytest.raises(configs.ConfigError, match="nearest"):
        exact_match(TaskEval("spell_backwards"), lambda length: engine, tokenizer)

    class NoTemplate:
        def apply_chat_template(self, messages):
            from data import ChatTemplateError

            raise ChatTemplateError("this tokenizer has no chat template")

    with pytest.raises(configs.ConfigError, match="prompt='text'"):
        exact_match(SPELL, lambda length: engine, NoTemplate())


def test_two_tasks_of_one_name_need_labels():
    with pytest.raises(configs.ConfigError, match="label"):
        configs.build(EvalConfig, {"tasks": [{"name": "chain_sum"}, {"name": "chain_sum"}]})
    EvalConfig(tasks=(TaskEval("chain_sum"), TaskEval("chain_sum", label="hard")))


@pytest.fixture
def config(model_folder, tmp_path):
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in SENTENCES))
    sizes = EngineConfig(max_rows=4, prefill_chunk=64, row_buckets=(4,), chunk_buckets=(64,))
    return EvalConfig(
        model=str(model_folder),
        texts={"held-out": str(tmp_path / "held-out.jsonl")},
        text=TextEval(context=64, batch_tokens=256),
        tasks=(SPELL, dataclasses.replace(SPELL, label="text prompt", prompt="text", weight=3.0)),
        engine=dataclasses.replace(sizes, context_buckets=(256,)),
        samples=2,
    )


def test_the_results_hold_rows_samples_config_and_every_item(config, tmp_path):
    results = evaluate(config, tmp_path / "run", log=lambda line: None)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {(row["name"], row["metric"]): row for row in results["rows"]}
    assert rows["held-out", "bits per byte"]["n"] == len(SENTENCES)
    assert rows["held-out", "gzip -9 bits per byte"]["stderr"] is None
    both = rows["all tasks", "format"]
    wanted = rows["spell_backward", "format"]["value"] / 4 + rows["text prompt", "format"]["value"] * 3 / 4
    assert both["value"] == pytest.approx(wanted) and both["n"] == 12
    assert {name: len(items) for name, items in results["samples"].items()} == {
        "held-out": 2,
        "spell_backward": 2,
        "text prompt": 2,
    }
    assert configs.build(EvalConfig, results["config"]) == config
    items = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(items) == len(SENTENCES) + 12
    bits = [i["bits_per_byte"] * i["bytes"] for i in items if i["part"] == "held-out"]
    size = sum(len(text.encode()) for text in SENTENCES)
    assert sum(bits) / size == pytest.approx(rows["held-out", "bits per byte"]["value"])


def test_only_what_is_not_measured_yet_is_measured(config, tmp_path):
    def heard(config):
        lines = []
        results = evaluate(config, tmp_path / "run", log=lines.append)
        return [line.split("] ")[1] for line in lines], results

    first, results = heard(config)
    assert first == ["held-out", "spell_backward", "text prompt"]
    again, same = heard(config)
    assert again == [f"{name}: measured before" for name in first]
    assert same == results
    harder = dataclasses.replace(SPELL, config={"min_word_len": 5, "max_word_len": 6})
    changed, _ = heard(dataclasses.replace(config, tasks=(harder, config.tasks[1])))
    assert changed == ["held-out: measured before", "spell_backward", "text prompt: measured before"]
    (tmp_path / "held-out.jsonl").write_text(json.dumps({"text": "other text"}) + "\n")
    changed, _ = heard(config)
    assert changed[0] == "held-out"


def test_a_run_that_stopped_midway_keeps_its_finished_parts(config, tmp_path, monkeypatch):
    import evals.evaluate as module

    real = module.exact_match

    def stop(task, *rest):
        if task.title == "text prompt":
            raise KeyboardInterrupt
        return real(task, *rest)

    monkeypatch.setattr(module, "exact_match", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, tmp_path / "run", log=lambda line: None)
    monkeypatch.setattr(module, "exact_match", real)
    lines = []
    resumed = evaluate(config, tmp_path / "run", log=lines.append)
    assert [line.endswith("measured before") for line in lines] == [True, True, False]
    whole = evaluate(config, tmp_path / "other", log=lines.append)
    assert resumed["rows"] == whole["rows"]


def test_another_model_at_the_same_path_is_measured_anew(config, cfg, params, model_folder, tmp_path):
    import shutil

    import jax

    import model

    shutil.copytree(model_folder, tmp_path / "model")
    config = dataclasses.replace(config, model=str(tmp_path / "model"), tasks=())
    before = evaluate(config, tmp_path / "run", log=lambda line: None)
    files = {p.name: p.read_bytes() for p in (model_folder / "tokenizer").iterdir()}
    model.save(tmp_path / "model", cfg, jax.tree.map(lambda x: x * 0.5, params), tokenizer=files)
    after = evaluate(config, tmp_path / "run", log=lambda line: None)
    assert before["rows"][0]["value"] != after["rows"][0]["value"]


@pytest.mark.slow  # compiles the engine for two devices
def test_a_model_split_over_two_devices_has_the_same_results(config, tmp_path):
    config = dataclasses.replace(config, tasks=config.tasks[:1])
    whole = evaluate(config, tmp_path / "one", log=lambda line: None)
    split = dataclasses.replace(config, mesh=MeshSpec(data=1, tensor=2))
    split = evaluate(split, tmp_path / "two", log=lambda line: None)
    for one, two in zip(whole["rows"], split["rows"], strict=True):
        assert one["value"] == pytest.approx(two["value"], rel=1e-5)
    answers = [[item["completion"] for item in run["samples"]["spell_backward"]] for run in (whole, split)]
    assert answers[0] == answers[1]


def test_nothing_to_measure_and_no_model_say_what_to_give(config, tmp_path):
    with pytest.raises(configs.ConfigError, match="config.model"):
        evaluate(dataclasses.replace(config, model=""), tmp_path)
    with pytest.raises(configs.ConfigError, match="nothing to measure"):
        evaluate(dataclasses.replace(config, texts={}, tasks=()), tmp_path)
    with pytest.raises(configs.ConfigError, match="no such"):
        evaluate(dataclasses.replace(config, texts={"x": str(tmp_path / "absent")}), tmp_path)


def test_a_package_that_is_missing_is_named(config, tmp_path, monkeypatch):
    import importlib.metadata

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(configs.ConfigError, match="pip install"):
        evaluate(dataclasses.replace(config, lm_eval=LMEval(tasks=("any",))), tmp_path)


def test_the_command_prints_a_table_and_writes_results(config, tmp_path):
    configs.save(config, tmp_path / "eval.json")
    command = [sys.executable, "-m", "evals", f"--config={tmp_path / 'eval.json'}", "--config.tasks=()"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "+-" in done.stdout
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert f"{rows[0]['value']:.2f}" in done.stdout


def test_the_example_config_holds_held_out_tasks():
    config = configs.load(EvalConfig, f"{ROOT / 'configs/evals/core.py'}:some/text")
    assert config.texts == {"held-out text": "some/text"}
    assert config.tasks and all(task.split == "test" for task in config.tasks)

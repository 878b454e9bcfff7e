"""The whole life in one command: its report, its second run, and kills at any moment."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(1500)  # twenty processes start here, one after the other
STAGES = ["corpus", "dialogues"] + [s for m in ("pretrain", "sft", "dpo", "rl") for s in (m, f"eval-{m}")]


ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # a user has no fake devices


def command(workdir):
    script = [sys.executable, "-m", "launch.lifecycle"]
    return [*script, f"--config={ROOT / 'tests' / 'launch' / 'tiny.py'}", f"--workdir={workdir}"]


def done(workdir):
    """{stage: its record} of what is reported as done."""
    records = {p.parent.name: json.loads(p.read_text()) for p in workdir.glob("*/stage.json")}
    return {name: record for name, record in records.items() if record["done"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lifecycle") / "run"
    run = subprocess.run(command(workdir), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert f"python -m serve --model={workdir / 'rl'}" in run.stdout
    return workdir


def test_the_report_tells_of_every_stage(finished):
    report = json.loads((finished / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == STAGES
    for stage in report["stages"]:
        assert stage["seconds"] > 0 and stage["peak_memory"] > 1e6
        if stage["name"] in ("pretrain", "sft", "dpo", "rl"):
            assert stage["figures"]["tokens_per_second"] > 0 and stage["figures"]["mfu"] > 0
    page = (finished / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page), (
        "the page needs nothing from elsewhere"
    )
    assert all(name in page for name in STAGES) and page.count("<svg") >= 4


def test_nothing_is_redone(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/stage.json")}
    run = subprocess.run(command(finished), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count("done before") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("*/stage.json")}


@pytest.mark.slow
def test_a_changed_stage_is_redone_with_what_follows(finished, tmp_path):
    workdir = finished.parent / "changed"
    shutil.copytree(finished, workdir)
    # The folder's name is part of the stages' configs, so the copy takes the original's place.
    finished.rename(tmp_path / "kept")
    workdir.rename(finished)
    try:
        run = subprocess.run(
            [*command(finished), "--config.rl.optimizer.peak_lr=1e-4"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        assert run.stdout.count("done before") == len(STAGES) - 2
        assert {p.name for p in (finished / "replaced").iterdir()} == {"rl", "eval-rl"}
    finally:
        shutil.rmtree(finished)
        (tmp_path / "kept").rename(finished)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_never_killed(finished, tmp_path):
    workdir, chance, kills, reported = tmp_path / "run", random.Random(0), 0, {}
    # By what a stage takes here, at first too short to come to the end, and longer each time: a machine that grew busy
    # still comes there, one that grew idle is killed often enough.
    longest = max(stage["seconds"] for stage in json.loads((finished / "report.json").read_text())["stages"])
    for attempt in range(40):
        within = (0.2 + (0.3 if kills < 3 else 1.3) * chance.random()) * longest * 1.03**attempt
        process = subprocess.Popen(command(workdir), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        try:
            code = process.wait(timeout=within)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills, code = kills + 1, None
            time.sleep(1)
        now = done(workdir)
        assert {name: now.get(name) for name in reported} == reported, "a stage that was done is as it was"
        reported = now
        if code == 0:
            break
    assert code == 0 and kills >= 3 and set(reported) == set(STAGES)
    for stage in ("pretrain", "sft", "dpo", "rl"):
        ours, theirs = (model.load(folder / stage)[1] for folder in (workdir, finished))
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), ours, theirs)), stage
    assert (workdir / "report.html").stat().st_size > 10_000

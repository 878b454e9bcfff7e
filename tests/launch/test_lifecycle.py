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
            mfu = stage["figures"]["mfu"]  # None: this machine is too busy to measure its peak
            assert stage["figures"]["tokens_per_second"] > 0 and (mfu is None or 0 < mfu <= 1)
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


def test_a_stage_that_is_stopped_or_killed_goes_on_to_the_same_end(finished, tmp_path):
    """A copy elsewhere, in which reinforcement learning is still to do."""
    workdir = shutil.copytree(finished, tmp_path / "copy")
    for stage in ("rl", "eval-rl"):
        shutil.rmtree(workdir / stage)
    codes = []
    for signal_sent, step in ((signal.SIGTERM, 1), (signal.SIGKILL, 2), (None, None)):
        process = subprocess.Popen(command(workdir), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 280
        while (
            signal_sent
            and not list((workdir / "rl").glob(f"checkpoints/[{step}-9]"))
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        if signal_sent:
            process.send_signal(signal_sent)
        codes.append(process.wait(timeout=280))
        time.sleep(0.5 if signal_sent == signal.SIGKILL else 0)
        assert set(done(workdir)) >= set(STAGES[:-2])
    assert codes in ([75, -9, 0], [75, 0, 0])  # the last steps may be quicker than the second signal
    ours, theirs = (model.load(folder / "rl")[1] for folder in (workdir, finished))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), ours, theirs))


@pytest.mark.slow
def test_a_changed_stage_is_redone_with_what_follows(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    run = subprocess.run(
        [*command(workdir), "--config.rl.optimizer.peak_lr=1e-4"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count("done before") == len(STAGES) - 2
    assert (
        "rl: its config has changed: optimizer.peak_lr=0.0001 (was 0.00025), so it runs again" in run.stdout
    )
    assert {p.name for p in (workdir / "replaced").iterdir()} == {"rl", "eval-rl"}


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

"""Stages are done once, redone when their config changes, and survive being killed at any moment."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import configs
from configs.exits import Stopped
from launch import lifecycle
from launch.stages import Stage, StageFailed, run_stages

ROOT = Path(__file__).resolve().parents[2]

# A stage that counts to `steps`, one file a step, resuming where it was; every start of work is one line in starts.txt.
TOY = """
import json, pathlib, sys, time
options = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
config, workdir = json.load(open(options["config"])), pathlib.Path(options["workdir"])
with open(workdir / "starts.txt", "a") as f:
    f.write("start\\n")
for step in range(config["steps"]):
    if not (workdir / f"{step}.done").exists():
        time.sleep(config["seconds"])
        (workdir / f"{step}.done").write_text(config["text"])
print("counted", flush=True)
sys.exit(config["code"])
"""


@dataclasses.dataclass(frozen=True)
class Toy:
    steps: int = 3
    seconds: float = 0.0
    text: str = "a"
    code: int = 0


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "crucible_toy.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "modules"), str(ROOT)]))
    return tmp_path / "run"


def stages(**changes):
    names = [("one", ()), ("two", ("one",)), ("side", ("one",)), ("three", ("two",))]
    return [Stage(name, "crucible_toy", changes.get(name, Toy()), after) for name, after in names]


def starts(workdir):
    return {p.parent.name: len(p.read_text().splitlines()) for p in workdir.glob("*/starts.txt")}


def test_what_is_done_is_not_redone(toy):
    records = run_stages(stages(), toy)
    assert all(r.done and r.attempts == 1 and r.seconds > 0 for r in records.values())
    again = run_stages(stages(), toy)
    assert again == records
    assert starts(toy) == {"one": 1, "two": 1, "side": 1, "three": 1}


def test_a_changed_stage_is_redone_with_everything_after_it_and_nothing_else(toy):
    run_stages(stages(), toy)
    run_stages(stages(two=Toy(text="b")), toy)
    assert starts(toy) == {"one": 1, "two": 1, "side": 1, "three": 1}
    texts = {name: (toy / name / "0.done").read_text() for name in ("one", "two", "three")}
    assert texts == {"one": "a", "two": "b", "three": "a"}
    assert (toy / "replaced" / "two" / "0.done").read_text() == "a"
    assert (toy / "replaced" / "three").is_dir() and not (toy / "replaced" / "side").exists()
    run_stages(stages(two=Toy(text="c")), toy)
    assert [(toy / "replaced" / name / "0.done").read_text() for name in ("two", "two-2")] == ["a", "b"]


@dataclasses.dataclass(frozen=True)
class Grown(Toy):
    """The toy of a later version of the code."""

    source: str = ""
    log_every: int = 10
    depth: int = 2


Grown.__name__ = "Toy"


def test_new_defaults_other_spellings_and_how_a_run_is_watched_redo_nothing(toy, monkeypatch, capsys):
    fields = [(f.name, f.type, f.default) for f in dataclasses.fields(Toy)]
    reads = dataclasses.make_dataclass("Toy", [*fields, ("source", str, "")], frozen=True)
    run_stages([Stage("one", "crucible_toy", reads(source=str(toy / "data")))], toy)
    monkeypatch.chdir(toy.parent)
    grown = Grown(source="run/data", log_every=1)
    run_stages([Stage("one", "crucible_toy", grown)], Path("run"))
    assert starts(toy) == {"one": 1}
    run_stages([Stage("one", "crucible_toy", dataclasses.replace(grown, depth=3))], Path("run"))
    assert starts(toy) == {"one": 1} and (toy / "replaced" / "one" / "starts.txt").exists()
    assert "its config has changed: depth=3 (was default)" in capsys.readouterr().out


def test_a_stage_that_was_asked_to_stop_is_not_done_and_goes_on(toy, monkeypatch):
    with pytest.raises(Stopped, match="stage one was asked to stop"):
        run_stages(stages(one=Toy(code=75)), toy)
    record = json.loads((toy / "one" / "stage.json").read_text())
    assert not record["done"] and starts(toy) == {"one": 1}
    with pytest.raises(Stopped):  # it goes on in its folder, with what it has
        run_stages(stages(one=Toy(code=75)), toy)
    assert starts(toy) == {"one": 2}


def test_a_stage_that_fails_is_named_with_the_end_of_its_log_and_tried_again(toy):
    with pytest.raises(StageFailed, match=r"stage two ended with code 7(.|\n)*counted") as failed:
        run_stages(stages(two=Toy(code=7)), toy)
    assert failed.value.code == 7
    assert starts(toy) == {"one": 1, "two": 1}
    run_stages(stages(), toy)
    assert starts(toy)["one"] == 1


@pytest.mark.parametrize(("code", "given"), [(2, 2), (1, 1), (7, 1), (-9, 1)])
def test_a_users_mistake_in_a_stage_is_one_of_the_whole_command(tmp_path, monkeypatch, code, given):
    def fail(*_):
        raise StageFailed("stage one ended", code)

    monkeypatch.setattr(lifecycle, "run_stages", fail)
    monkeypatch.setattr(lifecycle, "plan", lambda *_: [])
    assert lifecycle.main(lifecycle.LifecycleConfig(), tmp_path) == given


def test_two_runs_do_not_share_a_folder(toy):
    toy.mkdir()
    script = f"""
import fcntl, os, time
d = os.open({str(toy / ".lock")!r}, os.O_RDWR | os.O_CREAT)
fcntl.flock(d, fcntl.LOCK_EX); print("held", flush=True); time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(configs.ConfigError, match="another run holds"):
            run_stages(stages(), toy)
    finally:
        holder.kill()
        holder.wait()


def test_killed_at_random_moments_nothing_that_was_done_is_lost(toy):
    driver = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from test_stages import Toy, run_stages, stages
print("begins", flush=True)
run_stages(stages(**{{n: Toy(seconds=0.15) for n in ("one", "two", "side", "three")}}), Path({str(toy)!r}))
"""
    chance, kills, done_before = random.Random(0), 0, set()
    for _ in range(60):
        process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE)
        process.stdout.readline()  # its imports are done, the work begins
        try:
            code = process.wait(timeout=1.5 * chance.random())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills, code = kills + 1, None
        reported = {p.parent.name for p in toy.glob("*/stage.json") if json.loads(p.read_text())["done"]}
        assert done_before <= reported
        assert all((toy / name / "2.done").exists() for name in reported)
        done_before = reported
        if code == 0:
            break
    assert code == 0 and kills > 0
    assert done_before == {"one", "two", "side", "three"}


def test_a_stage_dies_with_the_run_that_started_it(toy):
    driver = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from test_stages import Toy, run_stages, stages
run_stages(stages(one=Toy(steps=400, seconds=0.05)), Path({str(toy)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not list(toy.glob("one/*.done")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(0.3)
    count = len(list(toy.glob("one/*.done")))
    time.sleep(0.5)
    assert 0 < count == len(list(toy.glob("one/*.done")))

"""Running stages: each a command in its own process and folder, done once, measured, resumed after any kill.

workdir/STAGE/...         the stage's own files, its config.json, log.txt
workdir/STAGE/stage.json  key, seconds, peak memory, done: written by this file
workdir/replaced/STAGE-2  what stood there under another config; nothing is ever deleted
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

import configs
from configs.exits import STOPPED, Stopped
from configs.files import only_one

# Memory in pages of 2 MB where Linux gives them on request: a train step on CPU is a tenth quicker.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_POLL_SECONDS = 0.25
_STOP_SECONDS = 600.0  # that a stage has to save and leave when it is asked to
_RECORD_SECONDS = 5.0  # how often the time and memory of a running stage are put on disk


class StageFailed(RuntimeError):
    """A stage's command ended with an error; `code` is its exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command, `python -m MODULE --config=... --workdir=WORKDIR/NAME`."""

    name: str
    module: str
    config: Any  # a frozen dataclass that the module's command takes
    after: tuple[str, ...] = ()  # stages whose results it reads
    cpu_devices: int = 1  # into which JAX divides the CPU; no matter where there are accelerators


@dataclasses.dataclass
class StageRecord:
    """What a stage cost, over all its attempts."""

    key: str  # hash of what decides the stage's result, and of the keys of the stages before it
    decides: dict[str, Any] = dataclasses.field(default_factory=dict)  # see `_decisive`
    seconds: float = 0.0
    peak_memory: int = 0  # bytes, resident, of the stage's processes together
    attempts: int = 0
    done: bool = False


def run_stages(stages: list[Stage], workdir: Path) -> dict[str, StageRecord]:
    """Run what is not done, in order.

    Raises:
      StageFailed: names the stage, its log and the end of it; the stages before it stay done.
      Stopped: a stage was asked to stop and has saved what it did.
      ConfigError: another run holds this workdir.
    """
    with only_one(workdir) as lock:
        records: dict[str, StageRecord] = {}
        for number, stage in enumerate(stages, 1):
            decides = _portable(_decisive(stage.config), workdir)
            key = _key(stage, decides, records)
            record = _open_record(workdir, stage.name, key, decides)
            records[stage.name] = record
            heading = f"[{number}/{len(stages)}] {stage.name}"
            if record.done:
                print(f"{heading}: done before ({record.seconds:.0f} s)", flush=True)
                continue
            print(f"\n{heading}", flush=True)
            _run(stage, workdir, record, lock)
        return records


def _run(stage: Stage, workdir: Path, record: StageRecord, lock: int) -> None:
    folder = workdir / stage.name
    wanted = folder / "stage_config.json"
    configs.save(stage.config, wanted)
    command = [sys.executable, "-m", stage.module, f"--config={wanted}", f"--workdir={folder}"]
    record.attempts += 1
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_HUGE_PAGES | os.environ | {"JAX_NUM_CPU_DEVICES": str(stage.cpu_devices)},
            pass_fds=(lock,),  # an orphan keeps the folder locked until it is gone
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        relay = threading.Thread(target=_relay, args=(process.stdout, log), daemon=True)
        relay.start()
        try:
            code = _watch(process, record, folder)
        except BaseException:
            process.terminate()  # it saves, which takes its time
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_STOP_SECONDS)
            process.kill()
            raise
        relay.join()
    if code == STOPPED:
        _write_record(folder, record)
        raise Stopped(
            f"stage {stage.name} was asked to stop and has saved; the same command goes on from here."
        )
    if code:
        tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-12:]
        raise StageFailed(
            f"stage {stage.name} ended with code {code}; its log is {folder / 'log.txt'}. It ends:\n  "
            + "\n  ".join(tail)
            + "\nMend the cause and give the same command again; what is done is kept.",
            code,
        )
    record.done = True
    _write_record(folder, record)


def _watch(process: subprocess.Popen, record: StageRecord, folder: Path) -> int:
    """Wait for the end; add up time and memory, on disk every few seconds so that a kill loses little."""
    mark = saved = time.monotonic()
    family = psutil.Process(process.pid)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=_POLL_SECONDS)
            record.seconds += time.monotonic() - mark
            return code
        record.peak_memory = max(record.peak_memory, _resident(family))
        now = time.monotonic()
        record.seconds, mark = record.seconds + now - mark, now
        if now - saved > _RECORD_SECONDS:
            _write_record(folder, record)
            saved = now


def _resident(process: psutil.Process) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += member.memory_info().rss
    return total


def _relay(source, log) -> None:
    for line in iter(source.readline, b""):
        log.write(line)
        log.flush()
        sys.stdout.write("  " + line.decode(errors="replace"))
        sys.stdout.flush()


def _open_record(workdir: Path, name: str, key: str, decides: dict[str, Any]) -> StageRecord:
    """The record of what is there, or a new one in an empty folder when the key is another."""
    folder = workdir / name
    path = folder / "stage.json"
    if path.exists():
        record = StageRecord(**json.loads(path.read_text()))
        if record.key == key:
            return record
        why, kept = _changes(record.decides, decides), _put_aside(workdir, folder)
        print(f"{name}: {why}, so it runs again. What it made before is in {kept}.", flush=True)
    elif folder.exists():
        print(f"{name}: what lay in its folder is in {_put_aside(workdir, folder)}.", flush=True)
    record = StageRecord(key, decides)
    folder.mkdir(parents=True)
    _write_record(folder, record)
    return record


def _put_aside(workdir: Path, folder: Path) -> Path:
    """Move a stage's folder to a place of its own under `replaced`, which it gives."""
    (workdir / "replaced").mkdir(exist_ok=True)
    names = (f"{folder.name}-{number}" if number > 1 else folder.name for number in itertools.count(1))
    kept = next(path for name in names if not (path := workdir / "replaced" / name).exists())
    os.replace(folder, kept)
    return kept


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs in what decides a stage's result; where nothing does, it is what the stage reads."""
    old, new = _flat(old), _flat(new)
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if not changed:
        return "what it reads has changed"
    said = lambda tree, name: repr(tree[name]) if name in tree else "default"
    shown = ", ".join(f"{name}={said(new, name)} (was {said(old, name)})" for name in changed[:5])
    return f"its config has changed: {shown}{', ...' if len(changed) > 5 else ''}"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, below in tree.items()
        for name, value in _flat(below, f"{prefix}.{key}" if prefix else key).items()
    }


def _write_record(folder: Path, record: StageRecord) -> None:
    configs.atomic_write(folder / "stage.json", json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def _key(stage: Stage, decides: dict[str, Any], records: dict[str, StageRecord]) -> str:
    """A new field with a default, another spelling of the workdir, and how a run is watched change nothing in it."""
    parts = [stage.module, decides, [records[name].key for name in stage.after]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# How often a run logs, shows and saves, by the names of configs' fields.
_WATCHING = {"log_every", "checkpoint", "samples", "log_samples", "max_bad_steps"}


def _decisive(config: Any) -> Any:
    """A config as JSON without what has its default value."""
    if isinstance(config, list | tuple):
        return [_decisive(item) for item in config]
    if isinstance(config, dict):
        return {key: _decisive(value) for key, value in config.items()}
    if not dataclasses.is_dataclass(config):
        return configs.to_dict(config) if not isinstance(config, str | int | float | None) else config
    found: dict[str, Any] = {"": type(config).__name__}
    for each in dataclasses.fields(config):
        value, factory = getattr(config, each.name), each.default_factory
        default = each.default if factory is dataclasses.MISSING else factory()
        if each.name not in _WATCHING and (type(value) is not type(default) or value != default):
            found[each.name] = _decisive(value)
    return found


def _portable(tree: Any, workdir: Path) -> Any:
    """With paths within the workdir relative to it, and others absolute."""
    if isinstance(tree, dict):
        return {_portable(key, workdir): _portable(value, workdir) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_portable(item, workdir) for item in tree]
    if not isinstance(tree, str) or "\n" in tree or not tree:
        return tree
    path, root = os.path.abspath(os.path.expanduser(tree)), os.path.abspath(workdir)
    if path == root or path.startswith(root + os.sep):
        return f"WORKDIR/{os.path.relpath(path, root)}"
    return path if os.sep in tree and os.path.exists(path) else tree


def _die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

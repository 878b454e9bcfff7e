"""Running stages: each a command in its own process and folder, done once, measured, resumed after any kill.

workdir/STAGE/...         the stage's own files, its config.json, log.txt
workdir/STAGE/stage.json  key, seconds, peak memory, done: written by this file
workdir/replaced/STAGE    what stood there under another config, until the next change
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

import configs

# Memory in pages of 2 MB where Linux gives them on request: a train step on CPU is a tenth quicker.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_POLL_SECONDS = 0.25
_RECORD_SECONDS = 5.0  # how often the time and memory of a running stage are put on disk


class StageFailed(RuntimeError):
    """A stage's command ended with an error."""


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

    key: str  # hash of the stage's config and of the keys of the stages before it
    seconds: float = 0.0
    peak_memory: int = 0  # bytes, resident, of the stage's processes together
    attempts: int = 0
    done: bool = False


def run_stages(stages: list[Stage], workdir: Path) -> dict[str, StageRecord]:
    """Run what is not done, in order.

    Raises:
      StageFailed: names the stage, its log and the end of it; the stages before it stay done.
      ConfigError: another run holds this workdir.
    """
    with _only_one(workdir) as lock:
        records: dict[str, StageRecord] = {}
        for number, stage in enumerate(stages, 1):
            key = _key(stage, records)
            record = _open_record(workdir, stage.name, key)
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
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()
            raise
        relay.join()
    if code:
        tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-12:]
        raise StageFailed(
            f"stage {stage.name} ended with code {code}; its log is {folder / 'log.txt'}. It ends:\n  "
            + "\n  ".join(tail)
            + "\nMend the cause and give the same command again; what is done is kept."
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


def _open_record(workdir: Path, name: str, key: str) -> StageRecord:
    """The record of what is there, or a new one in an empty folder when the key is another."""
    folder = workdir / name
    path = folder / "stage.json"
    if path.exists():
        record = StageRecord(**json.loads(path.read_text()))
        if record.key == key:
            return record
        print(f"{name}: its config or what it reads has changed, so it is done anew.", flush=True)
    if folder.exists():
        replaced = workdir / "replaced" / name
        shutil.rmtree(replaced, ignore_errors=True)
        replaced.parent.mkdir(exist_ok=True)
        os.replace(folder, replaced)
    record = StageRecord(key)
    folder.mkdir(parents=True)
    _write_record(folder, record)
    return record


def _write_record(folder: Path, record: StageRecord) -> None:
    configs.atomic_write(folder / "stage.json", json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def _key(stage: Stage, records: dict[str, StageRecord]) -> str:
    parts = [stage.module, configs.to_dict(stage.config), [records[name].key for name in stage.after]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _only_one(workdir: Path) -> Iterator[int]:
    """The workdir's lock, as an open file descriptor; waits a little for the last run's processes to be gone."""
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        for attempt in range(50):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == 49:
                    raise configs.ConfigError(
                        f"another run holds {workdir}. Wait for it, stop it, or give another --workdir."
                    ) from None
                time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def _die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

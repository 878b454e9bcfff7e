"""Metrics: metrics.jsonl, TensorBoard, and a line on the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax

import configs
from model import WeightedSum


class MetricsLog:
    """Writes a run's metrics; a resumed run first drops the rows of steps that it repeats."""

    def __init__(self, workdir: Path, resumed_step: int, *, write: bool = True):
        self._write = write
        if not write:
            return
        from tensorboardX import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        _drop_rows_after(self._path, resumed_step)
        _drop_rows_after(workdir / "samples.jsonl", resumed_step)
        self._file = open(self._path, "a", encoding="utf-8")
        self._samples = open(workdir / "samples.jsonl", "a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1, flush_secs=10)

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Write a row; a figure that is not known, or not finite, is null."""
        if not self._write:
            return
        self._file.write(json.dumps({"step": step, "split": split} | _finite(values)) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"{split}/{name}", value, step)

    def forget(self, step: int, split: str) -> None:
        """Drop the rows of a step that will be measured again."""
        if not self._write:
            return
        self._file.close()
        rows = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        remaining = [
            row for row in rows if not {"step": step, "split": split}.items() <= json.loads(row).items()
        ]
        configs.atomic_write(self._path, "".join(remaining))
        self._file = open(self._path, "a", encoding="utf-8")

    def write_sample(self, row: dict) -> None:
        """Write a row of samples.jsonl; it must have "step"."""
        if self._write:
            self._samples.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._samples.flush()

    def close(self) -> None:
        if self._write:
            self._file.close()
            self._samples.close()
            self._board.close()


def write_result(workdir: Path, final: Mapping[str, float | None]) -> None:
    """Write result.json; what is known of the same step stays, since a finished command given again measures little."""
    path = workdir / "result.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = before if before.get("step") == final["step"] else {}
    configs.atomic_write(path, json.dumps(known | _finite(final), indent=1) + "\n")


class Window:
    """Sums of metrics between two log lines."""

    def __init__(self):
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: dict[str, WeightedSum]) -> dict[str, float]:
        """Add one step's metrics, which waits for the device, and return that step's means."""
        host = jax.device_get(metrics)
        means = {}
        for name, value in host.items():
            total, weight = float(value.total), float(value.weight)
            old = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (old[0] + total, old[1] + weight)
            means[name] = total / max(weight, 1e-9)
        return means

    def means(self) -> dict[str, float]:
        """Means since the last call; starts a new window. A metric that nothing had a weight in is left out; a loss
        without any is 0.
        """
        sums, self._sums = self._sums, {}
        return {
            name: total / max(weight, 1e-9)
            for name, (total, weight) in sums.items()
            if weight or name == "loss"
        }


class Progress:
    """One line on the terminal, rewritten in place on a tty: step, numbers, rate, time left."""

    def __init__(self, steps: int, start: int):
        self._steps, self._start, self._began = steps, start, time.monotonic()

    def show(self, step: int, **numbers: str) -> None:
        done = step - self._start
        left = (time.monotonic() - self._began) / max(done, 1) * (self._steps - step)
        shown = "  ".join(f"{name} {value}" for name, value in numbers.items())
        line = f"step {step:>{len(str(self._steps))}}/{self._steps}  {shown}  left {clock(left)}"
        print(
            "\r\x1b[K" + line if sys.stdout.isatty() else line,
            end="" if self._on_tty(step) else "\n",
            flush=True,
        )

    def _on_tty(self, step: int) -> bool:
        return sys.stdout.isatty() and step < self._steps


def clock(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


def _finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {
        name: None if value is None or not math.isfinite(value) else value for name, value in values.items()
    }


def _drop_rows_after(path: Path, step: int) -> None:
    """Drops rows after `step`, and a last line that was cut off when the run was killed."""
    if not path.exists():
        return
    remaining = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                remaining.append(line + "\n")
        except (ValueError, KeyError):
            continue
    configs.atomic_write(path, "".join(remaining))

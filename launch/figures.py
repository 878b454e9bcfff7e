"""The figures of a lifecycle, gathered from what its stages wrote: the content of report.json."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import psutil

from launch.stages import StageRecord
from model.inspect.flops import MFU_FORMULA


def gather(workdir: Path, records: dict[str, StageRecord]) -> dict[str, Any]:
    """All of report.json:

    stages   name, seconds, peak_memory (bytes), attempts, figures (what the stage says of itself), config
    scores   stage, name, metric, value, stderr, n: what the evaluation after each model found
    curves   stage -> split -> rows of metrics.jsonl
    samples  stage -> what the model wrote: in the training loop, and to the evaluation's held-out problems
    """
    stages = [_stage(workdir / name, name, record) for name, record in records.items()]
    evaluations = {name.removeprefix("eval-"): workdir / name for name in records if name.startswith("eval-")}
    results = {model: _read(folder / "results.json") for model, folder in evaluations.items()}
    return {
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": sum(record.seconds for record in records.values()),
        "peak_memory": max(record.peak_memory for record in records.values()),
        "machine": _machine(),
        "mfu_formula": MFU_FORMULA,
        "stages": stages,
        "scores": [{"stage": model} | row for model, result in results.items() for row in result["rows"]],
        "curves": {name: curves for name in records if (curves := _curves(workdir / name / "metrics.jsonl"))},
        "samples": {
            model: {"training": _last_samples(workdir / model / "samples.jsonl"), "tasks": result["samples"]}
            for model, result in results.items()
        },
    }


def score(figures: dict[str, Any], stage: str, metric: str, name: str | None = None) -> dict[str, Any] | None:
    """The row of one score; the first of that metric when no name is given."""
    for row in figures["scores"]:
        if row["stage"] == stage and row["metric"] == metric and name in (None, row["name"]):
            return row
    return None


def _stage(folder: Path, name: str, record: StageRecord) -> dict[str, Any]:
    result = _read(folder / "result.json") if (folder / "result.json").exists() else {}
    return {
        "name": name,
        "seconds": round(record.seconds, 2),
        "peak_memory": record.peak_memory,
        "attempts": record.attempts,
        "figures": result,
        "config": _read(folder / "stage_config.json"),
    }


def _curves(path: Path) -> dict[str, list[dict]]:
    curves: dict[str, list[dict]] = {}
    if path.exists():
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            curves.setdefault(row.pop("split"), []).append(row)
    return curves


def _last_samples(path: Path, count: int = 6) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[-count:]]


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

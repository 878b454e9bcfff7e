"""Runs lm-eval's tasks on a model, from the harness' own files or from a local folder, and gives rows
back.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import ConfigError
from configs.typed import did_you_mean
from evals.config import LMEval
from evals.results import PartResult, Row

if TYPE_CHECKING:
    from evals.lm_eval_model import CrucibleLM


def run_lm_eval(spec: LMEval, lm: CrucibleLM) -> PartResult:
    """A row for each metric of each task and group, an item for each document.

    Raises ConfigError for a task that is not there, or one that runs code when `spec.allow_code` is off.
    """
    import lm_eval

    try:
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(spec.tasks),
            task_manager=_task_manager(spec),
            limit=spec.limit,
            num_fewshot=spec.num_fewshot,
            apply_chat_template=spec.apply_chat_template,
            bootstrap_iters=spec.bootstrap,
            random_seed=spec.seed,
            numpy_random_seed=spec.seed,
            torch_random_seed=None,
            fewshot_random_seed=spec.seed,
            confirm_run_unsafe_code=spec.allow_code,
        )
    except ValueError as error:
        if "UNSAFE_CODE" in str(error) or "unsafe" in str(error):
            raise ConfigError(
                f"config.lm_eval.tasks: {error} Here that is config.lm_eval.allow_code=True; do it in a sandbox."
            ) from error
        raise
    rows = _rows(found["results"] | found.get("groups", {}))
    items = [
        {"task": task, **_plain(sample)} for task, samples in found["samples"].items() for sample in samples
    ]
    return PartResult(rows, items)


def include_state(folder: str | None) -> list[Any]:
    """Sizes and times of the files in a folder of local tasks."""
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise ConfigError(f"config.lm_eval.include: {folder} is no folder.")
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [(str(p), s.st_size, s.st_mtime_ns) for p in files for s in [p.stat()]]


def _task_manager(spec: LMEval) -> Any:
    from lm_eval.tasks import TaskManager

    class LocalTasks(TaskManager):
        """Loads tasks with their folder as the current one: relative `data_files` lie beside the task
        file.
        """

        def load(self, task_list: Any) -> Any:
            with contextlib.chdir(spec.include) if spec.include else contextlib.nullcontext():
                return super().load(task_list)

    if spec.include is not None:
        manager = LocalTasks(include_path=Path(spec.include).resolve(), include_defaults=False)
        if set(spec.tasks) <= set(manager.all_tasks):
            return manager  # without reading the harness' own thousands of files
        manager = LocalTasks(include_path=Path(spec.include).resolve())
    else:
        manager = LocalTasks()
    for name in spec.tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise ConfigError(
                f"config.lm_eval.tasks: {name!r} is no task. {did_you_mean(name, manager.all_tasks)}"
            )
    return manager


def _rows(results: dict[str, dict[str, Any]]) -> list[Row]:
    """lm-eval's {task: {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 8, ...}} as rows."""
    rows = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, which = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, bool | str):
                continue
            stderr = metrics.get(f"{metric}_stderr,{which}")
            name = metric if which == "none" else f"{metric} ({which})"
            stderr = float(stderr) if isinstance(stderr, int | float) else None
            rows.append(Row(task, name, float(value), stderr, int(metrics["sample_len"])))
    return rows


def _plain(sample: dict[str, Any]) -> dict[str, Any]:
    """JSON-able, without the mark that keeps special tokens apart."""
    return json.loads(json.dumps(sample, default=str, ensure_ascii=False).replace("\ue000", ""))

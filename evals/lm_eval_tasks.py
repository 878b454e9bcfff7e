"""Runs lm-eval's tasks on a model, from the harness' own files or from a local folder, and gives rows back.

The harness runs in a process of its own (`evals.lm_eval_process`), which is confined before it sees anything that the
model wrote: its metrics and filters parse that text, and some evaluate it. It asks for log-likelihoods and answers in
JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from configs import ConfigError
from data.confined.limits import warn_if_open
from data.confined.pool import environment
from data.confined.worker import read_message, write_message
from evals.config import LMEval
from evals.results import PartResult, Row

if TYPE_CHECKING:
    from evals.lm_eval_model import CrucibleLM

_LONGEST_MESSAGE = (1 << 32) - 1
_METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
# What downloading a task's dataset needs of the environment, until the model is first asked.
_PASSED_ON = (
    "HF_",
    "HUGGINGFACE_",
    "XDG_CACHE_HOME",
    "TMPDIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "SSL_CERT_",
)

_BOOT = """
import json, sys
path, spec, folder = json.loads(sys.argv[1])
sys.path[:] = path
from evals.lm_eval_process import main
main(spec, folder)
"""


def run_lm_eval(spec: LMEval, lm: CrucibleLM) -> PartResult:
    """A row for each metric of each task and group, an item for each document.

    Raises:
      ConfigError: a task that is not there, or one that runs code when `spec.allow_code` is off.
      RuntimeError: the harness failed, or took longer than `spec.scoring_seconds` over the model's answers.
    """
    warn_if_open()
    with tempfile.TemporaryDirectory(prefix="crucible-lm-eval-") as folder:
        process = _start(spec, folder)
        try:
            found = _serve(process, spec, lm)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it forked, which can't leave the group
            process.wait()
            for pipe in _pipes(process):
                pipe.close()
    items = [{"task": task, **sample} for task, samples in found["samples"].items() for sample in samples]
    return PartResult(_rows(found["results"]) + _cut_rows(lm), items)


def _cut_rows(lm: CrucibleLM) -> list[Row]:
    """How many prompts and contexts lost their beginning, where some did: scores of these say less."""
    return [
        Row("lm-eval", f"{what} that were cut", float(count), None, count)
        for what, count in getattr(lm, "cut", {}).items()
        if count
    ]


def include_state(folder: str | None) -> list[Any]:
    """Sizes and times of the files in a folder of local tasks."""
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise ConfigError(f"config.lm_eval.include: {folder} is no folder.")
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [(str(p), s.st_size, s.st_mtime_ns) for p in files for s in [p.stat()]]


def _start(spec: LMEval, folder: str) -> subprocess.Popen:
    passed = {k: v for k, v in os.environ.items() if k.upper().startswith(_PASSED_ON)}
    home = os.path.expanduser("~")  # where datasets are kept
    path = [os.path.abspath(entry) for entry in sys.path]
    include = None if spec.include is None else os.path.abspath(spec.include)
    setting = json.dumps([path, dataclasses.asdict(dataclasses.replace(spec, include=include)), folder])
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _BOOT, setting],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(home) | passed | {"DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "false"},
        start_new_session=True,
        bufsize=0,
    )


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None and process.stdout is not None  # asked for in `_start`
    return process.stdin, process.stdout


def _serve(process: subprocess.Popen, spec: LMEval, lm: CrucibleLM) -> dict[str, Any]:
    """Answer the harness until it has its results."""
    requests, replies = (pipe.fileno() for pipe in _pipes(process))
    seconds: float | None = None  # loading datasets takes what it takes
    poll = select.poll()
    poll.register(replies, select.POLLIN | select.POLLHUP)
    while True:
        if not poll.poll(seconds and seconds * 1000):
            raise RuntimeError(
                f"lm-eval took more than {seconds:.0f} s to score what the model answered: one of its metrics hangs on "
                "an answer. Raise config.lm_eval.scoring_seconds, or leave the task out."
            )
        message = read_message(replies, _LONGEST_MESSAGE)
        if message is None:
            raise RuntimeError(
                "the process that runs lm-eval died, of memory or of what the model answered; see what it said above."
            )
        said = json.loads(message)
        if "results" in said:
            return said
        if "error" in said:
            raise (ConfigError if said["kind"] == "config" else RuntimeError)(
                f"config.lm_eval: {said['error']}"
            )
        answer = _answer(said, lm)
        if said["method"] in _METHODS:
            seconds = spec.scoring_seconds
        write_message(requests, json.dumps(answer).encode())


def _answer(said: dict[str, Any], lm: CrucibleLM) -> Any:
    method, arguments = said["method"], said["arguments"]
    if method in _METHODS:
        return getattr(lm, method)([types.SimpleNamespace(args=tuple(each)) for each in arguments])
    if method not in ("chat_template", "apply_chat_template", "tokenizer_name"):
        raise RuntimeError(
            f"the process that runs lm-eval asked for {method!r:.80}, which it never does by itself."
        )
    return lm.tokenizer_name if method == "tokenizer_name" else getattr(lm, method)(*arguments)


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

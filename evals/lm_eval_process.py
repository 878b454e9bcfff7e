"""The process that lm-eval's harness runs in: it loads the tasks and is confined before it asks the model anything."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from configs import ConfigError
from configs.typed import did_you_mean
from data.confined import Limits, confine
from data.confined.worker import die_with_parent, read_message, write_message
from evals.config import LMEval


def main(spec: dict[str, Any], folder: str) -> None:
    """Evaluate as `evals.lm_eval_tasks.run_lm_eval` asks, over standard input and output."""
    die_with_parent()
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    settings = LMEval(**{**spec, "tasks": tuple(spec["tasks"])})
    try:
        said = _evaluate(settings, Wire(requests, replies, settings, folder))
    except ConfigError as error:
        said = {"kind": "config", "error": str(error)}
    except Exception as error:
        said = {"kind": "run", "error": f"{type(error).__name__}: {error}"[:4000]}
    write_message(replies, json.dumps(said, default=str, ensure_ascii=False).replace("\ue000", "").encode())


class Wire:
    """Asks the process that holds the model."""

    def __init__(self, requests: int, replies: int, spec: LMEval, folder: str):
        self._requests, self._replies, self._spec, self._folder = requests, replies, spec, folder
        self._confined = False

    def ask(self, method: str, arguments: list) -> Any:
        write_message(self._replies, json.dumps({"method": method, "arguments": arguments}).encode())
        message = read_message(self._requests, (1 << 32) - 1)
        if message is None:
            os._exit(1)  # nobody waits any more
        return json.loads(message)

    def confine(self) -> None:
        """From here on the model's text comes in."""
        if self._confined:
            return
        self._confined = True
        code = self._spec.allow_code
        # how long it may take over the answers the other side watches
        limits = Limits(seconds=1e6, memory_megabytes=8192, file_megabytes=16 if code else 0, processes=code)
        os.chdir(self._folder)
        os.dup2(1, 2)
        confine(limits, self._folder, read=[*_datasets_folders(), *filter(None, [self._spec.include])])
        os.environ.update(DISABLE_MULTIPROC="1", HOME=self._folder, TMPDIR=self._folder)


def _evaluate(spec: LMEval, wire: Wire) -> dict[str, Any]:
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.api.model import LM

    class Remote(LM):
        """The model, in another process."""

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return wire.ask("chat_template", [chat_template])

        @property
        def tokenizer_name(self) -> str:
            return wire.ask("tokenizer_name", [])

        def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
            return wire.ask("apply_chat_template", [chat_history, add_generation_prompt])

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            return [(logprob, greedy) for logprob, greedy in self._all("loglikelihood", requests)]

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            return self._all("loglikelihood_rolling", requests)

        def generate_until(self, requests: list) -> list[str]:
            return self._all("generate_until", requests)

        def _all(self, method: str, requests: list) -> list:
            wire.confine()
            return wire.ask(method, [list(request.args) for request in requests])

    # They start programs (git, lscpu), which a confined process can't.
    evaluator.get_git_commit_hash = lambda: None
    evaluator.add_env_info = lambda storage: None
    try:
        evaluate: Any = lm_eval.simple_evaluate  # whose decorator hides what it takes
        found = evaluate(
            model=Remote(),
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
            raise ConfigError(f"tasks: {error} Here that is config.lm_eval.allow_code=True.") from error
        raise
    return {"results": found["results"] | found.get("groups", {}), "samples": found["samples"]}


def _datasets_folders() -> list[str]:
    from datasets import config

    return [str(config.HF_CACHE_HOME), str(config.HF_DATASETS_CACHE)]


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
            raise ConfigError(f"tasks: {name!r} is no task. {did_you_mean(name, manager.all_tasks)}")
    return manager

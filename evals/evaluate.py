"""`evaluate`: everything a config asks of one model, in parts that are done once.

    workdir/config.json     what was asked
    workdir/results.json    model, version, rows with standard errors, a few samples
    workdir/samples.jsonl   every document, problem and lm-eval sample with its score
    workdir/parts/KEY.json  a finished part; KEY is a hash of its config, its data and the model

A part that is finished for the same model and config is not measured again.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import configs
import data
import model
from configs.paths import ModelPath, resolve_model
from data.shards import hash_of
from evals.bits import bits_per_byte
from evals.config import EvalConfig, TaskEval
from evals.exact import exact_match
from evals.progress import ProgressLine
from evals.results import PartResult, Row, average_row
from evals.scoring import Scorer
from evals.texts import read_texts, texts_state
from model.function import Params
from serve import Engine
from train.mesh import check_mesh, make_mesh, param_shardings

_CODE_VERSION = 1  # raise it when a measurement gives other numbers for the same model and config
_SHORTEST_ENGINE = 256  # tokens of prompt and answer
_SAMPLE_CHARS = 2000  # of each text in the samples of results.json; samples.jsonl has all

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """One measurement: its place in results.json, what its result depends on, and how to make it."""

    name: str
    kind: str  # "text", "task" or "lm_eval"
    depends_on: list[Any]  # JSON-able
    measure: Callable[[Subject], PartResult]


class Subject:
    """The model under test. Weights and engine are made when a part first needs them."""

    def __init__(self, config: EvalConfig):
        self.config = config
        self.tokenizer = data.load_tokenizer(config.model)
        stored = model.load_config(config.model)
        self.cfg = stored.replace(dtype=dtype_of(config) or stored.dtype)
        self._engine: Engine | None = None

    @functools.cached_property
    def params(self) -> Params:
        spec = self.config.mesh
        sizes = [getattr(spec, axis) for axis in model.MESH_AXES]
        mesh = make_mesh(spec, jax.devices()[: None if -1 in sizes else int(np.prod(sizes))])
        check_mesh(self.cfg, mesh, self.config.sharding)
        shardings = param_shardings(self.cfg, mesh, self.config.sharding) if mesh.size > 1 else None
        return model.load(self.config.model, cfg=self.cfg, shardings=shardings)[1]

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.config.engine.max_length or self.cfg.max_length

    def engine_for(self, length: int) -> Engine:
        """An engine for prompts and answers of `length` tokens together: with no longer a cache than that
        takes, unless config.engine.max_length says how long. Longer ones than the model's context get
        that."""
        if self._engine is None or self._engine.config.max_length < min(length, self.context):
            rounded = max(_SHORTEST_ENGINE, 1 << (length - 1).bit_length())
            sizes = dataclasses.replace(
                self.config.engine, max_length=self.config.engine.max_length or min(rounded, self.context)
            )
            self._engine = None  # its cache goes before the new one comes
            try:
                self._engine = Engine(self.cfg, self.params, self.tokenizer, sizes)
            except ValueError as error:
                raise configs.ConfigError(f"config.engine: {error}") from error
        return self._engine

    def scorer(self, context: int | None, batch_tokens: int) -> Scorer:
        vocab_size = self.tokenizer.vocab_size
        context = self.cfg.max_length if context is None else context
        return Scorer(self.cfg, self.params, vocab_size, context=context, batch_tokens=batch_tokens)


def evaluate(config: EvalConfig, workdir: str | Path, log: Log = print) -> dict[str, Any]:
    """Measure what is not measured yet, write the files above, and return the content of results.json.

    Returns a JSON-able dict; `rows` is a list of {"name", "metric", "value", "stderr", "n"}, `samples` maps a
    part's name to a few of its items.

    Raises:
      ConfigError: nothing to measure, or a model, text or task that can't be used.
    """
    if not config.model:
        raise configs.ConfigError(
            "give config.model: a run folder, checkpoint, Hugging Face folder or GGUF file."
        )
    workdir = Path(workdir)
    found = resolve_model(config.model)
    identity = model_state(found)
    parts = plan(config)
    if not parts:
        raise configs.ConfigError(
            "nothing to measure: config.texts, config.tasks and config.lm_eval.tasks are empty."
        )
    configs.save(config, workdir / "config.json")
    subject: Subject | None = None
    finished: list[dict[str, Any]] = []
    for number, part in enumerate(parts, 1):
        key = hash_of(_CODE_VERSION, part.kind, part.depends_on, identity, dtype_of(config))
        path = workdir / "parts" / f"{key}.json"
        heading = f"[{number}/{len(parts)}] {part.name}"
        if path.exists():
            log(f"{heading}: measured before")
        else:
            log(heading)
            subject = subject or Subject(config)
            began = time.monotonic()
            result = part.measure(subject)
            _save_part(path, part, result, time.monotonic() - began)
        finished.append(json.loads(path.read_text(encoding="utf-8")))
    return _write_results(config, found, finished, workdir)


def plan(config: EvalConfig) -> list[Part]:
    """The parts of a config: a text, a task, or all lm-eval tasks together. Raises ConfigError for a missing
    text.
    """
    parts = []
    for name, path in config.texts.items():
        depends_on = [name, dataclasses.asdict(config.text), texts_state(path)]
        parts.append(Part(name, "text", depends_on, functools.partial(_measure_text, name, path)))
    for task in config.tasks:
        # How many rows and pages the engine has changes its speed alone; what bounds an answer is in the key.
        depends_on = [configs.to_dict(task), config.engine.max_length, config.engine.cache_dtype]
        parts.append(Part(task.title, "task", depends_on, functools.partial(_measure_task, task)))
    if config.lm_eval.tasks:
        from evals.lm_eval_tasks import include_state

        depends_on = [configs.to_dict(config.lm_eval), include_state(config.lm_eval.include)]
        depends_on.append(_lm_eval_version())
        parts.append(Part("lm-eval", "lm_eval", depends_on, _measure_lm_eval))
    return parts


def dtype_of(config: EvalConfig) -> str | None:
    """Of the computation: what the config says, else float32 on CPU, which is slow in bfloat16; None: as
    stored.
    """
    return config.dtype or ("float32" if jax.default_backend() == "cpu" else None)


def model_state(found: ModelPath) -> list[Any]:
    """What must be unchanged for an earlier measurement to stand: where the weights lie, sizes and times of
    files.
    """
    weights = found.weights.resolve()
    files = [weights] if weights.is_file() else sorted(p for p in weights.rglob("*") if p.is_file())
    return [str(weights), [(str(p), s.st_size, s.st_mtime_ns) for p in files for s in [p.stat()]]]


def _measure_text(name: str, path: str, subject: Subject) -> PartResult:
    spec = subject.config.text
    texts = read_texts(path, spec.text_field, spec.max_documents)
    scorer = subject.scorer(spec.context, spec.batch_tokens)
    progress = ProgressLine(name, "windows")
    return bits_per_byte(name, scorer, subject.tokenizer, texts, overlap=spec.overlap, progress=progress)


def _measure_task(task: TaskEval, subject: Subject) -> PartResult:
    return exact_match(task, subject.engine_for, subject.tokenizer, ProgressLine(task.title, "problems"))


def _measure_lm_eval(subject: Subject) -> PartResult:
    from evals.lm_eval_model import CrucibleLM
    from evals.lm_eval_tasks import run_lm_eval

    spec = subject.config.lm_eval
    scorer = subject.scorer(subject.context, spec.batch_tokens)
    lm = CrucibleLM(scorer, subject.engine_for, subject.tokenizer, spec, name=subject.config.model)
    return run_lm_eval(spec, lm)


def _save_part(path: Path, part: Part, result: PartResult, seconds: float) -> None:
    rows = [row.to_dict() for row in result.rows]
    content = {"name": part.name, "kind": part.kind, "seconds": seconds, "rows": rows, "items": result.items}
    configs.atomic_write(path, json.dumps(content, ensure_ascii=False, default=str) + "\n")


def _write_results(
    config: EvalConfig, found: ModelPath, finished: list[dict[str, Any]], workdir: Path
) -> dict[str, Any]:
    rows = [row for part in finished for row in part["rows"]]
    tasks = [part for part in finished if part["kind"] == "task"]
    if len(tasks) > 1 and sum(task.weight for task in config.tasks) > 0:
        weights = [task.weight for task in config.tasks]
        for metric in (0, 1):  # accuracy, format
            of_metric = [Row.from_dict(part["rows"][metric]) for part in tasks]
            rows.append(average_row("all tasks", of_metric, weights).to_dict())
    results = {
        "model": config.model,
        "weights": str(found.weights),
        "step": found.step,
        "version": _version(),
        "rows": rows,
        "samples": {
            part["name"]: [_short(item) for item in part["items"][: config.samples]] for part in finished
        },
        "seconds": {part["name"]: part["seconds"] for part in finished},
        "config": configs.to_dict(config),
    }
    items = (
        {"part": part["name"], "kind": part["kind"], **item} for part in finished for item in part["items"]
    )
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    configs.atomic_write(workdir / "samples.jsonl", lines)
    configs.atomic_write(workdir / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results


def _short(item: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value[:_SAMPLE_CHARS] if isinstance(value, str) else value
        for key, value in item.items()
        if isinstance(value, (str, int, float, type(None)))
    }


def _lm_eval_version() -> str:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise configs.ConfigError(
            "config.lm_eval.tasks needs lm-eval: pip install 'crucible-lm[evals]', or pip install lm-eval."
        ) from None


def _version() -> str:
    try:
        return importlib.metadata.version("crucible-lm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

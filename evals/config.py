"""What one evaluation is: a model, and the texts, generated tasks and lm-eval tasks it is measured on."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import field
from typing import Any, Literal

from data.tasks import INSTRUCTION
from model import ShardingRules
from serve.engine_config import EngineConfig
from train.config import MeshSpec


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; wanted at least 1.")


@dataclasses.dataclass(frozen=True)
class TextEval:
    """How text is scored; the same for every text in `EvalConfig.texts`."""

    context: int | None = None  # tokens the model sees at once; default: the model's max_length
    overlap: float = 0.5  # of the context: how much of it a later chunk of a long document sees again
    batch_tokens: int = 8192  # most tokens, padding included, that one forward pass computes
    max_documents: int | None = None  # the first so many, in the order of a hash of their text; None: all
    text_field: str = "text"  # of JSONL and Parquet files

    def __post_init__(self):
        if self.context is not None and self.context < 2:
            raise ValueError(f"context={self.context}; wanted at least 2 tokens.")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap={self.overlap}; wanted a share of the context, 0 to below 1.")
        _check_positive(batch_tokens=self.batch_tokens, max_documents=self.max_documents)


@dataclasses.dataclass(frozen=True)
class TaskEval:
    """A reasoning-gym task, answered by generation and scored by the task's own verifier."""

    name: str  # in reasoning-gym, e.g. "chain_sum"
    config: dict[str, Any] = field(default_factory=dict)  # settings that differ from the task's defaults
    label: str = ""  # what the results call it; default: the name
    weight: float = 1.0  # in the average over tasks
    problems: int = 100
    split: Literal["train", "validation", "test"] = "test"
    seed: int = 0  # of the problems, and of the answers when they are sampled
    instruction: str = INSTRUCTION  # follows each question
    prompt: Literal["chat", "text"] = "chat"  # text: without chat template, for models that have none
    temperature: float = 0.0
    max_new_tokens: int = 64

    def __post_init__(self):
        _check_positive(problems=self.problems, max_new_tokens=self.max_new_tokens)
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight}; wanted 0 or more.")

    @property
    def title(self) -> str:
        return self.label or self.name


@dataclasses.dataclass(frozen=True)
class LMEval:
    """Tasks of lm-evaluation-harness (Gao et al. 2021, doi:10.5281/zenodo.5371628)."""

    tasks: tuple[str, ...] = ()  # names of tasks, groups or tags
    include: str | None = None  # a folder with task files (YAML) beside the harness' own
    limit: int | None = None  # documents a task; None: all
    num_fewshot: int | None = None  # default: what the task says
    apply_chat_template: bool = False
    max_new_tokens: int = 256  # for tasks that generate and do not say how much themselves
    batch_tokens: int = 8192  # most tokens, padding included, that one forward pass computes
    seed: int = 0  # of the choice of few-shot examples
    bootstrap: int = 1000  # resamples for the standard error of metrics that have no formula
    add_bos: bool = True  # begin text with the tokenizer's bos, as pretraining documents do
    allow_code: bool = (
        False  # run tasks that execute the code that the model wrote; its process may then fork
    )
    scoring_seconds: float = 900.0  # that the harness may take to score what the model answered

    def __post_init__(self):
        _check_positive(limit=self.limit, max_new_tokens=self.max_new_tokens, batch_tokens=self.batch_tokens)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One model and what it is measured on; parts that are left empty are left out."""

    model: str = ""  # run folder, checkpoint, Hugging Face folder or GGUF file
    texts: dict[str, str] = field(
        default_factory=dict
    )  # name -> text dataset, or text, JSONL or Parquet file
    tasks: tuple[TaskEval, ...] = ()
    lm_eval: LMEval = LMEval()
    text: TextEval = TextEval()
    engine: EngineConfig = EngineConfig(max_rows=16)  # generates the answers
    dtype: Literal["float32", "bfloat16"] | None = (
        None  # of the computation; default: float32 on CPU, else as stored
    )
    mesh: MeshSpec = MeshSpec(data=1)  # "tensor" splits a model that is too large for one device
    sharding: ShardingRules = ShardingRules()
    samples: int = 5  # answers a task that the results show; samples.jsonl keeps all of them

    def __post_init__(self):
        titles = Counter(task.title for task in self.tasks)
        if twice := [title for title, count in titles.items() if count > 1]:
            raise ValueError(f"tasks: {', '.join(twice)} is there twice; give each a label of its own.")
        if self.samples < 0:
            raise ValueError(f"samples={self.samples}; wanted 0 or more.")

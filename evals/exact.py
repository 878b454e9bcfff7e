"""Exact match on generated tasks: the engine answers, the task's own verifier decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from configs import ConfigError
from data import ChatTemplateError, Tokenizer
from data.tasks import Problem, TaskSpec, extract_answer, generate, prompt
from data.verifiers import Verdict, Verifiers
from evals.config import TaskEval
from evals.results import PartResult, proportion_row
from evals.scoring import Progress
from serve import Engine, Output, Request, RequestError, SamplingParams

EngineFor = Callable[
    [int], Engine
]  # an engine for prompts and answers of so many tokens together, or for fewer


def exact_match(
    task: TaskEval, engine_for: EngineFor, tokenizer: Tokenizer, progress: Progress | None = None
) -> PartResult:
    """Rows "accuracy" (the verifier gives 1) and "format" (the answer stands where it was asked for), an item
    a problem.

    Raises:
      ConfigError: an unknown task or setting, a prompt that does not fit, a model without chat template.
    """
    try:
        problems = generate([TaskSpec(task.name, task.config)], task.split, task.problems, task.seed)
    except ValueError as error:
        raise ConfigError(f"config.tasks: {task.title}: {error}") from error
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"config.tasks needs the package {error.name}: pip install 'crucible-lm[demo]' or reasoning-gym."
        ) from error
    prompts = [prompt_ids(task, problem, tokenizer) for problem in problems]
    seeds = np.random.SeedSequence(task.seed).generate_state(len(problems), np.uint64)
    requests = [
        Request(
            ids,
            SamplingParams(max_tokens=task.max_new_tokens, temperature=task.temperature, seed=int(seed)),
            detokenize=True,
        )
        for ids, seed in zip(prompts, seeds, strict=True)
    ]
    try:
        outputs = engine_for(max(map(len, prompts)) + task.max_new_tokens).generate(requests, progress)
    except RequestError as error:
        raise ConfigError(f"config.tasks: {task.title}: {error}") from error
    answers = [extract_answer(output.text) for output in outputs]
    with Verifiers() as verifiers:  # never here: scorers evaluate what they are given
        verdicts = verifiers.score(problems, answers)
    parts = zip(problems, outputs, answers, verdicts, strict=True)
    items = [_item(problem, output, answer, verdict) for problem, output, answer, verdict in parts]
    rows = [
        proportion_row(task.title, "accuracy", [item["correct"] for item in items]),
        proportion_row(task.title, "format", [item["formatted"] for item in items]),
    ]
    return PartResult(rows, items)


def prompt_ids(task: TaskEval, problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """The problem as the model is asked it: through its chat template, or as text after bos."""
    messages = prompt(problem, task.instruction)
    if task.prompt == "text":
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return start + tokenizer.encode(messages[0]["content"] + "\n")
    try:
        return tokenizer.apply_chat_template(messages)[0]
    except ChatTemplateError as error:
        raise ConfigError(
            f"config.tasks: {task.title}: {error}. "
            "For a model without chat template set the task's prompt='text'."
        ) from error


def _item(problem: Problem, output: Output, answer: str | None, verdict: Verdict) -> dict[str, Any]:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"the engine ended {problem.id} with {output.finish_reason}: {output.error}")
    return {
        "id": problem.id,
        "question": problem.question,
        "expected": problem.answer,
        "completion": output.text,
        "answer": answer,
        "correct": verdict.value >= 1.0,
        "formatted": answer is not None,
        "tokens": len(output.tokens),
        "finish_reason": output.finish_reason,
    } | ({"verifier": verdict.error} if verdict.error else {})

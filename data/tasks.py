"""Procedural tasks with verifiers, from reasoning-gym: problems for dialogues, for rewards, and for scores.

Stojanovski et al. 2025, "Reasoning Gym", arXiv:2505.24760. The split of a problem is a hash of its question,
so train, validation and test share no question, whatever the seeds and sizes.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from data.verifiers import Verifiers

Split = Literal["train", "validation", "test"]
Messages = list[dict[str, str]]

INSTRUCTION = "End with the final answer as <answer>...</answer>."
# Of 100 parts; the rest is for training.
_HELD_OUT: dict[Split, tuple[int, int]] = {"validation": (0, 10), "test": (10, 20)}


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A reasoning-gym task by name, settings that differ from its defaults, and its share of the problems."""

    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with what its verifier needs.

    Attributes:
      task: its name; "": no verifier knows what is right.
      config: the task's settings.
      messages: a dialogue that ends with the question; None: the question is all of it.
    """

    id: str
    task: str
    question: str
    answer: str
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    messages: Messages | None = None


def generate(
    specs: Sequence[TaskSpec], split: Split, size: int, seed: int, *, unique: bool = True
) -> list[Problem]:
    """`size` problems of a split, shared between the tasks by weight and shuffled; the same for the same
    arguments.

    `unique`: no question twice. Raises ValueError for an unknown task or setting, and for a task that has
    fewer questions than asked (`unique=False` repeats them then).
    """
    if split not in ("train", *_HELD_OUT):
        raise ValueError(f"split={split!r}; there are train, validation and test")
    if not specs or any(not spec.weight >= 0 for spec in specs) or not sum(spec.weight for spec in specs) > 0:
        raise ValueError("tasks: wanted at least one with a weight above 0, and none below")
    problems: list[Problem] = []
    seen: set[str] = set()
    for spec, count in zip(specs, _shares([spec.weight for spec in specs], size), strict=True):
        problems += _generate_one(spec, split, count, seed, seen if unique else None)
    return [problems[i] for i in sorted(range(len(problems)), key=lambda i: _hash(f"{seed}/{i}"))]


def split_of(question: str) -> Split:
    """The split that a question belongs to: letter case and white space make no difference."""
    part = _hash(" ".join(question.casefold().split())) % 100
    for split, (low, high) in _HELD_OUT.items():
        if low <= part < high:
            return split
    return "train"


def score(problem: Problem, answer: str | None) -> float:
    """What the task's own verifier gives an answer, 0 to 1; 1 is right.

    None (no answer in the asked format) scores 0, and so does text on which the verifier fails. The answer may be a
    model's: it is scored in a confined process, one that is kept for the next call. For many at once
    `data.verifiers.Verifiers` has several.
    """
    return _shared_verifiers().score([problem], [answer])[0].value


def score_trusted(problem: Problem, answer: str) -> float:
    """`score` in this process, for answers that no model wrote: scorers evaluate what they are given."""
    entry = {"question": problem.question, "answer": problem.answer, "metadata": dict(problem.metadata)}
    dataset = _dataset(problem.task, json.dumps(problem.config, sort_keys=True), 1, 0)
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception:  # verifiers parse what a model wrote with whatever parser they have
        return 0.0


def extract_answer(text: str) -> str | None:
    """What stands in `<answer>...</answer>`; None unless the text ends with exactly one such pair."""
    text = text.rstrip()
    if not text.endswith("</answer>") or text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    return text.partition("<answer>")[2].removesuffix("</answer>").strip()


def prompt(problem: Problem, instruction: str = INSTRUCTION) -> Messages:
    """The question as a user's message, with how to answer; a dialogue stays as it is."""
    if problem.messages is not None:
        return list(problem.messages)
    content = f"{problem.question}\n{instruction}" if instruction else problem.question
    return [{"role": "user", "content": content}]


def dialogue(problem: Problem, instruction: str = INSTRUCTION, reasoning: str = "") -> Messages:
    """The question and the right answer in the asked format, after `reasoning` if there is some."""
    answer = f"<answer>{problem.answer}</answer>"
    return [
        *prompt(problem, instruction),
        {"role": "assistant", "content": f"{reasoning}\n{answer}" if reasoning else answer},
    ]


def preference_pairs(
    problems: Sequence[Problem], instruction: str = INSTRUCTION
) -> list[tuple[Messages, str, str]]:
    """(prompt, chosen, rejected) of each problem: the right answer in the asked format is chosen; rejected
    is, in turn, the right answer without the format, and in the format the answer to the next problem of the
    same task that is wrong here. A problem for which there is no wrong answer takes the first kind."""
    pairs = []
    for i, problem in enumerate(problems):
        wrong = None
        if i % 2:
            others = (p for p in [*problems[i + 1 :], *problems[:i]] if p.task == problem.task)
            wrong = next((p.answer for p in others if score_trusted(problem, p.answer) < 1), None)
        rejected = problem.answer if wrong is None else f"<answer>{wrong}</answer>"
        pairs.append((prompt(problem, instruction), f"<answer>{problem.answer}</answer>", rejected))
    return pairs


@functools.cache
def _shared_verifiers() -> Verifiers:
    from data.verifiers import Verifiers

    verifiers = Verifiers()
    atexit.register(verifiers.close)
    return verifiers


def _generate_one(
    spec: TaskSpec, split: Split, count: int, seed: int, seen: set[str] | None
) -> list[Problem]:
    tries = 400 * count + 2000
    settings = json.dumps(spec.config, sort_keys=True)
    dataset = _dataset(spec.name, settings, tries, _hash(f"{seed}/{spec.name}/{settings}") % (1 << 31))
    problems: list[Problem] = []
    for i in range(tries):
        if len(problems) == count:
            return problems
        entry = dataset[i]
        question = entry["question"]
        key = " ".join(question.casefold().split())
        if split_of(question) != split or (seen is not None and key in seen):
            continue
        if seen is not None:
            seen.add(key)
        name = f"{spec.name}-{_hash(question):016x}"
        problems.append(
            Problem(name, spec.name, question, str(entry["answer"]), entry["metadata"], dict(spec.config))
        )
    if len(problems) == count:
        return problems
    raise ValueError(
        f"task {spec.name} with {spec.config or 'default settings'}: {tries} tries gave {len(problems)} "
        "different "
        f"{split} questions where {count} were asked. Ask for fewer, widen its settings, or allow repeats."
    )


@functools.lru_cache(maxsize=256)
def _dataset(name: str, settings: str, size: int, seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies have invalid escapes and `is` with literals
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    if name not in DATASETS:
        import difflib

        near = difflib.get_close_matches(name, DATASETS, n=3)
        raise ValueError(f"no task is named {name!r}; the nearest are {', '.join(near) or sorted(DATASETS)}")
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **_tuples(json.loads(settings)))
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"task {name} refuses the settings {settings}: {error}") from error


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _shares(weights: Sequence[float], size: int) -> list[int]:
    """`size` in parts in proportion to the weights: largest remainder."""
    exact = [weight / sum(weights) * size for weight in weights]
    parts = [int(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])[: size - sum(parts)]:
        parts[i] += 1
    return parts


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")

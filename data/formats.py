"""The formats in which people keep dialogues, preferences and prompts: found by their keys, held against what they
should be, and turned into one form.

| format     | a row                                                                     | becomes    |
|------------|---------------------------------------------------------------------------|------------|
| hh         | {"chosen", "rejected"}: text, "\\n\\nHuman: ... \\n\\nAssistant: ..."         | preference |
| preference | {"prompt", "chosen", "rejected"}: text or messages, the prompt in them or not | preference |
| oasst      | a tree of messages, {"prompt": {"text", "role", "replies"}}                | chat       |
| steps      | {"prompt", "completions": [step, ...], "labels": [true, 0.5, ...]}         | steps      |
| kto        | messages, or {"prompt", "completion"}, with "label" true or false         | labelled   |
| messages   | {"messages": [{"role", "content"}, ...]} with "tools": OpenAI, ChatML      | chat       |
| sharegpt   | {"conversations": [{"from", "value"}, ...]} with "system", "tools"          | chat       |
| alpaca     | {"instruction", "input", "output"} with "system", "history"               | chat       |
| completion | {"prompt", "completion"}: text or messages                                | chat       |
| prompt     | text, {"prompt"}, {"question"} or messages without an answer; with "answer", ... for RL | prompt |

Messages come out as {"role": system | user | assistant | tool, "content": text}, with "reasoning_content" and
"tool_calls" where there are some, as chat templates take them (data/messages.py).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from data.messages import Message, not_empty, read_messages, read_tools, text_of, without_weight
from data.row_files import RowError, has_lone_surrogates

Makes = Literal["chat", "preference", "labelled", "steps", "prompt"]
FormatName = Literal[
    "hh", "preference", "oasst", "steps", "kto", "messages", "sharegpt", "alpaca", "completion", "prompt"
]


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Messages of which those of the assistant are trained on; `untrained` are the numbers of those that are not."""

    messages: list[Message]
    tools: list[Any] | None = None
    untrained: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt and two answers, each an assistant's message."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: list[Any] | None = None


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A prompt, an answer, and whether it is desired. Ethayarajh et al. 2024 (KTO), arXiv:2402.01306."""

    prompt: list[Message]
    answer: Message
    label: bool
    tools: list[Any] | None = None


@dataclasses.dataclass(frozen=True)
class Steps:
    """A prompt, the steps of an answer, and the probability that the answer is right up to each of them."""

    prompt: list[Message]
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    tools: list[Any] | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to sample an answer to, and the right one where it is known."""

    messages: list[Message]
    answer: str | None = None
    tools: list[Any] | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


Example = Dialogue | Preference | Labelled | Steps | Prompt


class Format(NamedTuple):
    """How to know a row of a format, and how to read it."""

    makes: Makes
    fits: Callable[[Any], bool]
    read: Callable[[Any], Example]
    wanted: str


def detect(row: Any) -> FormatName:
    """The format of a row by its keys. Raises RowError that names them."""
    if _has(row, "messages") and _has_no_answer(row["messages"]) and not _has(row, "label"):
        return "prompt"
    for name, format in FORMATS.items():
        if format.fits(row):
            return name
    keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
    known = "; ".join(f"{name}: {format.wanted}" for name, format in FORMATS.items())
    raise RowError("a row of no known format", f"it has {keys}. Known are {known}.")


def read_example(row: Any, format: FormatName) -> Example:
    """A row in its one form. Raises RowError that says what was wrong and what was wanted."""
    if not FORMATS[format].fits(row):
        keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise RowError(f"not a row of format {format!r}", f"it has {keys}; wanted {FORMATS[format].wanted}.")
    if has_lone_surrogates(row):
        raise RowError("the text is not valid Unicode", "a lone surrogate, half of a pair")
    if isinstance(row, Mapping) and (seen := [name for name in _NOT_TEXT if row.get(name)]):
        raise RowError(f"a row with {seen[0]}", "wanted text alone: only text models are trained here")
    return FORMATS[format].read(row)


_NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio")


def _read_hh(row: Mapping) -> Preference:
    return _pair(_hh_messages(row["chosen"], "chosen"), _hh_messages(row["rejected"], "rejected"), None)


def _hh_messages(text: str, name: str) -> list[Message]:
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip():
        raise RowError(f'{name} does not begin with "\\n\\nHuman:"', f"it begins {text[:40]!r}")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2])
    return [{"role": roles[who], "content": said.removeprefix(" ")} for who, said in turns]


def _read_preference(row: Mapping) -> Preference:
    tools = read_tools(row)
    suffix = "_messages" if _has(row, "chosen_messages", "rejected_messages") else ""
    chosen, rejected = row[f"chosen{suffix}"], row[f"rejected{suffix}"]
    prompt = _prompt_of(row)
    whole = [_after_prompt(prompt, _answer(x, n), n) for x, n in ((chosen, "chosen"), (rejected, "rejected"))]
    return _pair(whole[0], whole[1], tools)


def _after_prompt(prompt: list[Message], said: list[Message], name: str) -> list[Message]:
    """The prompt and what is said after it. Many sets repeat the prompt in what is said: there it counts once.

    Raises RowError where `said` begins with other messages than the prompt.
    """
    if not prompt or not said or said[0]["role"] == "assistant":
        return [*prompt, *said]
    if prompt[-1]["role"] == "assistant" and said[0]["role"] != "system":
        return [*prompt, *said]  # the dialogue goes on
    system = [message for message in (*prompt[:1], *said[:1]) if message["role"] == "system"]
    if len(system) == 2 and not _same(system[0], system[1]):
        raise RowError(f"{name} has another system message than the prompt", "wanted one system message")
    asked, dialogue = ([m for m in messages if m["role"] != "system"] for messages in (prompt, said))
    starts = range(max(len(dialogue) - len(asked), 0))
    start = next((i for i in starts if all(map(_same, asked, dialogue[i:]))), None)
    if start is None:
        raise RowError(
            f"{name} begins with other messages than the prompt",
            "wanted the answer alone, or the prompt and the answer",
        )
    return [*system[:1], *dialogue[:start], *asked, *dialogue[start + len(asked) :]]


def _same(one: Message, other: Message) -> bool:
    """Whether two messages say the same; space around them is no difference."""
    return one["role"] == other["role"] and one["content"].strip() == other["content"].strip()


def _pair(chosen: list[Message], rejected: list[Message], tools: list[Any] | None) -> Preference:
    """The prompt is what both have before their last message."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(messages, name)
        if len(messages) < 2:
            raise RowError(f"{name} answers no prompt", "wanted a prompt, as a key or as the first messages")
    plain = [[without_weight(m) for m in messages[:-1]] for messages in (chosen, rejected)]
    if plain[0] != plain[1]:
        raise RowError(
            "chosen and rejected differ before the last answer", "wanted one prompt with two answers to it"
        )
    if without_weight(chosen[-1]) == without_weight(rejected[-1]):
        raise RowError("chosen and rejected are the same answer", "wanted two answers, one of them preferred")
    return Preference(plain[0], without_weight(chosen[-1]), without_weight(rejected[-1]), tools)


def _read_kto(row: Mapping) -> Labelled:
    label = row["label"] if _has(row, "label") else row["kto_tag"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise RowError("label is no truth value", f"it is {label!r}; wanted true (desired) or false")
    messages = [
        without_weight(m)
        for m in (read_messages(row["messages"]) if _has(row, "messages") else _completed(row))
    ]
    _check_answer(messages, "the dialogue")
    return Labelled(messages[:-1], messages[-1], bool(label), read_tools(row))


def _read_oasst(row: Mapping) -> Dialogue:
    """The best path: from each message on to its reply of the lowest rank, and no further than an answer."""
    node, messages, length = row["prompt"], [], 0
    while isinstance(node, Mapping):
        role = _OASST_ROLES.get(str(node.get("role")))
        if role is None:
            raise RowError("a message of a tree has no known role", f"it is {node.get('role')!r:.40}")
        messages.append({"role": role, "content": text_of(node.get("text"), "text")})
        if role == "assistant":
            length = len(messages)
        replies = [reply for reply in node.get("replies") or [] if isinstance(reply, Mapping)]
        replies = [reply for reply in replies if not reply.get("deleted")]
        ranked = [reply for reply in replies if isinstance(reply.get("rank"), int)]
        node = min(ranked, key=lambda reply: reply["rank"]) if ranked else next(iter(replies), None)
    return _dialogue(messages[:length], row)


_OASST_ROLES = {"prompter": "user", "assistant": "assistant", "system": "system"}


def _is_oasst(row: Any) -> bool:
    return (
        _has(row, "prompt") and isinstance(row["prompt"], Mapping) and {"text", "role"} <= set(row["prompt"])
    )


def _read_messages(row: Mapping) -> Dialogue:
    messages = read_messages(row["messages"] if _has(row, "messages") else row["conversations"])
    return _dialogue(messages, row)


def _read_sharegpt(row: Mapping) -> Dialogue:
    return _dialogue(read_messages(row["conversations"]), row)


def _read_alpaca(row: Mapping) -> Dialogue:
    messages: list[Message] = []
    for i, turn in enumerate(row.get("history") or []):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise RowError(
                "a turn of history is no pair", f"history[{i}] is {turn!r:.80}; wanted [question, answer]"
            )
        asked, said = (text_of(part, f"history[{i}]") for part in turn)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    question = text_of(row["instruction"], "instruction")
    if more := text_of(row.get("input") or "", "input"):
        question = f"{question}\n\n{more}" if question else more
    name = "output" if _has(row, "output") else "response"
    messages += [
        {"role": "user", "content": question},
        {"role": "assistant", "content": text_of(row[name], name)},
    ]
    return _dialogue(messages, row)


def _read_completion(row: Mapping) -> Dialogue:
    messages = _completed(row)
    _check_answer(messages, "the completion")
    prompt = sum(message["role"] == "assistant" for message in messages[:-1])
    dialogue = _dialogue(messages, row)  # the system message is among the prompt's
    return dataclasses.replace(dialogue, untrained=tuple(range(prompt)))


def _read_prompt(row: Any) -> Prompt:
    if isinstance(row, str):
        return Prompt([{"role": "user", "content": not_empty(row, "the prompt")}])
    prompt = [without_weight(m) for m in _prompt_of(row)]
    if not prompt:
        raise RowError("the prompt is empty", "wanted text or messages")
    name = next((name for name in _ANSWERS if row.get(name) is not None), None)
    answer = None if name is None else row[name]
    if answer is not None and not isinstance(answer, str):
        answer = json.dumps(answer, ensure_ascii=False)
    kept = {
        k: v
        for k, v in row.items()
        if k not in (*_PROMPTS, name, "tools", "system", "messages", "conversations") and _is_plain(v)
    }
    return Prompt(prompt, answer, read_tools(row), kept)


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


_PROMPTS = ("prompt", "question", "problem")
_ANSWERS = ("answer", "solution", "ground_truth", "target", "reference_answer")
_COMPLETIONS = ("completion", "response")


def _has(row: Any, *names: str) -> bool:
    return isinstance(row, Mapping) and all(row.get(name) is not None for name in names)


def _is_hh(row: Any) -> bool:
    texts = [row["chosen"], row["rejected"]] if _has(row, "chosen", "rejected") else []
    return (
        len(texts) == 2
        and not _has_prompt(row)
        and all(isinstance(text, str) and text.lstrip().startswith("Human:") for text in texts)
    )


def _has_prompt(row: Any) -> bool:
    return any(_has(row, name) and isinstance(row[name], (str, list)) for name in _PROMPTS)


def _has_no_answer(messages: Any) -> bool:
    """Whether messages end with a question: a prompt alone."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    roles = [last.get("role"), last.get("from")] if isinstance(last, Mapping) else []
    return "user" in roles or "human" in roles


def _read_steps(row: Mapping) -> Steps:
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        raise RowError("no steps", f"completions is {str(steps)[:60]!r}; wanted a list of texts")
    if not isinstance(labels, Sequence) or len(labels) != len(steps):
        raise RowError("labels do not fit the steps", f"{len(steps)} steps and labels {str(labels)[:60]}")
    for label in labels:
        if isinstance(label, str) or not isinstance(label, (bool, int, float)) or not 0 <= label <= 1:
            raise RowError("a label that is none", f"{label!r}; wanted true, false or a probability")
    texts = tuple(text_of(step, "a step") for step in steps)
    if not all(text.strip() for text in texts):
        raise RowError("a step is empty", "wanted text in each of completions")
    return Steps(_prompt_of(row), texts, tuple(map(float, labels)), read_tools(row))


def _is_kto(row: Any) -> bool:
    answered = _has(row, "messages") or (_has_prompt(row) and any(_has(row, c) for c in _COMPLETIONS))
    return answered and (_has(row, "label") or _has(row, "kto_tag"))


FORMATS: dict[FormatName, Format] = {
    "hh": Format("preference", _is_hh, _read_hh, '{"chosen", "rejected"} as "\\n\\nHuman: ..." text'),
    "preference": Format(
        "preference",
        lambda row: _has(row, "chosen", "rejected") or _has(row, "chosen_messages", "rejected_messages"),
        _read_preference,
        '{"prompt", "chosen", "rejected"}',
    ),
    "oasst": Format("chat", _is_oasst, _read_oasst, '{"prompt": {"text", "role", "replies": [...]}}'),
    "steps": Format(
        "steps",
        lambda row: _has(row, "prompt", "completions", "labels"),
        _read_steps,
        '{"prompt", "completions", "labels"}',
    ),
    "kto": Format(
        "labelled", _is_kto, _read_kto, '{"prompt", "completion", "label"} or {"messages", "label"}'
    ),
    "messages": Format(
        "chat",
        lambda row: _has(row, "messages"),
        _read_messages,
        '{"messages": [...]}',
    ),
    "sharegpt": Format(
        "chat",
        lambda row: _has(row, "conversations"),
        _read_sharegpt,
        '{"conversations": [{"from", "value"}]}',
    ),
    "alpaca": Format(
        "chat",
        lambda row: _has(row, "instruction") and (_has(row, "output") or _has(row, "response")),
        _read_alpaca,
        '{"instruction", "input", "output"}',
    ),
    "completion": Format(
        "chat",
        lambda row: _has_prompt(row) and any(_has(row, name) for name in _COMPLETIONS),
        _read_completion,
        '{"prompt", "completion"}',
    ),
    "prompt": Format(
        "prompt",
        lambda row: isinstance(row, str) or _has_prompt(row) or _has(row, "messages"),
        _read_prompt,
        '{"prompt", "answer"} or text',
    ),
}


def _prompt_of(row: Mapping) -> list[Message]:
    """What comes before the answer, wherever a row keeps it."""
    system = (
        [{"role": "system", "content": row["system"]}]
        if isinstance(row.get("system"), str) and row["system"]
        else []
    )
    for name in ("conversations", "messages"):
        if row.get(name):
            return [*system, *read_messages(row[name])]
    for name in _PROMPTS:
        value = row.get(name)
        if isinstance(value, str):
            return [*system, {"role": "user", "content": not_empty(value, name)}]
        if value is not None:
            return [*system, *read_messages(value)]
    if _has(row, "instruction"):
        asked = [text_of(row["instruction"], "instruction"), text_of(row.get("input") or "", "input")]
        return [
            *system,
            {"role": "user", "content": not_empty("\n\n".join(filter(None, asked)), "instruction")},
        ]
    return []


def _completed(row: Mapping) -> list[Message]:
    name = next(name for name in _COMPLETIONS if row.get(name) is not None)
    return _after_prompt(_prompt_of(row), _answer(row[name], name), name)


def _answer(value: Any, name: str) -> list[Message]:
    """Text, a message or messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return read_messages([value] if isinstance(value, Mapping) else value)


def _check_answer(messages: list[Message], name: str) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        last = messages[-1]["role"] if messages else "nothing"
        raise RowError(
            f"{name} does not end with an answer", f"it ends with {last}; wanted the assistant's message"
        )
    if _is_empty(messages[-1]):
        raise RowError(f"{name} ends with an empty answer", "wanted text or a tool call")


def _is_empty(message: Message) -> bool:
    said = message["content"] + message.get("reasoning_content", "")
    return not said.strip() and not message.get("tool_calls")


def _dialogue(messages: list[Message], row: Mapping) -> Dialogue:
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    said = [message for message in messages if message["role"] == "assistant"]
    if not said:
        raise RowError("the assistant says nothing", "wanted at least one message of the assistant")
    if any(_is_empty(message) for message in said):
        raise RowError("an answer is empty", "wanted text or a tool call in each message of the assistant")
    untrained = tuple(i for i, message in enumerate(said) if message.get("weight") == 0)
    if len(untrained) == len(said):
        raise RowError("no answer has a weight", "wanted one message of the assistant to train on")
    return Dialogue([without_weight(message) for message in messages], read_tools(row), untrained)

"""Messages as chat templates read them, whichever way they were written.

What transformers 5 does (utils/chat_template_utils.py) is done here too: a key that is null is left out, and reasoning
goes by all of its three names. As in vLLM, tool calls have OpenAI's form and their arguments are an object; a template
that adds them to text instead sees their JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")


class Arguments(dict):
    """The arguments of a tool call: an object to most templates, and JSON text to those that add it to text."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: Any) -> str:
        return str(self) + other

    def __radd__(self, other: Any) -> str:
        return other + str(self)


def for_template(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A fresh list of messages in the one form that templates expect."""
    return [_message(message) for message in messages]


def reasoning_of(message: Mapping[str, Any]) -> Any:
    """The reasoning of a message under any of its names, None where it has none."""
    return next((message[name] for name in REASONING if message.get(name) is not None), None)


def with_reasoning_in_content(
    messages: Sequence[Mapping[str, Any]], template: str | None
) -> list[Mapping[str, Any]]:
    """For a template that reads reasoning by none of its names, and so would drop it: the reasoning in <think> tags
    before the answer, as reasoning models write it."""
    if any(name in (template or "") for name in REASONING):
        return list(messages)
    folded: list[Mapping[str, Any]] = []
    for message in messages:
        reasoning = reasoning_of(message)
        if isinstance(reasoning, str):
            rest = {key: value for key, value in message.items() if key not in REASONING}
            message = rest | {"content": f"<think>\n{reasoning}\n</think>\n\n{message.get('content') or ''}"}
        folded.append(message)
    return folded


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: value for key, value in message.items() if value is not None}
    reasoning = reasoning_of(shown)
    if reasoning is not None:
        shown = {"thinking": reasoning, **shown, "reasoning_content": reasoning}
    if "function_call" in shown and "tool_calls" not in shown:  # OpenAI's older form of a single call
        shown["tool_calls"] = [shown.pop("function_call")]
    if isinstance(shown.get("tool_calls"), (list, tuple)):
        shown["tool_calls"] = [_call(call) for call in shown["tool_calls"]]
    return shown


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if not isinstance(call.get("function"), Mapping):
        call = {"type": "function", "function": dict(call)}
        if "id" in call["function"]:
            call["id"] = call["function"].pop("id")
        call["function"].pop("type", None)
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            pass  # a model wrote it; the template shows it as it is
    if arguments is None:
        arguments = {}
    if isinstance(arguments, Mapping):
        function["arguments"] = Arguments(arguments)
    return {**call, "function": function}

"""Messages of every spelling in one form: {"role": system | user | assistant | tool, "content": text}.

Where a row has them there are "reasoning_content", what the assistant thought before it answered; "tool_calls" in
OpenAI's form, [{"id", "type": "function", "function": {"name", "arguments"}}] with the arguments as an object; a tool's
"name" and "tool_call_id"; and "weight". Typed parts of text are joined; images and other parts that a text model can't
read are errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data.row_files import RowError
from data.template_messages import REASONING

Message = dict[str, Any]
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip


def read_messages(value: Any) -> list[Message]:
    """Messages in the one form. Raises RowError that names the message's number."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise RowError(
            "messages are no list", f"they are {value!r:.80}; wanted a list with at least one message"
        )
    return [_message(item, i) for i, item in enumerate(value)]


def _message(item: Any, i: int) -> Message:
    where = f"message {i + 1}"
    if not isinstance(item, Mapping):
        raise RowError("a message is no object", f"{where} is {item!r:.80}")
    given = item.get("role", item.get("from"))
    if not isinstance(given, str) or given not in _ROLES:
        raise RowError("an unknown role", f"{where} has {given!r}; wanted one of {', '.join(_ROLES)}")
    content = item.get("content", item.get("value"))
    message: Message = {"role": _ROLES[given]}
    calls = [_call(call, where) for call in _list(item.get("tool_calls"), where)]
    if item.get("function_call") is not None:  # OpenAI's older form of a single call
        calls.append(_call(item["function_call"], where))
    if given in ("function_call", "tool_call"):
        calls, content = _calls(content, where), ""
    names = [name for name in REASONING if item.get(name) is not None]
    thoughts = [text_of(item[name], f"{where}, {name}") for name in names[:1]]
    text, more, more_thoughts = _content(content, where, bool(calls or thoughts))
    message["content"] = text
    if reasoning := "".join(thoughts or more_thoughts):
        if message["role"] != "assistant":
            raise RowError("reasoning that is not the assistant's", f"{where} is of role {message['role']}")
        message["reasoning_content"] = reasoning
    if calls + more:
        message["tool_calls"] = calls + more
    for key in ("name", "tool_call_id"):
        if item.get(key) is not None:
            message[key] = text_of(item[key], f"{where}, {key}")
    return message | _weight(item, message["role"], where)


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise RowError("tool_calls are no list", f"{where} has {value!r:.80}")
    return list(value)


def _weight(item: Mapping, role: str, where: str) -> Message:
    weight = next((item[k] for k in ("weight", "loss_weight", "train") if item.get(k) is not None), None)
    if weight is None:
        return {}
    if weight not in (0, 1):
        raise RowError("a weight between", f"{where} has {weight!r}; wanted 0 or 1")
    if role != "assistant" and weight == 1:
        raise RowError("a weight on what the assistant did not say", f"{where} is of role {role}; wanted 0")
    return {"weight": int(weight)}


def without_weight(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "weight"}


def _content(content: Any, where: str, may_be_empty: bool) -> tuple[str, list[Any], list[str]]:
    """Text, tool calls and reasoning of a message's content: text, typed parts, or nothing beside a tool call or
    reasoning."""
    if isinstance(content, str):
        return content, [], []
    if content is None and may_be_empty:
        return "", [], []
    if not isinstance(content, Sequence):
        raise RowError("content is no text", f"{where} has {content!r:.80}; wanted text or a list of parts")
    texts, calls, thoughts = [], [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get(kind, part.get("value", part.get("text"))) if isinstance(part, Mapping) else None
        if kind in ("text", "input_text", "output_text"):
            texts.append(text_of(value, where))
        elif kind in ("reasoning", "thinking"):
            thoughts.append(text_of(value, where))
        elif kind == "tool_call":
            calls += _calls(value, where)
        else:
            raise RowError(
                f"an unsupported part {kind!r}", f"{where}; wanted text, reasoning or tool_call parts"
            )
    return "".join(texts), calls, thoughts


def _calls(value: Any, where: str) -> list[Any]:
    """Tool calls written as JSON text, one or a list of them."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError("a tool call is not valid JSON", f"{where}: {error}") from None
    return [_call(call, where) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any, where: str) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("a tool call has no name", f"{where} has {call!r:.80}; wanted {{name, arguments}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI keeps them as JSON text
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise RowError(
                "a tool call's arguments are not valid JSON", f"{where}: {arguments!r:.80}"
            ) from None
    if arguments is None:
        arguments = {}
    named = {"id": text_of(call["id"], f"{where}, id")} if call.get("id") is not None else {}
    return named | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_tools(row: Mapping) -> list[Any] | None:
    """The tools that a row offers, written as a list or as its JSON text."""
    tools = row.get("tools", row.get("functions"))
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError("tools are not valid JSON", str(error)) from None
    if tools is not None and not isinstance(tools, list):
        raise RowError("tools are no list", f"they are {tools!r:.80}")
    return tools or None


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("wanted text", f"{name} is {type(value).__name__}")
    return value


def not_empty(value: str, name: str) -> str:
    if not value.strip():
        raise RowError("the prompt is empty", f"{name} has no text")
    return value

"""Messages of a chat and the tools that a model may call, as OpenAI's clients send them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from serve.http.body import Strict, shown
from serve.http.errors import ApiError

# What clients and servers add to messages that changes no answer.
_LABELS = frozenset(("id", "object", "created", "status", "index"))


def without(labels: Iterable[str]) -> Any:
    """Drops labels and nulls from an object before it is checked."""

    def drop(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: each for key, each in value.items() if each is not None and key not in labels}

    return pydantic.model_validator(mode="before")(drop)


class FunctionCall(Strict):
    name: str
    arguments: str  # JSON, as a model wrote it


class ToolCall(Strict):
    _prepare = without({"index"})

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """A message as clients send it, and as they send back what they were answered."""

    _prepare = without(_LABELS)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name of the same
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def for_template(self, where: str) -> dict[str, Any]:
        """The fields that chat templates read; "developer" is what newer clients call "system".

        What an assistant said may be nothing beside its tool calls or reasoning.
        """
        assistant = {key: getattr(self, key) for key in ("tool_calls", "reasoning_content", "reasoning")}
        for key, value in (assistant | {"refusal": self.refusal}).items():
            if value and self.role != "assistant":
                raise ApiError(
                    400, f"{where}.{key} is of role {self.role}; wanted assistant.", f"{where}.{key}"
                )
        if self.tool_call_id is not None and self.role != "tool":
            name = f"{where}.tool_call_id"
            raise ApiError(400, f"{name} is of role {self.role}; wanted tool.", name)
        content = self.refusal if self.content is None else self.content
        fields: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        if content is not None or not any(assistant.values()):
            fields["content"] = text_of(content, f"{where}.content")
        if self.tool_calls:
            fields["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        rest = {"name": self.name, "tool_call_id": self.tool_call_id}
        rest["reasoning_content"] = self.reasoning_content or self.reasoning
        return fields | {key: value for key, value in rest.items() if value is not None}


class Function(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


def text_of(content: Any, where: str) -> str:
    """The text of a message's content: a string, or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(
            400, f"{where} must be a string or a list of text parts; it is {shown(content)}.", where
        )
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            wanted = '{"type": "text", "text": "..."}'
            raise ApiError(400, f"{where}[{i}] is {shown(part)}; wanted {wanted}.", f"{where}[{i}]")
    return "".join(part["text"] for part in content)

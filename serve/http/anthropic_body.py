"""What Anthropic's Messages API takes, and the same request as /v1/chat/completions has it.

Messages are turns of content blocks there: the tools' results are blocks of the user's turn, and what the assistant
thought and called are blocks of its own.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from serve.http.api import MAX_MESSAGES, MAX_TOOLS, ChatBody
from serve.http.body import Strict, json_object, shown, validated
from serve.http.errors import ApiError
from serve.http.messages import text_of, without
from serve.parsers import AnswerForm
from serve.request import MAX_STOP_CHARS, MAX_STOP_STRINGS

_MOST = 2**31 - 1  # tokens
_GAP = "\n\n"  # between the texts of two turns of one role, which are one turn
# Fields that change no answer here: labels, where it is computed, and what is cached.
_IGNORED = frozenset("metadata service_tier cache_control inference_geo user_profile_id workspace_id".split())
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "container": (None,),
    "context_management": (None,),
    "diagnostics": (None,),
    "mcp_servers": (None, []),
    "speed": (None, "standard"),
}


class TextBlock(Strict):
    _prepare = without({"cache_control", "citations"})

    type: Literal["text"] = "text"
    text: str


class ThinkingBlock(Strict):
    _prepare = without(())

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None  # not checked: a thought is what the client says it was


class ToolUseBlock(Strict):
    _prepare = without({"cache_control", "caller"})

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Strict):
    _prepare = without({"cache_control"})

    type: Literal["tool_result"]
    tool_use_id: str
    content: Any = None
    is_error: bool | None = None  # templates have no place for it; the text says what went wrong


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock
_BLOCKS: dict[tuple[str, str], type[Block]] = {
    ("user", "text"): TextBlock,
    ("user", "tool_result"): ToolResultBlock,
    ("assistant", "text"): TextBlock,
    ("assistant", "thinking"): ThinkingBlock,
    ("assistant", "tool_use"): ToolUseBlock,
    ("system", "text"): TextBlock,
}


class Turn(Strict):
    role: Literal["user", "assistant", "system"]
    content: Any


class CustomTool(Strict):
    _prepare = without({"cache_control", "eager_input_streaming"})

    type: Literal["custom"] = "custom"  # others run on Anthropic's servers
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    defer_loading: Literal[False] | None = None

    def for_chat(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {
            "type": "function",
            "function": {key: value for key, value in function.items() if value is not None},
        }


class ToolChoice(Strict):
    _prepare = without(())

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Strict):
    _prepare = without(())

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    _prepare = without(())

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountBody(Strict):
    """What decides the prompt: all that /v1/messages/count_tokens takes."""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Any = None
    tools: Annotated[list[CustomTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None

    def chat_body(self, switches: list[str], form: AnswerForm) -> ChatBody:
        """The same request to /v1/chat/completions, without a limit of tokens. Raises ApiError with status 400.

        Args:
          switches: variables of the model's chat template that turn thinking on and off.
          form: of the model's answers.
        """
        messages = self._messages()
        fields: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.tools:
            fields["tools"] = [tool.for_chat() for tool in self.tools]
        fields |= self._choice() | self._thinking(switches, form) | self._output()
        if messages[-1]["role"] == "assistant":
            if messages[-1].get("tool_calls") or "content" not in messages[-1]:
                message = "the last turn is the assistant's, and only its text can be gone on with."
                raise ApiError(400, f"messages: {message}", "messages")
            fields["continue_final_message"] = True
        return validated(ChatBody, fields | self._more())

    def _more(self) -> dict[str, Any]:
        return {}

    def _messages(self) -> list[dict[str, Any]]:
        found = []
        if self.system not in (None, "", []):
            found.append({"role": "system", "content": _text(self.system, "system")})
        for role, blocks in self._turns():
            found += _assistant(blocks) if role == "assistant" else _told(role, blocks)
        return found

    def _turns(self) -> list[tuple[str, list[Block]]]:
        """Turns with their blocks; neighbours of one role are one turn."""
        turns: list[tuple[str, list[Block]]] = []
        for i, turn in enumerate(self.messages):
            blocks = _blocks(turn, f"messages[{i}].content")
            if not turns or turns[-1][0] != turn.role:
                turns.append((turn.role, blocks))
                continue
            before = turns[-1][1]
            if isinstance(before[-1], TextBlock) and isinstance(blocks[0], TextBlock):
                before.append(TextBlock(text=_GAP))
            before.extend(blocks)
        return turns

    def _choice(self) -> dict[str, Any]:
        choice = self.tool_choice
        if choice is None:
            return {}
        names = [tool.name for tool in self.tools or ()]
        if (choice.name is not None) != (choice.type == "tool"):
            raise ApiError(400, 'tool_choice.name belongs to type "tool", and to no other.', "tool_choice")
        if choice.type in ("any", "tool") and not names:
            raise ApiError(400, f"tool_choice={choice.type} needs tools.", "tool_choice")
        if choice.type == "tool" and choice.name not in names:
            raise ApiError(400, f"tool_choice.name={shown(choice.name)} is none of the tools.", "tool_choice")
        named = {"type": "function", "function": {"name": choice.name}}
        fields: dict[str, Any] = {"tool_choice": _CHOICES.get(choice.type, named)}
        if choice.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        return fields

    def _thinking(self, switches: list[str], form: AnswerForm) -> dict[str, Any]:
        config = self.thinking
        if config is None:
            return {}
        if (config.budget_tokens is not None) != (config.type == "enabled"):
            message = 'thinking.budget_tokens is needed by type "enabled", and belongs to no other.'
            raise ApiError(400, message, "thinking")
        if config.type == "disabled" and not switches and not form.plain:
            message = (
                "thinking: this model's chat template has no switch that turns thinking off; leave it out."
            )
            raise ApiError(400, message, "thinking")
        fields: dict[str, Any] = {}
        if switches:
            fields["chat_template_kwargs"] = dict.fromkeys(switches, config.type != "disabled")
        if config.budget_tokens is not None:
            fields["thinking_budget"] = config.budget_tokens
        return fields

    def _output(self) -> dict[str, Any]:
        wanted, fields = self.output_config, {}
        if wanted is not None and wanted.effort is not None:
            fields["reasoning_effort"] = wanted.effort
        if wanted is not None and wanted.format is not None:
            schema = {"schema": wanted.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields


class MessagesBody(CountBody):
    max_tokens: Annotated[int, Field(ge=1, le=_MOST)]
    stream: bool | None = None
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
            Field(max_length=MAX_STOP_STRINGS),
        ]
        | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None

    def _more(self) -> dict[str, Any]:
        budget = self.thinking and self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            message = f"thinking.budget_tokens={budget} leaves nothing of max_tokens={self.max_tokens} to the answer."
            raise ApiError(400, message, "thinking")
        fields = {name: getattr(self, name) for name in ("stream", "temperature", "top_p", "top_k")}
        return fields | {"stop": self.stop_sequences}


_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
Kind = TypeVar("Kind", bound=CountBody)


def parse_messages(raw: bytes, kind: type[Kind]) -> Kind:
    """A checked request body; ApiError with status 400 and the reason for anything else."""
    fields = json_object(raw)
    for name, neutral in _NEUTRAL.items():
        value = fields.pop(name, None)
        if value not in neutral:
            raise ApiError(400, f"{name}={shown(value)} is not supported by this server.", name)
    return validated(kind, {name: value for name, value in fields.items() if name not in _IGNORED})


# What the requests made here call a field, and what Anthropic's API does.
_NAMES = {
    "thinking_budget": "thinking.budget_tokens",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "grammar": "output_config.format",
}


def in_anthropic_words(error: ApiError) -> ApiError:
    """The error of a chat request with the names of fields that the client used."""
    name = _NAMES.get(error.param or "")
    if name is None:
        return error
    rest = error.message.removeprefix(error.param or "")
    message = f"{name}{rest}" if rest != error.message else f"{name}: {rest}"
    return ApiError(error.status, message, name, error.code, error.headers)


def _blocks(turn: Turn, where: str) -> list[Block]:
    content = turn.content
    if isinstance(content, str):
        return [TextBlock(text=content)]
    if not isinstance(content, list) or not content:
        message = f"{where} must be a string or a list of content blocks; it is {shown(content)}."
        raise ApiError(400, message, where)
    return [_block(turn.role, block, f"{where}[{i}]") for i, block in enumerate(content)]


def _block(role: str, block: Any, where: str) -> Block:
    name = block.get("type") if isinstance(block, dict) else None
    kind = _BLOCKS.get((role, name)) if isinstance(name, str) else None
    if kind is None:
        wanted = ", ".join(each for of, each in _BLOCKS if of == role)
        message = (
            f"{where}: a block of type {shown(name)} is not served in a turn of role {role}; wanted {wanted}."
        )
        raise ApiError(400, message, where)
    try:
        return validated(kind, block)
    except ApiError as error:
        raise ApiError(400, f"{where}: {error.message}", where) from None


def _text(content: Any, where: str) -> str:
    """The text of a system prompt or a tool's result."""
    if isinstance(content, list) and content:
        return "".join(
            block.text
            for i, part in enumerate(content)
            if isinstance(block := _block("system", part, f"{where}[{i}]"), TextBlock)
        )
    return text_of(content, where)


def _told(role: str, blocks: list[Block]) -> list[dict[str, Any]]:
    """A turn of the user or the system: tools' results, each a message of its own, and texts."""
    found: list[dict[str, Any]] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            result = "" if block.content in (None, []) else _text(block.content, "tool_result.content")
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
        elif isinstance(block, TextBlock) and found and found[-1]["role"] == role:
            found[-1]["content"] += block.text
        elif isinstance(block, TextBlock):
            found.append({"role": role, "content": block.text})
    return found


def _assistant(blocks: list[Block]) -> list[dict[str, Any]]:
    text = "".join(block.text for block in blocks if isinstance(block, TextBlock))
    thought = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    message: dict[str, Any] = {"role": "assistant"}
    if text or not calls:
        message["content"] = text
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.input, ensure_ascii=False)},
            }
            for call in calls
        ]
    return [message]

"""What the OpenAI API takes: request bodies, read strictly, with a reason for everything that is wrong.

Chat completions and completions as in OpenAI's API reference, with vLLM's extras `top_k`, `min_p`, `ignore_eos`,
`stop_token_ids` and `stream_options.continuous_usage_stats`.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import ConfigDict, Field

from serve.request import MAX_LOGPROBS, RequestError, SamplingParams

MAX_CHOICES = 16  # answers of one HTTP request: prompts times n
MAX_MESSAGES = 2048
MAX_TOOLS = 128
MAX_NESTING = 64  # levels of objects and lists in a body

# Fields of OpenAI's API that change no answer here, whatever their value: labels, where a copy is kept, how fast it is
# wanted, and how many tools may be called at once, since no answer has tool calls.
_IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls prediction".split()
)
# Fields that are not served: fine with the value that asks for nothing, refused with any other.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "chat_template_kwargs": (None, {}),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kinds.get(self.status, kind)}
        return {"error": {**error, "param": self.param, "code": self.code}}


class _Strict(pydantic.BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; never sent


class _Body(_Strict):
    """What both endpoints take. Ranges of sampling parameters are those of `SamplingParams`."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # -1: all, as vLLM has it
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Any = None
    stop_token_ids: Any = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None

    def sampling(self, choice: int, logprobs: int | None, max_tokens: int | None) -> SamplingParams:
        """Parameters of the answer number `choice`; each has a seed of its own when one was given."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=0.0 if self.min_p is None else self.min_p,
            seed=None if self.seed is None else (self.seed + choice) % 2**64,
            stop=() if self.stop is None else self.stop,
            stop_token_ids=() if self.stop_token_ids is None else self.stop_token_ids,
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )


class FunctionCall(_Strict):
    name: str
    arguments: str  # JSON, as a model wrote it


class ToolCall(_Strict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(_Strict):
    """A message as clients send it, and as they send back what they were answered."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name of the same
    refusal: str | None = None
    audio: None = None
    function_call: None = None
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
        shown: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        if content is not None or not any(assistant.values()):
            shown["content"] = _text_of(content, f"{where}.content")
        if self.tool_calls:
            shown["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        rest = {"name": self.name, "tool_call_id": self.tool_call_id}
        rest["reasoning_content"] = self.reasoning_content or self.reasoning
        return shown | {key: value for key, value in rest.items() if value is not None}


class Function(_Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class ChatBody(_Body):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Any = None

    def dialogue(self) -> list[dict[str, Any]]:
        return [message.for_template(f"messages[{i}]") for i, message in enumerate(self.messages)]

    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the prompt tells of, in the form that templates know; None for none."""
        if self.tool_choice not in (None, "none", "auto"):
            message = f"tool_choice={_shown(self.tool_choice)} is not supported: answers here are text alone."
            raise ApiError(400, message, "tool_choice")
        if self.tools and self.tool_choice != "none":
            message = (
                "tools: this server does not read tool calls out of an answer. Leave tools out, or give "
                'tool_choice="none" to show them to the model and get its text.'
            )
            raise ApiError(400, message, "tools")
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()] or None

    def choices(self) -> list[SamplingParams]:
        limit, newer = self.max_tokens, self.max_completion_tokens
        if limit is not None and newer is not None and limit != newer:
            message = f"max_tokens={limit} and max_completion_tokens={newer} differ; give one of them."
            raise ApiError(400, message, "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", "top_logprobs")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return [self.sampling(i, logprobs, limit if newer is None else newer) for i in range(self.n or 1)]


class CompletionBody(_Body):
    prompt: Any
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    add_special_tokens: bool | None = None  # begin a text with the tokenizer's bos; default true

    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_int(prompt[0])):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise ApiError(400, "prompt must be a string, a list of token ids, or a list of those.", "prompt")
        if len(prompt) * (self.n or 1) > MAX_CHOICES:
            message = (
                f"{len(prompt)} prompts with n={self.n or 1}; one request may ask for {MAX_CHOICES} answers."
            )
            raise ApiError(400, message, "prompt")
        for i, item in enumerate(prompt):
            tokens = isinstance(item, list) and all(_is_int(token) for token in item)
            if not (isinstance(item, str) or tokens):
                raise ApiError(400, f"prompt[{i}] is neither a string nor a list of token ids.", "prompt")
        return prompt

    def choices(self) -> list[SamplingParams]:
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, f"best_of={self.best_of} is not served; leave it out.", "best_of")
        max_tokens = 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default for completions
        return [self.sampling(i, self.logprobs, max_tokens) for i in range(self.n or 1)]


BodyType = TypeVar("BodyType", bound=_Body)


def parse_body(raw: bytes, kind: type[BodyType]) -> BodyType:
    """A checked request body; ApiError with status 400 and the reason for anything else."""
    fields = _json_object(raw)
    for name, neutral in _NEUTRAL.items():
        value = fields.pop(name, None)
        if isinstance(value, bool) and not any(value is n for n in neutral) or value not in neutral:
            raise ApiError(400, f"{name}={_shown(value)} is not supported by this server.", name)
    fields = {name: value for name, value in fields.items() if name not in _IGNORED}
    try:
        body = kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _first_reason(error) from None
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is only allowed with stream=true.", "stream_options")
    return body


def refusal(error: RequestError) -> ApiError:
    """The engine's reason as an answer with status 400.

    On `context_length_exceeded` clients shorten the prompt, so it is for what counts the tokens ("40 tokens") alone:
    not for a max_tokens that is no number of tokens, nor for an empty prompt.
    """
    too_long = error.field in ("prompt", "max_tokens") and re.search(r"\d tokens", str(error))
    code = "context_length_exceeded" if too_long else None
    return ApiError(400, str(error), error.field, code)


def _json_object(raw: bytes) -> dict[str, Any]:
    def no_constant(name: str):
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=no_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # escapes can spell lone surrogates
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply.") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body has a lone surrogate (half of a \\ud83d\\ude42 pair).") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}.") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object; it is {_shown(value)}.")
    _check_nesting(value)
    return value


def _check_nesting(value: Any) -> None:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
        depth += 1
        if depth > MAX_NESTING:
            raise ApiError(400, f"the body is nested too deeply: more than {MAX_NESTING} levels.")


def _first_reason(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {path[:100]}", path[:100])
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: {path}.", path)
    return ApiError(400, f"{path}={_shown(first['input'])}: {first['msg']}.", path)


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(
            400, f"{where} must be a string or a list of text parts; it is {_shown(content)}.", where
        )
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            wanted = '{"type": "text", "text": "..."}'
            raise ApiError(400, f"{where}[{i}] is {_shown(part)}; wanted {wanted}.", f"{where}[{i}]")
    return "".join(part["text"] for part in content)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 100 else text[:97] + "..."

"""What the OpenAI API takes: chat completions and completions as in OpenAI's API reference.

vLLM's extras are taken too: sampling fields that OpenAI lacks, `structured_outputs`, `chat_template_kwargs`,
`continue_final_message` and `stream_options.continuous_usage_stats`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from serve.http.body import Strict, is_int, json_object, shown, validated
from serve.http.errors import ApiError
from serve.http.messages import Message, Tool
from serve.request import MAX_LOGPROBS, Grammar, SamplingParams, Thinking

MAX_CHOICES = 16  # answers of one HTTP request: prompts times n
MAX_MESSAGES = 2048
MAX_TOOLS = 128
_GREEDY = 1e-3  # temperatures below are greedy

# Fields of OpenAI's API that change no answer here, whatever their value: labels, where a copy is kept, and how fast it
# is wanted.
_IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention prediction "
    "request_id priority".split()
)
# Fields that are not served: fine with the value that asks for nothing, refused with any other.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "early_stopping": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "modalities": (None, ["text"]),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "suffix": (None, ""),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; never sent


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: bool | None = None  # a schema always holds


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's: what the whole answer must match."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Body(Strict):
    """What both endpoints take. Ranges of sampling parameters are those of `SamplingParams`."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # -1: all, as vLLM has it
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Any = None
    stop_token_ids: Any = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    def sampling(
        self,
        choice: int,
        logprobs: int | None,
        max_tokens: int | None,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """Parameters of the answer number `choice`; each has a seed of its own when one was given."""
        fields = (
            "top_p",
            "min_p",
            "typical_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        given: dict[str, float] = {
            name: value for name in fields if (value := getattr(self, name)) is not None
        }
        temperature = 1.0 if self.temperature is None else self.temperature
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=0.0 if temperature < _GREEDY else temperature,
            top_k=max(self.top_k or 0, 0),
            logit_bias=tuple(self._biases()),
            seed=None if self.seed is None else (self.seed + choice) % 2**64,
            stop=() if self.stop in (None, "", []) else self.stop,
            stop_token_ids=() if self.stop_token_ids is None else self.stop_token_ids,
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=self.grammar() if grammar is None else grammar,
        )
        return dataclasses.replace(params, **given)

    def grammar(self) -> Grammar | None:
        """What the whole answer must match."""
        found = [*self._of_response_format(), *self._of_structured_outputs()]
        if len(found) > 1:
            message = "response_format and structured_outputs give more than one form; wanted one of them."
            raise ApiError(400, message, "structured_outputs")
        return found[0] if found else None

    def _of_response_format(self) -> list[Grammar]:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return []
        if wanted.type == "json_object":
            return [Grammar("json_schema", '{"type": "object"}')]
        if wanted.json_schema is None:
            raise ApiError(
                400, "response_format of type json_schema needs json_schema.", "response_format.json_schema"
            )
        return [Grammar("json_schema", json.dumps(wanted.json_schema.schema_))]

    def _of_structured_outputs(self) -> list[Grammar]:
        wanted = self.structured_outputs
        if wanted is None:
            return []
        found = []
        if wanted.json_ is not None:
            schema = wanted.json_ if isinstance(wanted.json_, str) else json.dumps(wanted.json_)
            found.append(Grammar("json_schema", schema))
        if wanted.regex is not None:
            found.append(Grammar("regex", wanted.regex))
        if wanted.choice is not None:
            found.append(Grammar("choice", tuple(wanted.choice)))
        if wanted.grammar is not None:
            found.append(Grammar("lark", wanted.grammar))
        return found

    def _biases(self) -> list[tuple[int, float]]:
        pairs = []
        for token, value in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise ApiError(400, f"logit_bias names {token[:100]!r}; wanted token ids.", "logit_bias")
            pairs.append((int(token), value))
        return pairs


class ChatBody(Body):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = None  # as vLLM calls it
    thinking_budget: Annotated[int, Field(ge=0)] | None = None  # the same, as Qwen's API calls it
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    def dialogue(self) -> list[dict[str, Any]]:
        return [message.for_template(f"messages[{i}]") for i, message in enumerate(self.messages)]

    def check_continuation(self) -> None:
        """Raises ApiError where the last message can't be gone on with as asked."""
        if not self.continue_final_message:
            if self.add_generation_prompt is False:
                message = "add_generation_prompt=false is only served with continue_final_message=true."
                raise ApiError(400, message, "add_generation_prompt")
            return
        if self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt can't both be true."
            raise ApiError(400, message, "continue_final_message")
        last = self.messages[-1]
        if last.role != "assistant" or last.tool_calls or last.content is None:
            message = "continue_final_message needs a last message of role assistant that is text alone."
            raise ApiError(400, message, "continue_final_message")

    @property
    def must_call(self) -> Literal["required", "one"] | None:
        """Whether the answer must be calls, or one call of the function that is named."""
        if self.tool_choice == "required":
            return "required"
        return "one" if isinstance(self.tool_choice, dict) else None

    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call. Raises ApiError for a choice that can't be."""
        tools, choice = self.tools or [], self.tool_choice
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise ApiError(400, "two tools have the same name.", "tools")
        if choice in (None, "auto", "none"):
            return [] if choice == "none" else tools
        named = (
            choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        )
        name = named.get("name") if isinstance(named, dict) else None
        if choice != "required" and name not in names:
            message = (
                f"tool_choice={shown(choice)}; wanted none, auto, required, or one of the tools by name."
            )
            raise ApiError(400, message, "tool_choice")
        if not tools:
            raise ApiError(400, f"tool_choice={shown(choice)} needs tools.", "tool_choice")
        if self.grammar() is not None:
            message = f"tool_choice={shown(choice)} can't be met together with a form of the whole answer."
            raise ApiError(400, message, "tool_choice")
        return [tool for tool in tools if name in (None, tool.function.name)]

    def thought_budget(self) -> int | None:
        """Most tokens of a thought. Raises ApiError for two that differ."""
        first, second = self.thinking_token_budget, self.thinking_budget
        if first is not None and second is not None and first != second:
            message = f"thinking_token_budget={first} and thinking_budget={second} differ; give one of them."
            raise ApiError(400, message, "thinking_budget")
        return second if first is None else first

    def choices(
        self, grammar: Grammar | None = None, thinking: Thinking | None = None
    ) -> list[SamplingParams]:
        limit, newer = self.max_tokens, self.max_completion_tokens
        if limit is not None and newer is not None and limit != newer:
            message = f"max_tokens={limit} and max_completion_tokens={newer} differ; give one of them."
            raise ApiError(400, message, "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", "top_logprobs")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        limit = limit if newer is None else newer
        every = [self.sampling(i, logprobs, limit, grammar) for i in range(self.n or 1)]
        return [dataclasses.replace(each, thinking=thinking) for each in every]


class CompletionBody(Body):
    prompt: Any
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    add_special_tokens: bool | None = None  # begin a text as the tokenizer's files have it; default true

    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and is_int(prompt[0])):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise ApiError(400, "prompt must be a string, a list of token ids, or a list of those.", "prompt")
        if len(prompt) * (self.n or 1) > MAX_CHOICES:
            message = (
                f"{len(prompt)} prompts with n={self.n or 1}; one request may ask for {MAX_CHOICES} answers."
            )
            raise ApiError(400, message, "prompt")
        for i, item in enumerate(prompt):
            tokens = isinstance(item, list) and all(is_int(token) for token in item)
            if not (isinstance(item, str) or tokens):
                raise ApiError(400, f"prompt[{i}] is neither a string nor a list of token ids.", "prompt")
        return prompt

    def choices(self) -> list[SamplingParams]:
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, f"best_of={self.best_of} is not served; leave it out.", "best_of")
        if self.echo and self.stream:
            raise ApiError(400, "echo is only served with stream=false.", "echo")
        max_tokens = 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default for completions
        scores = self.echo and (self.logprobs is not None or max_tokens == 0)
        prompt = (self.logprobs or 0) if scores else None
        return [
            self.sampling(i, self.logprobs, max_tokens, prompt_logprobs=prompt) for i in range(self.n or 1)
        ]


def _named_function(choice: Any) -> str | None:
    """Of a tool_choice as {"type": "function", "function": {"name": ...}}."""
    function = (
        choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    )
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


Kind = TypeVar("Kind", bound=Body)


def parse_body(raw: bytes, kind: type[Kind]) -> Kind:
    """A checked request body; ApiError with status 400 and the reason for anything else."""
    fields = json_object(raw)
    for name, neutral in _NEUTRAL.items():
        value = fields.pop(name, None)
        if isinstance(value, bool) and not any(value is n for n in neutral) or value not in neutral:
            raise ApiError(400, f"{name}={shown(value)} is not supported by this server.", name)
    for name in ("echo", "best_of"):  # of completions alone; false and 1 ask for nothing
        if name not in kind.model_fields and fields.get(name) in (False, 1):
            del fields[name]
    body = validated(kind, {name: value for name, value in fields.items() if name not in _IGNORED})
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is only allowed with stream=true.", "stream_options")
    return body

"""What a chat request asks of the model's chat template: messages, tools, its variables and how much to reason.

A setting that the template does not read would change nothing, so it is refused by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from data import Tokenizer
from data.templates import variables_of
from serve.http.api import ChatBody
from serve.http.body import shown
from serve.http.errors import ApiError
from serve.parsers import AnswerForm
from serve.parsers.grammar import call_grammar
from serve.parsers.harmony import CHANNEL, MESSAGE
from serve.request import Grammar, Thinking

_SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch that turns reasoning on and off
# Variables that requests don't set: they are the server's, or lead to other parts of the prompt.
_OWN = frozenset(
    "messages tools documents add_generation_prompt continue_final_message bos_token eos_token".split()
)
# Token budget of a thought by effort, where the chat template has no effort setting; higher efforts have no budget.
BUDGETS = {"minimal": 256, "low": 1024, "medium": 4096}
_LONGEST_VALUE = 4096  # characters of a variable
_END = 64  # tokens of a prompt that say how the answer begins


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """A prompt and what its answer may be.

    Attributes:
      end: the last text, with special tokens.
      tools: names of the functions that the answer may call.
      grammar: what the answer must match so that it calls one.
      continued: the answer goes on from the last message.
      thinking: the thought that the answer may begin with, where it has a budget or comes before a grammar.
    """

    tokens: list[int]
    end: str
    tools: tuple[str, ...] = ()
    grammar: Grammar | None = None
    continued: bool = False
    thinking: Thinking | None = None


def chat_prompt(
    body: ChatBody, arguments: dict[str, Any], tokenizer: Tokenizer, form: AnswerForm
) -> ChatPrompt:
    """The prompt of a request; `arguments` as `template_arguments` gives them. Raises ApiError, ChatTemplateError."""
    messages = arguments["messages"]
    if body.continue_final_message:
        tokens, _ = tokenizer.apply_chat_template(**arguments | {"messages": messages[:-1]})
        tokens += _continuation(
            messages[-1], tokenizer.decode(tokens[-_END:], keep_special=True), tokenizer, form
        )
    else:
        tokens, _ = tokenizer.apply_chat_template(**arguments)
    end = tokenizer.decode(tokens[-_END:], keep_special=True)
    tools = body.callable_tools()
    thinking = _thinking(body, arguments, end, tokenizer, form)
    grammar = None
    if tools and body.must_call:
        functions = [tool.function.model_dump(exclude_none=True) for tool in tools]
        several = body.must_call == "required" and body.parallel_tool_calls is not False
        tags = None if thinking else form.tags
        started = tags is not None and _within(end, tags)
        lark = call_grammar(form.calls, functions, tokenizer.special_tokens, tags, started, several)
        if lark is None:
            message = (
                'calls can\'t be required of this model, whose form of calls has no grammar here; use "auto".'
            )
            raise ApiError(400, f"tool_choice={shown(body.tool_choice)}: {message}", "tool_choice")
        grammar = Grammar("lark", lark)
    names = tuple(tool.function.name for tool in tools)
    return ChatPrompt(tokens, end, names, grammar, bool(body.continue_final_message), thinking)


def _thinking(
    body: ChatBody, arguments: dict[str, Any], end: str, tokenizer: Tokenizer, form: AnswerForm
) -> Thinking | None:
    """What the engine must know of a thought: its budget, and that a grammar begins after it."""
    budget = body.thought_budget()
    if form.tags is None:
        if budget is not None:
            message = "thinking_budget: this model's answers have no thought between tags; leave it out."
            raise ApiError(400, message, "thinking_budget")
        return None
    if budget is None and "reasoning_effort" not in arguments:
        budget = BUDGETS.get(body.reasoning_effort or "")
    started = _within(end, form.tags)
    off = any(arguments.get(name) is False for name in _SWITCHES)
    if not started and (off or body.continue_final_message):
        return None
    if budget is None and body.grammar() is None:
        return None
    opening, closing = (_tokens_of(tag, tokenizer) for tag in form.tags)
    return Thinking(closing, () if started else opening, budget)


def _tokens_of(tag: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    special = tokenizer.special_tokens.get(tag)
    return tuple(tokenizer.encode(tag)) if special is None else (special,)


def template_arguments(body: ChatBody, tokenizer: Tokenizer, form: AnswerForm) -> dict[str, Any]:
    """Arguments of `Tokenizer.apply_chat_template`. Raises ApiError with status 400."""
    body.check_continuation()
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] or None
    arguments: dict[str, Any] = {"messages": body.dialogue(), "tools": tools}
    template = _template(tokenizer, bool(tools))
    if template is None:
        return arguments  # which is refused there
    reads = variables_of(template)
    if tools and "tools" not in reads:
        raise ApiError(400, "this model's chat template shows no tools; leave tools out.", "tools")
    if body.callable_tools() and form.calls is None:
        message = (
            "tools: the form in which this model calls tools is not read here. Leave tools out, or give "
            'tool_choice="none" to show them to the model and get its text.'
        )
        raise ApiError(400, message, "tools")
    for i, message in enumerate(arguments["messages"]):
        if "tool_calls" in message and "tool_calls" not in template:
            name = f"messages[{i}].tool_calls"
            raise ApiError(400, "this model's chat template shows no tool calls; leave them out.", name)
    return (
        arguments
        | _reasoning(body.reasoning_effort, reads, form)
        | _variables(body.chat_template_kwargs, reads)
    )


def thinking_switches(tokenizer: Tokenizer, tools: bool) -> list[str]:
    """The variables of the chat template that turn thinking on and off."""
    reads = variables_of(_template(tokenizer, tools) or "")
    return [name for name in _SWITCHES if name in reads]


def _template(tokenizer: Tokenizer, tools: bool) -> str | None:
    return tokenizer.tool_template if tools and tokenizer.tool_template else tokenizer.chat_template


def _reasoning(effort: str | None, reads: frozenset[str], form: AnswerForm) -> dict[str, Any]:
    """The variables for an effort, as vLLM gives them: the effort itself, and a switch that only "none" turns off.

    None are needed where a budget can hold the thought to it.
    """
    if effort is None:
        return {}
    wanted = {"reasoning_effort": effort} | dict.fromkeys(_SWITCHES, effort != "none")
    found = {name: value for name, value in wanted.items() if name in reads}
    if not found and (form.tags is None or effort == "none"):
        message = (
            f"reasoning_effort={effort!r}: this model's chat template has no such setting; leave it out."
        )
        raise ApiError(400, message, "reasoning_effort")
    return found


def _variables(given: dict[str, Any] | None, reads: frozenset[str]) -> dict[str, Any]:
    for name, value in (given or {}).items():
        where = f"chat_template_kwargs.{name[:100]}"
        if name in _OWN or name not in reads:
            raise ApiError(400, f"{where}: this model's chat template has no such setting.", where)
        if isinstance(value, str) and len(value) > _LONGEST_VALUE:
            raise ApiError(400, f"{where} has more than {_LONGEST_VALUE} characters.", where)
    return dict(given or {})


def _continuation(message: dict[str, Any], end: str, tokenizer: Tokenizer, form: AnswerForm) -> list[int]:
    """Tokens of the last message, as the model would have written them after the prompt."""
    content, thought = message["content"], message.get("reasoning_content") or ""
    if form.calls == "harmony":
        parts = [CHANNEL, "final", MESSAGE, content]
    elif form.tags is None:
        parts = [content]
    elif _within(end, form.tags):
        parts = [f"{thought}\n", form.tags[1], f"\n\n{content}"]
    elif thought:
        parts = [form.tags[0], f"\n{thought}\n", form.tags[1], f"\n\n{content}"]
    else:
        parts = [content]
    ids: list[int] = []
    for text in _joined(parts, tokenizer.special_tokens):
        special = tokenizer.special_tokens.get(text)
        ids += tokenizer.encode_batch([text], True)[0] if special is None or text == content else [special]
    return ids


def _joined(parts: list[str], specials: dict[str, int]) -> list[str]:
    """The parts, texts beside one another made one."""
    joined: list[str] = []
    for part in parts:
        if joined and part not in specials and joined[-1] not in specials:
            joined[-1] += part
        else:
            joined.append(part)
    return [part for part in joined if part]


def _within(text: str, tags: tuple[str, str]) -> bool:
    """Whether a thought has begun and not ended."""
    return text.rfind(tags[0]) > text.rfind(tags[1])

"""What a chat request asks of the model's chat template: messages, tools and how much to reason.

A setting that the template does not read would change nothing, so it is refused by name.
"""

from __future__ import annotations

from typing import Any

from data import Tokenizer
from data.templates import variables_of
from serve.http.api import ApiError, ChatBody

_SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch that turns reasoning on and off


def template_arguments(body: ChatBody, tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of `Tokenizer.apply_chat_template`. Raises ApiError with status 400."""
    arguments = {"messages": body.dialogue(), "tools": body.shown_tools()}
    template = tokenizer.chat_template
    if arguments["tools"] and tokenizer.tool_template:
        template = tokenizer.tool_template
    if template is None:
        return arguments  # which is refused there
    reads = variables_of(template)
    if arguments["tools"] and "tools" not in reads:
        raise ApiError(400, "this model's chat template shows no tools; leave tools out.", "tools")
    for i, message in enumerate(arguments["messages"]):
        if "tool_calls" in message and "tool_calls" not in template:
            name = f"messages[{i}].tool_calls"
            raise ApiError(400, "this model's chat template shows no tool calls; leave them out.", name)
    return arguments | _reasoning(body.reasoning_effort, reads)


def _reasoning(effort: str | None, reads: frozenset[str]) -> dict[str, Any]:
    """The variables for an effort, as vLLM gives them: the effort itself, and a switch that only "none" turns off."""
    if effort is None:
        return {}
    wanted = {"reasoning_effort": effort} | dict.fromkeys(_SWITCHES, effort != "none")
    found = {name: value for name, value in wanted.items() if name in reads}
    if not found:
        message = (
            f"reasoning_effort={effort!r}: this model's chat template has no such setting; leave it out."
        )
        raise ApiError(400, message, "reasoning_effort")
    return found

"""Reasoning and tool calls, read out of what a model writes. The chat template says which form its model uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from serve.parsers import deepseek, harmony, hermes, llama, mistral, think
from serve.parsers.pieces import Parser, Piece, PlainParser

__all__ = ["AnswerForm", "Parser", "Piece", "form_of"]

# What a chat template holds whose model calls tools so; the first that fits counts.
_CALLS: dict[str, tuple[str, ...]] = {
    "harmony": (harmony.CHANNEL, harmony.MESSAGE),
    "deepseek": (deepseek.CALL, deepseek.SEPARATOR),
    "mistral": (mistral.MARK,),
    "hermes": (hermes.OPEN, '"arguments"'),
    "llama": ("<|start_header_id|>", '"parameters"'),
}
# Templates with one of these write calls in a form that is not read here.
_OTHER_FORMS = ("<function=", "<arg_key>", "<function_calls>", "<minimax:tool_call>")
_MARKS: dict[str | None, tuple[str, ...]] = {
    "harmony": harmony.MARKS,
    "deepseek": (deepseek.CALLS, deepseek.CALLS_END, deepseek.CALL, deepseek.CALL_END, deepseek.SEPARATOR),
    "mistral": (mistral.MARK, mistral.ARGS, mistral.CALL_ID),
    "hermes": (hermes.OPEN, hermes.CLOSE),
    "llama": (llama.PYTHON_TAG,),
    None: (),
}


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """How a model's answers are written.

    Attributes:
      tags: around a thought; None when there are none.
      calls: the form of tool calls; None when none is known.
    """

    tags: tuple[str, str] | None = None
    calls: str | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that are part of the form; all others are left out of an answer's text."""
        return (*_MARKS[self.calls], *(self.tags or ()))

    @property
    def plain(self) -> bool:
        """Whether an answer without tools is nothing but content."""
        return self.tags is None and self.calls != "harmony"

    def parser(self, prompt: str, tools: Collection[str] = ()) -> Parser:
        """For the answer to a prompt (with its special tokens), which may call these tools."""
        if self.calls == "harmony":
            return harmony.HarmonyParser(
                prompt.rpartition(harmony.START)[2] if harmony.START in prompt else "assistant"
            )
        rest = self._calls(tools) if tools else PlainParser()
        if self.tags is None:
            return rest
        started, ended = (prompt.rfind(tag) for tag in self.tags)
        return think.ThinkParser(
            self.tags, started > ended and not prompt[started + len(self.tags[0]) :].strip(), rest
        )

    def _calls(self, tools: Collection[str]) -> Parser:
        match self.calls:
            case "hermes":
                return hermes.HermesParser()
            case "llama":
                return llama.LlamaParser(tools)
            case "mistral":
                return mistral.MistralParser()
            case "deepseek":
                return deepseek.DeepseekParser()
        return PlainParser()


def form_of(template: str | None, tool_template: str | None = None) -> AnswerForm:
    """What the chat template of a model (and the one that it has for tools) says of its answers."""
    if template is None:
        return AnswerForm()
    shown = tool_template or template
    fitting = (form for form, parts in _CALLS.items() if all(part in shown for part in parts))
    calls = None if any(mark in shown for mark in _OTHER_FORMS) else next(fitting, None)
    tags = None if calls == "harmony" else think.tags_of(template)
    return AnswerForm(tags, calls)

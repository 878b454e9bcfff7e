"""Grammars of answers that must call a tool, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serve.parsers import hermes, llama, mistral

_ANY = {"type": "object"}


def call_grammar(
    calls: str | None,
    tools: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, int],
    tags: tuple[str, str] | None,
    started: bool,
    several: bool,
) -> str | None:
    """Lark for one or several calls of these functions, after a thought where the model has one.

    None where calls of that form can't be asked for.

    Args:
      tools: functions as OpenAI's API has them, with name and parameters.
      started: the prompt ends within a thought.
    """
    parts = _FORMS.get(calls or "")
    if parts is None:
        return None
    before, between, after, arguments = parts

    def literal(text: str) -> str:
        for mark in (hermes.OPEN, hermes.CLOSE, mistral.MARK, llama.PYTHON_TAG, *(tags or ())):
            if mark in special_tokens and mark in text:
                sides = text.split(mark)
                token = f" <[{special_tokens[mark]}]> "
                return token.join(json.dumps(side, ensure_ascii=False) if side else "" for side in sides)
        return json.dumps(text, ensure_ascii=False) if text else ""

    repeated = f"({literal(between)} object)*" if several else ""
    lines = [f"calls: {literal(before)} object {repeated} {literal(after)}"]
    lines.append("object: " + " | ".join(f"object_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        head = json.dumps(json.dumps({"name": tool["name"]})[:-1] + f', "{arguments}": ', ensure_ascii=False)
        lines += [f'object_{i}: {head} arguments_{i} "}}"']
        lines += [f"arguments_{i}: %json {json.dumps(tool.get('parameters') or _ANY)}"]
    return "\n".join(_thought(tags, started, special_tokens, literal) + lines)


# What stands before the first call, between two and after the last, and what the arguments are called.
_FORMS = {
    "hermes": (f"{hermes.OPEN}\n", f"\n{hermes.CLOSE}\n{hermes.OPEN}\n", f"\n{hermes.CLOSE}", "arguments"),
    "llama": ("", "; ", "", "parameters"),
    "mistral": (f"{mistral.MARK}[", ", ", "]", "arguments"),
}


def _thought(tags: Any, started: bool, special_tokens: Mapping[str, int], literal: Any) -> list[str]:
    if tags is None:
        return ["start: calls"]
    opening = "" if started else literal(tags[0])
    lines = [f"start: {'thought calls' if started else 'thought? calls'}"]
    lines += ["GAP: /[ \\n]{0,4}/", f"thought: {opening} inside GAP"]
    if tags[1] in special_tokens:
        return [*lines, f"inside: /(?s:.*)/ {literal(tags[1])}"]
    return [*lines, f"inside[suffix={json.dumps(tags[1])}]: /(?s:.*)/"]

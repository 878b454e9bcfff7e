"""Dialogues to token ids and a loss mask, through a chat template that message contents can't break out of
(data/guard.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data.guard import Guard
from data.template_messages import for_template, reasoning_of
from data.templates import ChatTemplateError, render, uses_generation_tag

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

DEFAULT_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")

# ChatML (openai/openai-python, chatml.md) with tools as Hermes has them
# (NousResearch/Hermes-Function-Calling).
DEFAULT_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'You may call these tools:\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '</tools>\\nTo call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\\n'
    }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {%- if message.reasoning_content %}
                {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
            {%- endif %}
            {{- message.content or '' }}
            {%- for call in message.tool_calls or [] %}
                {%- set call = call.function or call %}
                {{- '\\n<tool_call>' + {'name': call.name, 'arguments': call.arguments} | tojson +
                '</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def apply(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> tuple[list[int], list[int]]:
    """See `Tokenizer.apply_chat_template`."""
    if tokenizer.chat_template is None:
        raise ChatTemplateError(
            "this tokenizer has no chat template; set tokenizer.chat_template or use encode"
        )
    _check(messages)
    template = tokenizer.tool_template if tools and tokenizer.tool_template else tokenizer.chat_template
    others = [template, list(tokenizer.roles.values())]
    guard = Guard(tokenizer.special_tokens, tokenizer._single_words, others, [messages, tools, variables])
    shown_tools = guard.broken(list(tools)) if tools else None
    variables = guard.broken(variables)

    def text_of(count: int, prompt: bool, marks: tuple[str, str] = ("", "")) -> str:
        shown = guard.broken(for_template(messages[:count]))
        context = {**tokenizer.roles, "documents": None, **variables, "messages": shown, "tools": shown_tools}
        return render(template, {**context, "add_generation_prompt": prompt}, marks)

    if add_generation_prompt:
        spans = [(text_of(len(messages), True), 0)]
    elif uses_generation_tag(template):
        spans = list(_marked_spans(text_of(len(messages), False, guard.marks), guard.marks))
    else:
        spans = _prefix_spans(messages, text_of, tokenizer)
    return _encode(tokenizer, spans, guard)


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError("messages must be a list of at least one {'role': ..., 'content': ...}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(
                f"messages[{i}] must be an object with a string 'role', was given {message!r:.200}"
            )
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list, tuple)):
            raise ChatTemplateError(f"messages[{i}].content must be a string, a list of parts or null")
        calls = message.get("tool_calls") or message.get("function_call")
        if content is None and not calls and reasoning_of(message) is None:
            raise ChatTemplateError(f"messages[{i}] has neither content nor tool_calls nor reasoning_content")


def _marked_spans(text: str, marks: tuple[str, str]) -> Iterator[tuple[str, int]]:
    """(text, mask) of a rendering with the assistant's parts between marks."""
    depth = 0
    for part in re.split(f"([{marks[0]}{marks[1]}])", text):
        if part in marks:
            depth += 1 if part == marks[0] else -1
        elif part:
            yield part, int(depth > 0)


def _prefix_spans(
    messages: Sequence[Mapping[str, Any]], text_of: Any, tokenizer: Tokenizer
) -> list[tuple[str, int]]:
    """(text, mask) found by rendering each prefix of the dialogue with and without the assistant's answer."""
    whole = text_of(len(messages), False)
    spans, position = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text_of(i, True) if i else "", text_of(i + 1, False)
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= position):
            raise ChatTemplateError(
                f"the chat template renders messages[{i}] differently when more messages follow (or none), "
                "so what the "
                "assistant wrote can't be found. Mark it with {% generation %}...{% endgeneration %} in the "
                "template."
            )
        stop = _end_of_turn(after, len(before), tokenizer)
        spans += [(whole[position : len(before)], 0), (whole[len(before) : stop], 1)]
        position = stop
    return [span for span in [*spans, (whole[position:], 0)] if span[0]]


def _end_of_turn(text: str, start: int, tokenizer: Tokenizer) -> int:
    """Where the answer that begins at `start` ends: after its last stop token if only white space follows
    that.
    """
    body = text.rstrip()
    ends = any(body.endswith(name) for name, i in tokenizer.special_tokens.items() if i in tokenizer.eos_ids)
    return max(len(body), start) if ends else len(text)


def _encode(
    tokenizer: Tokenizer, spans: Iterable[tuple[str, int]], guard: Guard
) -> tuple[list[int], list[int]]:
    """Ids and mask. Parts are encoded on their own, so an answer's ids are those the model would have
    sampled. A space mark goes before the first part, and after special tokens where the tokenizer has it so.
    """
    parts = [[part, special, mask] for text, mask in spans for part, special in guard.split(text)]
    for i, (name, special, _) in enumerate(parts):
        left, right = tokenizer.strips.get(name, (False, False)) if special else (False, False)
        if left and i and not parts[i - 1][1]:
            parts[i - 1][0] = parts[i - 1][0].rstrip()
        if right and i + 1 < len(parts) and not parts[i + 1][1]:
            parts[i + 1][0] = parts[i + 1][0].lstrip()
    ids: list[int] = []
    mask: list[int] = []
    after_text = False
    for part, special, wrote in parts:
        if not part:
            continue
        goes_on = after_text or (bool(ids) and not tokenizer.prefix_after_special)
        new = [tokenizer.special_tokens[part]] if special else tokenizer.encode_batch([part], goes_on)[0]
        ids += new
        mask += [wrote] * len(new)
        after_text = not special
    return ids, mask

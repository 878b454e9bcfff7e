"""Dialogues to token ids and a loss mask, through a chat template that message contents can't break out of.

Contents are kept apart from structure: before rendering, every special-token string inside the messages is
broken by a character that occurs nowhere else; after rendering, only unbroken ones are special tokens, and
the character goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    guard = _Guard(tokenizer, messages, tools)
    eos = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    roles = {"bos_token": tokenizer.bos_id, "eos_token": eos, "pad_token": tokenizer.pad_id}
    names = {role: tokenizer.special_name(i) or "" for role, i in roles.items()}
    tools = guard.broken(list(tools)) if tools else None

    def text_of(count: int, prompt: bool, marks: tuple[str, str] = ("", "")) -> str:
        shown = guard.broken([dict(message) for message in messages[:count]])
        context = {**names, "documents": None, **variables, "messages": shown, "tools": tools}
        return render(tokenizer.chat_template, {**context, "add_generation_prompt": prompt}, marks)

    if add_generation_prompt:
        spans = [(text_of(len(messages), True), 0)]
    elif uses_generation_tag(tokenizer.chat_template):
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
        if content is None and not message.get("tool_calls"):
            raise ChatTemplateError(f"messages[{i}] has neither content nor tool_calls")


class _Guard:
    """Breaks special-token strings inside messages, and finds the real ones in what was rendered."""

    def __init__(self, tokenizer: Tokenizer, messages: Any, tools: Any):
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._heads = {name[:n] for name in names for n in range(1, len(name))}
        self._tails = {name[n:] for name in names for n in range(1, len(name))}
        self._longest = max(map(len, names), default=0)
        used = {c for text in _strings([messages, tools, tokenizer.chat_template, names]) for c in text}
        # Neither the character nor its JSON escape may occur: a template may print contents as ASCII JSON.
        everything = "".join(_strings([messages, tools]))
        free = (c for c in map(chr, range(0xE000, 0xF8FF)) if c not in used and _escape(c) not in everything)
        try:
            self.sentinel, *marks = next(free), next(free), next(free)
        except StopIteration:
            raise ChatTemplateError("the messages use up all private-use characters of Unicode") from None
        self.marks = (marks[0], marks[1])

    def broken(self, value: Any) -> Any:
        """`value` with every special-token string inside, or begun at an edge of a string, broken by the
        sentinel.
        """
        if isinstance(value, str):
            return self._broken_text(value)
        if isinstance(value, Mapping):
            return {self.broken(key): self.broken(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.broken(item) for item in value]
        return value

    def _broken_text(self, text: str) -> str:
        text = self._specials.sub(lambda match: match[0][:1] + self.sentinel + match[0][1:], text)
        # Two contents side by side could spell a token between them, also once the template has stripped
        # them.
        body = text.rstrip()
        if any(body[-n:] in self._heads for n in range(1, min(self._longest, len(body) + 1))):
            text = body + self.sentinel + text[len(body) :]
        body = text.lstrip()
        if any(body[:n] in self._tails for n in range(1, min(self._longest, len(body) + 1))):
            text = text[: len(text) - len(body)] + self.sentinel + body
        return text

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """(part, whether it is a special token), with sentinels gone from the plain parts."""
        position = 0
        for match in self._specials.finditer(text):
            yield self._clean(text[position : match.start()]), False
            yield match[0], True
            position = match.end()
        yield self._clean(text[position:]), False

    def _clean(self, text: str) -> str:
        return text.replace(self.sentinel, "").replace(_escape(self.sentinel), "")


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


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
    tokenizer: Tokenizer, spans: Iterable[tuple[str, int]], guard: _Guard
) -> tuple[list[int], list[int]]:
    """Ids and mask. Parts are encoded on their own, so an answer's ids are those the model would have
    sampled.
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
        new = [tokenizer.special_tokens[part]] if special else tokenizer.encode_batch([part], after_text)[0]
        ids += new
        mask += [wrote] * len(new)
        after_text = not special
    return ids, mask

"""Contents of messages that can't become structure, whatever they spell and whatever a chat template does with them.

Before rendering, every special-token string inside the messages is broken by a character that occurs nowhere else;
after rendering, only unbroken ones are special tokens, and the character goes. To the template a broken text reads as
if it were whole: it is found, split and stripped by what the message says, and what comes out is broken again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data.template_messages import Arguments
from data.templates import STRING_METHODS, ChatTemplateError, replaced


class Guard:
    """Breaks special-token strings inside messages, and finds the real ones in what was rendered.

    `names`: the special tokens; `alone`: those among them that count only where no word touches them; `others`: all
    text that the breaking character must not occur in.
    """

    def __init__(self, names: Any, alone: frozenset[str], others: Any, messages: Any):
        names = sorted(names, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        patterns = [rf"(?<!\w){re.escape(n)}(?!\w)" if n in alone else re.escape(n) for n in names]
        self._shown = re.compile("|".join(patterns) or r"(?!)")
        self._heads = {name[:n] for name in names for n in range(1, len(name))}
        self._tails = {name[n:] for name in names for n in range(1, len(name))}
        self._longest = max(map(len, names), default=0)
        used = {c for text in _strings([messages, others, names]) for c in text}
        # Neither the character nor its JSON escape may occur: a template may print contents as ASCII JSON.
        everything = "".join(_strings(messages))
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
            return self.broken_text(value)
        if isinstance(value, Mapping):
            items = {self.broken(key): self.broken(item) for key, item in value.items()}
            return Arguments(items) if isinstance(value, Arguments) else items
        if isinstance(value, (list, tuple)):
            return [self.broken(item) for item in value]
        return value

    def broken_text(self, plain: str) -> str:
        text = self._specials.sub(lambda match: match[0][:1] + self.sentinel + match[0][1:], plain)
        # Two contents side by side could spell a token between them, also once the template has stripped
        # them.
        body = text.rstrip()
        if any(body[-n:] in self._heads for n in range(1, min(self._longest, len(body) + 1))):
            text = body + self.sentinel + text[len(body) :]
        body = text.lstrip()
        if any(body[:n] in self._tails for n in range(1, min(self._longest, len(body) + 1))):
            text = text[: len(text) - len(body)] + self.sentinel + body
        return text if text == plain else _Broken(text, self)

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """(part, whether it is a special token), with sentinels gone from the plain parts."""
        position = 0
        for match in self._shown.finditer(text):
            yield self.whole(text[position : match.start()]), False
            yield match[0], True
            position = match.end()
        yield self.whole(text[position:]), False

    def whole(self, text: str) -> str:
        """Text without the breaks."""
        return text.replace(self.sentinel, "").replace(_escape(self.sentinel), "")


class _Broken(str):
    """A broken text that a template reads as the whole one. Only its parts printed, joined or put into JSON are broken:
    that is what the underlying string holds."""

    __slots__ = ("_guard",)
    _guard: Guard

    def __new__(cls, text: str, guard: Guard) -> _Broken:
        made = super().__new__(cls, text)
        made._guard = guard
        return made

    def _plain(self) -> str:
        return self._guard.whole(str.__str__(self))

    def __eq__(self, other: object) -> bool:
        return self._plain() == (other._plain() if isinstance(other, _Broken) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._plain())

    def __contains__(self, part: Any) -> bool:
        return _plain(part) in self._plain()

    def __len__(self) -> int:
        return len(self._plain())

    def __getitem__(self, key: Any) -> str:
        return self._guard.broken_text(self._plain()[key])

    def replace(self, old: str, new: str, count: int = -1) -> str:  # type: ignore[override]
        return self._guard.broken_text(replaced(self._plain(), _plain(old), _plain(new), count))

    def __iter__(self) -> Iterator[str]:
        return (self._guard.broken_text(character) for character in self._plain())


def _plain(value: Any) -> Any:
    if isinstance(value, _Broken):
        return value._plain()
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value


def _method(name: str) -> Callable[..., Any]:
    def method(self: _Broken, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self._plain(), name)(*map(_plain, args), **{k: _plain(v) for k, v in kwargs.items()})
        return self._guard.broken(result) if isinstance(result, (str, list, tuple)) else result

    method.__name__ = name
    return method


# What joins or fills in other text keeps to the underlying string: that text may hold the template's special tokens.
for _name in STRING_METHODS - {"join", "format", "replace"}:
    setattr(_Broken, _name, _method(_name))


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

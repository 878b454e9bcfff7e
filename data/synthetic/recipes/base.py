"""What a recipe is: a frozen dataclass that turns a seed into conversations to complete, and an answer into rows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Seed:
    """What a row is made from: a document, an instruction, or a problem in `data`."""

    id: str
    text: str
    licence: str = "unknown"
    data: Any = None


@dataclasses.dataclass(frozen=True)
class Made:
    """A row: a text to pretrain on, or a dialogue. `instruction` is what diversity is measured by, "" for all of it."""

    text: str = ""
    messages: Messages = dataclasses.field(default_factory=list)
    instruction: str = ""

    def content(self) -> str:
        """All that was written, as one text."""
        return self.text or "\n\n".join(message["content"] for message in self.messages)


class Refused(ValueError):
    """An answer that makes no row, and why."""


class Recipe:
    """What all recipes share."""

    rounds: int = 1  # how often what came out goes in again
    grows: ClassVar[bool] = False  # whether rows become seeds of the next round

    def asks(self, seed: Seed, pool: Sequence[Seed]) -> list[Messages]:
        """The conversations to complete for a seed; `pool` are all seeds of this round."""
        raise NotImplementedError

    def read(self, seed: Seed, number: int, answer: str) -> list[Made]:
        """The rows of the answer to `asks(seed)[number]`. Raises Refused."""
        raise NotImplementedError

    def own_seeds(self, seed: int) -> list[Seed] | None:
        """Seeds that the recipe makes itself; None: documents are given."""
        return None


def user(content: str) -> Messages:
    return [{"role": "user", "content": content}]


def dialogue(instruction: str, response: str) -> Made:
    """A dialogue of one turn. Raises Refused where either is missing."""
    if not instruction.strip() or not response.strip():
        raise Refused("format: a part is empty")
    messages = [
        {"role": "user", "content": instruction.strip()},
        {"role": "assistant", "content": response.strip()},
    ]
    return Made(messages=messages, instruction=instruction.strip())


def parts_of(answer: str, *names: str) -> list[str]:
    """What follows each of "NAME:" at the start of a line, in this order. Raises Refused where one is missing."""
    pattern = "".join(rf"^[#*\s]*{name}[*\s]*:[*]*(?P<{name}>.*?)" for name in names) + r"\Z"
    match = re.search(pattern, answer, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    if match is None:
        raise Refused(f"format: no {' and '.join(names)}")
    return [match[name].strip() for name in names]

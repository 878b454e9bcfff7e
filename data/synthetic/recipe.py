"""What a recipe is: a frozen dataclass that turns a seed into requests, and the answers into a row.

A job is one row in the making. The recipe begins it, is handed each answer, and either asks again, gives the row, or
says why there is none. It keeps no state of its own, so a killed run goes on from the cached answers.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, ClassVar

Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Seed:
    """What a row starts from: a document, an instruction, or a problem with what its verifier needs."""

    id: str
    text: str
    licence: str = "unknown"
    group: str = ""
    facts: Any = None


@dataclasses.dataclass(frozen=True)
class Ask:
    """The next request of a job, and what the recipe wants to remember until it is answered."""

    messages: Messages
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished row: a text to pretrain on, or the messages of a dialogue."""

    text: str = ""
    messages: Messages = dataclasses.field(default_factory=list)

    def whole(self) -> str:
        """What of it the model wrote or could have copied: the text, or what the assistant says."""
        return self.text or "\n\n".join(m["content"] for m in self.messages)


@dataclasses.dataclass(frozen=True)
class Reject:
    """Why a job gives no row: "reason: detail"."""

    reason: str


class Recipe:
    """What all recipes share. `variants` rows are made of each seed."""

    writes: ClassVar[str] = "text"  # or "chat"
    variants: int = 1

    def begin(self, seed: Seed, variant: int, pool: Sequence[Seed]) -> Ask:
        """The first request. `pool`: all seeds, for recipes that show others as examples."""
        raise NotImplementedError

    def answered(self, seed: Seed, ask: Ask, reply: str) -> Ask | Row | Reject:
        """What follows from an answer."""
        raise NotImplementedError


def user(content: str) -> Messages:
    return [{"role": "user", "content": content.strip()}]


def dialogue(question: str, answer: str) -> Row:
    messages = [
        {"role": "user", "content": question.strip()},
        {"role": "assistant", "content": answer.strip()},
    ]
    return Row(messages=messages)


def drawn(seed: Seed, variant: int) -> random.Random:
    """Chance that depends on the seed's id and the variant alone."""
    return random.Random(f"{seed.id}/{variant}")


def clipped(text: str, characters: int) -> str:
    """The text up to the last paragraph, else line, else word that fits."""
    if len(text) <= characters:
        return text
    for end in ("\n\n", "\n", " "):
        cut = text.rfind(end, characters // 2, characters)
        if cut > 0:
            return text[:cut]
    return text[:characters]

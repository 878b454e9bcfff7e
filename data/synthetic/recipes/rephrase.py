"""A document said again in another style: WRAP (Maini et al. 2024, arXiv:2401.16380)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from data.synthetic.recipes.base import Made, Messages, Recipe, Seed, user

STYLES = {
    "easy": "in very short sentences and everyday words, so that a child of eight understands it",
    "medium": "in clear, correct prose of the kind that a good encyclopedia has",
    "hard": "in dense, exact language for readers who know the field, with its technical terms",
    "qa": 'as questions and answers, each on lines of their own that begin with "Question:" and "Answer:"',
}
PROMPT = """\
Write the following text again {style}. Keep every fact, name and number, add nothing that is not there, and give \
only the new text.

{text}"""
Style = Literal["easy", "medium", "hard", "qa"]


@dataclasses.dataclass(frozen=True)
class Rephrase(Recipe):
    """A row for each style."""

    styles: tuple[Style, ...] = ("medium", "qa")

    def asks(self, seed: Seed, pool: Sequence[Seed]) -> list[Messages]:
        return [user(PROMPT.format(style=STYLES[style], text=seed.text)) for style in self.styles]

    def read(self, seed: Seed, number: int, answer: str) -> list[Made]:
        return [Made(text=answer.strip())]

"""Textbook sections that a document is the occasion for: phi-1 (Gunasekar et al. 2023, arXiv:2306.11644)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from data.synthetic.recipes.base import Made, Messages, Recipe, Seed, user

PROMPT = """\
Write a section of a textbook for {audience} on the subject that the extract below is about. Explain each idea before \
it is used, give worked examples, and close with two exercises and their solutions. Write for somebody who has not \
seen the extract, do not mention it, and give only the section.

Extract:
{text}"""


@dataclasses.dataclass(frozen=True)
class Textbook(Recipe):
    """A row for each audience."""

    audiences: tuple[str, ...] = ("pupils of a secondary school", "students in their first year")

    def asks(self, seed: Seed, pool: Sequence[Seed]) -> list[Messages]:
        return [user(PROMPT.format(audience=audience, text=seed.text)) for audience in self.audiences]

    def read(self, seed: Seed, number: int, answer: str) -> list[Made]:
        return [Made(text=answer.strip())]

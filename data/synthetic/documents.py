"""Recipes that make text to pretrain on: rephrasing and sections of textbooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from data.synthetic.recipe import Ask, Recipe, Reject, Row, Seed, clipped, user

_STYLES = {
    "easy": "in short sentences and everyday words that a child of ten understands",
    "medium": "in clear and well-ordered language, as a good encyclopedia has it",
    "hard": "in dense and precise language, as one scholar writes to another",
    "qa": 'as questions and answers, each on a line of its own that begins with "Question:" or "Answer:"',
}


@dataclasses.dataclass(frozen=True)
class Rephrase(Recipe):
    """The same content in other words. WRAP: Maini et al. 2024, arXiv:2401.16380."""

    styles: tuple[Literal["easy", "medium", "hard", "qa"], ...] = (
        "medium",
        "qa",
    )  # a row of each seed in each
    max_seed_characters: int = 3000

    writes: ClassVar[str] = "text"

    @property
    def variants(self) -> int:
        return len(self.styles)

    def begin(self, seed: Seed, variant: int, pool: Sequence[Seed]) -> Ask:
        style = self.styles[variant]
        return Ask(
            user(
                f"Write the text below anew {_STYLES[style]}. Keep every fact, name and number; add nothing that it "
                f"does not say. Answer with the new text alone.\n\n{clipped(seed.text, self.max_seed_characters)}"
            ),
            {"style": style},
        )

    def answered(self, seed: Seed, ask: Ask, reply: str) -> Ask | Row | Reject:
        if ask.memory["style"] == "qa" and not ("Question:" in reply and "Answer:" in reply):
            return Reject("format: no questions and answers")
        return Row(text=reply.strip())


@dataclasses.dataclass(frozen=True)
class Textbook(Recipe):
    """A section of a textbook on what an extract is about. Gunasekar et al. 2023, "Textbooks are all you need",
    arXiv:2306.11644; seeds from the web as in Cosmopedia."""

    audiences: tuple[str, ...] = ("pupils of a high school", "students in their first year", "practitioners")
    variants: int = 1  # audiences are taken in turn, by the seed
    words: int = 600
    max_seed_characters: int = 2000

    writes: ClassVar[str] = "text"

    def begin(self, seed: Seed, variant: int, pool: Sequence[Seed]) -> Ask:
        audience = self.audiences[(sum(seed.id.encode()) + variant) % len(self.audiences)]
        return Ask(
            user(
                f"Here is an extract:\n\n{clipped(seed.text, self.max_seed_characters)}\n\nWrite a section of a "
                f"textbook for {audience}, of about {self.words} words, on the subject of the extract. Begin with what "
                "the reader needs, explain why things are so, work through an example, and end with what to remember. "
                "Do not mention the extract. Answer with the section alone."
            )
        )

    def answered(self, seed: Seed, ask: Ask, reply: str) -> Ask | Row | Reject:
        return Row(text=reply.strip())

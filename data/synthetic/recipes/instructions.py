"""Dialogues of one turn: questions about a document, the instruction that a document answers (Li et al. 2023,
arXiv:2308.06259), new instructions after examples (Self-Instruct, Wang et al. 2022, arXiv:2212.10560), and harder ones
(Evol-Instruct, Xu et al. 2023, arXiv:2304.12244)."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import ClassVar

from data.synthetic.recipes.base import Made, Messages, Recipe, Refused, Seed, dialogue, parts_of, user

QUESTION_ANSWER = """\
Think of {count} questions that a reader could ask and that the text below answers. Each must make sense to somebody \
who does not see the text; each answer must be complete and rest on the text alone. Write every pair as

Question: ...
Answer: ...

Text:
{text}"""

BACKTRANSLATE = """\
The text below was written as the reply to a request. Write the request: what a person would have asked an assistant \
in order to get this reply, with the length, form and details that it needs. Give only the request.

Reply:
{text}"""

SELF_INSTRUCT = """\
Here are requests that people made to an assistant:

{examples}

Write one more request that is unlike all of these in subject and in what is to be done, and then the best reply to \
it. Use exactly this form:

Request: ...
Reply: ..."""

EVOLVE = """\
Rewrite the request below: {how}. It must stay answerable, and must be no longer than twice its length. Then write the \
best reply to the new request. Use exactly this form:

Request: ...
Reply: ...

The request:
{text}"""

WAYS = (
    "add one more condition that the reply has to meet",
    "ask for the same in more depth",
    "put something specific in the place of something general",
    "make it need several steps of thought",
    "make up another request of the same field that is rarer and as hard",
)


@dataclasses.dataclass(frozen=True)
class QuestionAnswer(Recipe):
    """Up to `count` dialogues of a document."""

    count: int = 3

    def asks(self, seed: Seed, pool: Sequence[Seed]) -> list[Messages]:
        return [user(QUESTION_ANSWER.format(count=self.count, text=seed.text))]

    def read(self, seed: Seed, number: int, answer: str) -> list[Made]:
        pairs = re.findall(
            r"^[*\s]*Question:[*]*(.+?)^[*\s]*Answer:[*]*(.+?)(?=^[*\s]*Question:|\Z)",
            answer,
            re.DOTALL | re.MULTILINE,
        )
        if not pairs:
            raise Refused("format: no question and answer")
        return [dialogue(question, reply) for question, reply in pairs[: self.count]]


@dataclasses.dataclass(frozen=True)
class Backtranslate(Recipe):
    """The document is the reply; its request is made."""

    def asks(self, seed: Seed, pool: Sequence[Seed]) -> list[Messages]:
        return [user(BACKTRANSLATE.format(text=seed.text))]

    def read(self, seed: Seed, number: int, answer: str) -> list[Made]:
        return [dialogue(answer, seed.text)]


@dataclasses.dataclass(frozen=True)
class SelfInstruct(Recipe):
    """Each seed (an instruction) leads, with `examples` - 1 others of the pool, to one new dialogue, and these are
    seeds in the next round."""

    examples: int = 6
    rounds: int = 2

    grows: ClassVar[bool] = True

    def asks(self, seed: Seed, pool: Sequence[Seed]) -> list[Messages]:
        others = sorted((s for s in pool if s.id != seed.id), key=lambda s: _hash(seed.id + "\0" + s.id))
        shown = [seed, *others[: self.examples - 1]]
        return [user(SELF_INSTRUCT.format(examples="\n".join(f"- {s.text}" for s in shown)))]

    def read(self, seed: Seed, number: int, answer: str) -> list[Made]:
        return [dialogue(*parts_of(answer, "Request", "Reply"))]


@dataclasses.dataclass(frozen=True)
class EvolInstruct(Recipe):
    """Each seed (an instruction) is made harder in one of the ways, `rounds` times."""

    ways: tuple[str, ...] = WAYS
    rounds: int = 2

    grows: ClassVar[bool] = True

    def asks(self, seed: Seed, pool: Sequence[Seed]) -> list[Messages]:
        how = self.ways[int(_hash(seed.id), 16) % len(self.ways)]
        return [user(EVOLVE.format(how=how, text=seed.text))]

    def read(self, seed: Seed, number: int, answer: str) -> list[Made]:
        return [dialogue(*parts_of(answer, "Request", "Reply"))]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

"""Recipes that make dialogues: from documents, from other instructions, and from harder forms of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from data.synthetic.recipe import Ask, Recipe, Reject, Row, Seed, clipped, dialogue, drawn, user

_PAIR = re.compile(r"Question:\s*(.+?)\s*Answer:\s*(.+)", re.DOTALL)
_NUMBER = re.compile(r"\b([1-5])\b")


@dataclasses.dataclass(frozen=True)
class QuestionAnswer(Recipe):
    """A question that a document answers, and the answer, which stands without the document."""

    variants: int = 1
    max_seed_characters: int = 3000

    writes: ClassVar[str] = "chat"

    def begin(self, seed: Seed, variant: int, pool: Sequence[Seed]) -> Ask:
        kind = ("what or who", "why or how", "to compare or to weigh")[variant % 3]
        return Ask(
            user(
                f"Read this text:\n\n{clipped(seed.text, self.max_seed_characters)}\n\nWrite one question that it "
                f"answers ({kind}), and its full answer. The reader has not seen the text, so neither may refer to it. "
                "Use exactly this form:\nQuestion: ...\nAnswer: ..."
            )
        )

    def answered(self, seed: Seed, ask: Ask, reply: str) -> Ask | Row | Reject:
        match = _PAIR.search(reply)
        if match is None:
            return Reject("format: no question with its answer")
        return dialogue(match[1], match[2])


@dataclasses.dataclass(frozen=True)
class Backtranslate(Recipe):
    """The instruction that a document would be the answer to, kept where the model finds that they fit. Li et al. 2023,
    "Self-alignment with instruction backtranslation", arXiv:2308.06259."""

    min_score: int = 4  # of 5, by the model's own judgement; 0 does not ask
    max_seed_characters: int = 3000

    writes: ClassVar[str] = "chat"

    def begin(self, seed: Seed, variant: int, pool: Sequence[Seed]) -> Ask:
        return Ask(
            user(
                "The text below is a very good answer that an assistant gave. Write the instruction that the user must "
                "have given: specific, complete, and without a word on the answer. Answer with the instruction "
                f"alone.\n\n{clipped(seed.text, self.max_seed_characters)}"
            )
        )

    def answered(self, seed: Seed, ask: Ask, reply: str) -> Ask | Row | Reject:
        answer = clipped(seed.text, self.max_seed_characters)
        if "instruction" in ask.memory:
            found = _NUMBER.findall(reply)
            if not found:
                return Reject("format: no score")
            if int(found[-1]) < self.min_score:
                return Reject(f"judged: a score of {found[-1]}")
            return dialogue(ask.memory["instruction"], answer)
        instruction = reply.strip()
        if not self.min_score:
            return dialogue(instruction, answer)
        return Ask(
            user(
                f"Instruction:\n{instruction}\n\nAnswer:\n{answer}\n\nHow well does the answer do what the instruction "
                "asks, from 1 (not at all) to 5 (as an expert would)? Give your reason in one sentence, then the "
                "number alone on the last line."
            ),
            {"instruction": instruction},
        )


@dataclasses.dataclass(frozen=True)
class SelfInstruct(Recipe):
    """A new instruction after the pattern of some, then its answer. Wang et al. 2022, arXiv:2212.10560. Seeds are
    instructions; the examples are drawn from them by each seed's id, so that jobs do not wait for one another."""

    variants: int = 2
    examples: int = 6

    writes: ClassVar[str] = "chat"

    def begin(self, seed: Seed, variant: int, pool: Sequence[Seed]) -> Ask:
        chance = drawn(seed, variant)
        others = chance.sample(pool, min(self.examples, len(pool)))
        shown = "\n".join(f"- {' '.join(other.text.split())}" for other in others)
        return Ask(
            user(
                f"Here are tasks that people gave an assistant:\n{shown}\n\nWrite one more that differs from all of "
                "them in subject and in kind, and that can be answered in text. Answer with the task alone."
            )
        )

    def answered(self, seed: Seed, ask: Ask, reply: str) -> Ask | Row | Reject:
        if "instruction" in ask.memory:
            return dialogue(ask.memory["instruction"], reply)
        instruction = reply.strip().removeprefix("- ").strip()
        return (
            Ask(user(instruction), {"instruction": instruction}) if instruction else Reject("format: empty")
        )


_DEEPER = (
    "add one more constraint or requirement",
    "replace something general in it by something specific",
    "ask for reasoning in several steps where it takes one",
    "make its input harder, with an example of it",
)
_BROADER = "write a new one of the same field that is rarer, and about as long and as hard"


@dataclasses.dataclass(frozen=True)
class EvolInstruct(Recipe):
    """An instruction made harder or rarer some times, then answered. Xu et al. 2023, WizardLM, arXiv:2304.12244."""

    variants: int = 1
    rounds: int = 2
    broader: float = 0.2  # share of the rounds that look for a rarer one rather than a harder one

    writes: ClassVar[str] = "chat"

    def begin(self, seed: Seed, variant: int, pool: Sequence[Seed]) -> Ask:
        return self._evolve(seed, variant, seed.text, 0)

    def answered(self, seed: Seed, ask: Ask, reply: str) -> Ask | Row | Reject:
        memory = ask.memory
        if memory["round"] == self.rounds:
            return dialogue(memory["instruction"], reply)
        instruction = reply.strip()
        if not instruction or instruction == memory["instruction"].strip():
            return Reject("evolved: nothing new")
        if memory["round"] + 1 == self.rounds:
            return Ask(user(instruction), {**memory, "instruction": instruction, "round": self.rounds})
        return self._evolve(seed, memory["variant"], instruction, memory["round"] + 1)

    def _evolve(self, seed: Seed, variant: int, instruction: str, done: int) -> Ask:
        chance = drawn(seed, variant * 1000 + done)
        how = _BROADER if chance.random() < self.broader else chance.choice(_DEEPER)
        return Ask(
            user(
                f"Here is an instruction for an assistant:\n\n{instruction}\n\nRewrite it: {how}. It must stay "
                "something that can be answered in text. Answer with the new instruction alone."
            ),
            {"instruction": instruction, "round": done, "variant": variant},
        )

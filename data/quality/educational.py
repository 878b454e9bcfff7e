"""How much a text teaches, by a served model that is asked to add up points: the method of FineWeb-Edu (Penedo et al.
2024, arXiv:2406.17557, section 4), with a rubric of our own words."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from configs.typed import ConfigError
from data.documents import Document, DocumentType
from data.endpoint import Cache, Endpoint, Reply, ask_all
from data.stage import Filter, Signals

RUBRIC = """\
Below is an extract from a document. Judge how useful it would be to somebody who teaches or learns, from primary \
school up to the first years of university. Begin with 0 and add one point for each statement that holds:

1. It holds at least some facts or ideas that belong to a subject that is taught, even beside advertising or chatter.
2. It deals with such a subject in the main, though it may be patchy, loosely ordered, or only an overview.
3. It explains: terms are introduced before they are used, and the text could be set as reading in a course.
4. It is built like a lesson, a chapter or a tutorial: clear order, examples or exercises, little that distracts.
5. It teaches very well: sound in its steps, at the right level for learners, and with nothing beside the subject.

Extract:
<<<
{text}
>>>

First give your reasons in at most a hundred words. Then end with one line: "Score: " and the sum, a whole number \
from 0 to 5."""

_INTEGER = re.compile(r"(?<![\d.])\d+(?![\d]|\.\d)")


@dataclasses.dataclass(frozen=True)
class EducationalScore(Filter):
    """Keeps documents whose score, 0 to 5, is at least `min_score` (FineWeb-Edu keeps 3 and more). A text that
    the model can't judge has a score of None with the reason in `failure`, and stays only with `keep_failed`.

    An endpoint that does not answer at all ends the run with an error, and decides nothing about any document.
    """

    endpoint: Endpoint = Endpoint()
    min_score: int = 3
    rubric: str = RUBRIC  # {text} is the document; the answer's last whole number counts
    max_characters: int = 3000  # of a text that are shown
    max_tokens: int = 300  # of an answer
    cache: str = "runs/educational"  # a folder of answers, so that none is paid for twice
    keep_failed: bool = False
    applies_to: DocumentType = "prose"

    measured_by: ClassVar[tuple[str, ...]] = ("endpoint", "rubric", "max_characters", "max_tokens")

    def __post_init__(self):
        if "{text}" not in self.rubric:
            raise ValueError("rubric has no {text}: the document would not be shown")

    def files(self) -> tuple[str, ...]:
        self.endpoint.check()
        return ()

    def signals(self, text: str) -> Signals:
        return self._judge([text])[0]

    def signals_of(self, documents: Sequence[Document]) -> list[Signals]:
        return self._judge([document["text"] for document in documents])

    def reason(self, signals: Signals) -> str | None:
        if signals["score"] is None:
            return None if self.keep_failed else "educational: not judged"
        return "educational: low score" if signals["score"] < self.min_score else None

    def _judge(self, texts: Sequence[str]) -> list[Signals]:
        found: list[Signals] = [{}] * len(texts)
        unavailable: list[str] = []
        for i, reply in ask_all(self.endpoint, [self.request(text) for text in texts], _cache(self.cache)):
            found[i] = _signals(reply)
            unavailable += [reply.error] * reply.unavailable
        if unavailable:  # says nothing of the documents: neither kept nor dropped by it
            raise ConfigError(
                f"the endpoint did not answer {len(unavailable)} of {len(texts)} requests: {unavailable[0][:200]}. "
                "Give the same command again when it answers; answers so far are kept."
            )
        return found

    def request(self, text: str) -> dict[str, Any]:
        """What is asked about a text, with no chance in the answer."""
        prompt = self.rubric.replace("{text}", text[: self.max_characters])
        messages = [{"role": "user", "content": prompt}]
        model = self.endpoint.model
        return {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": self.max_tokens}


def last_score(answer: str) -> int | None:
    """The last whole number of an answer, None unless it is one of 0 to 5. The 5 of "4/5" and of "4 out of 5" is what
    the score is out of, and no score."""
    plain = re.sub(r"(?<=\d)\s*(?:/|out of|of)\s*5\b", "", answer)
    numbers = _INTEGER.findall(plain)
    return int(numbers[-1]) if numbers and 0 <= int(numbers[-1]) <= 5 else None


def _signals(reply: Reply) -> Signals:
    if reply.error:
        return {"score": None, "failure": reply.error[:200]}
    score = last_score(reply.text)
    return {"score": score, "failure": "" if score is not None else "no score in the answer"}


@functools.lru_cache(maxsize=4)
def _cache(folder: str) -> Cache:
    """Read once in a process; other processes append to the same file."""
    return Cache(folder or None)

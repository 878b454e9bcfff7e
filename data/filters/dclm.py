"""What DCLM (Li et al. 2024, arXiv:2406.11794, appendix on heuristic filters) adds to Gopher's rules, after RefinedWeb
(Penedo et al. 2023, arXiv:2306.01116, table 7): lines that are page furniture go, and pages that were mostly that."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import ClassVar

from data.documents import Document, DocumentType
from data.stage import Transform, Verdict
from data.words import words

_COUNTER = re.compile(
    r"^\W*\d(?:,|\.|\d)*\s*[KkMmBb]?\s+"
    r"(?:likes?|shares?|comments?|retweets?|reposts?|quotes?|bookmarks?|upvotes?|downvotes?|downloads?|views?|followers?)"
    r"\W*$"
)
_NEWLINES = re.compile(r"\n{3,}")


@dataclasses.dataclass(frozen=True)
class DclmLines(Transform):
    """Cuts lines that are mostly capitals, only digits, counters ("3 likes"), of one word, and phrases of page
    furniture; more than two newlines in a row become two. A page that lost more than `max_removed_words` of
    its words goes.

    How many lines went, by rule, is in the metadata under "dclm".
    """

    applies_to: DocumentType = "prose"
    max_capitals: float = 0.5  # of a line's characters
    max_digits: float = 0.999999
    min_words: int = 2  # in a line
    phrase_words: int = 10  # phrases are looked for in lines of at most so many words
    anywhere: tuple[str, ...] = ("items in cart",)
    at_end: tuple[str, ...] = ("Read more...",)
    at_start: tuple[str, ...] = ("Sign-in",)
    max_removed_words: float = 0.05

    version: ClassVar[int] = 2

    def apply(self, text: str) -> Verdict:
        kept, reason, _ = self._lines(text)
        return kept, reason

    def edit(self, document: Document) -> tuple[Document, str | None]:
        text, reason, gone = self._lines(document["text"])
        if reason:
            return document, reason
        metadata = document["metadata"] | {"dclm": dict(sorted(gone.items()))}
        return {**document, "text": text, "metadata": metadata}, None

    def _lines(self, text: str) -> tuple[str, str | None, Counter[str]]:
        kept: list[str] = []
        gone: Counter[str] = Counter()
        for line in _NEWLINES.sub("\n\n", text).split("\n"):
            why = self._why(line) if line.strip() else None
            if why:
                gone[why] += 1
                continue
            short = self._without_phrases(line)
            if short != line:
                gone["phrase"] += 1
            if short.strip() or not line.strip():
                kept.append(short)
        changed = _NEWLINES.sub("\n\n", "\n".join(kept))
        before = len(words(text))
        removed = (before - len(words(changed))) / max(before, 1)
        if removed > self.max_removed_words:
            return text, "dclm: too many words removed", gone
        return changed, None if changed.strip() else "dclm: nothing left", gone

    def _why(self, line: str) -> str | None:
        if sum(map(str.isupper, line)) / len(line) > self.max_capitals:
            return "capitals"
        if sum(map(str.isdigit, line)) / len(line) > self.max_digits:
            return "digits"
        if _COUNTER.match(line):
            return "counter"
        return "few words" if len(words(line)) < self.min_words else None

    def _without_phrases(self, line: str) -> str:
        if len(line.split()) > self.phrase_words:
            return line
        for phrase in self.anywhere:
            line = line.replace(phrase, "")
        for phrase in self.at_end:
            line = line.removesuffix(phrase)
        for phrase in self.at_start:
            line = line.removeprefix(phrase)
        return line

"""C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2) as its published code has it
(tensorflow_datasets/text/c4_utils.py): lines are taken out, then pages; and mC4's filter of paragraphs."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import ClassVar

from data.documents import Document, DocumentType
from data.filters.languages import ENGLISH, LanguageRules, check_language, rules_for
from data.filters.words import CLOSING, sentence_terminals
from data.stage import Filter, Signals, Transform, Verdict
from data.words import words as split_words

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f]+[\"'\u201d\u2019)\]]*(?=\s|$)")
_UNSPACED_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f\u17d4\u104b]+")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclasses.dataclass(frozen=True)
class C4Lines(Transform):
    """Keeps lines that end in a mark, with enough words, none of them endless, that say nothing of JavaScript or
    cookies; a page with "lorem ipsum" or "{" on such a line goes, and one with too few sentences left.

    In other languages than English lines may end in any mark that ends a sentence there; where words are written
    without spaces, letters count as in data/filters/languages.py.

    A sentence ends at ., ! or ? before white space (the reference asks NLTK's punkt, which knows abbreviations).
    The number of lines that went, by rule, is in the metadata under "c4".
    """

    version: ClassVar[int] = 3
    applies_to: DocumentType = "prose"
    language: str = "auto"  # of words and marks: "en", ...; auto: the language of the page
    end_marks: tuple[str, ...] = (".", "?", "!", '"')  # datatrove adds "'"; none: lines may end in anything
    min_words: int = 3  # in a line
    count_citations: bool = False  # among its words (datatrove counts before it cuts them out)
    max_word_length: int = 1000
    min_sentences: int = 5
    drop_lorem_ipsum: bool = True
    drop_curly_bracket: bool = True
    cut_javascript: bool = True
    cut_citations: bool = True
    cut_phrases: tuple[str, ...] = _POLICY
    keep_fenced: bool = False  # lines of ``` blocks stay as they are, white space and all

    def __post_init__(self):
        check_language(self.language)

    def apply(self, text: str) -> Verdict:
        kept, reason, _ = self._lines(text)
        return (text, reason) if reason else ("\n".join(kept).strip(), None)

    def edit(self, document: Document) -> tuple[Document, str | None]:
        kept, reason, gone = self._lines(document["text"])
        if reason:
            return document, reason
        metadata = document["metadata"] | {"c4": dict(sorted(gone.items()))}
        return {**document, "text": "\n".join(kept).strip(), "metadata": metadata}, None

    def _lines(self, text: str) -> tuple[list[str], str | None, Counter[str]]:
        kept: list[str] = []
        gone: Counter[str] = Counter()
        sentences = 0
        fenced, rules = False, rules_for(text, self.language)
        for line in text.splitlines():
            fence = self.keep_fenced and line.startswith("```")
            if fence or fenced:
                fenced ^= fence
                kept.append(line)
                continue
            line, why = self._line(line.strip(), rules)
            if why and why.startswith("c4: "):
                return kept, why, gone
            if why:
                gone[why] += 1
                continue
            ends = _UNSPACED_END if rules.letters else _SENTENCE_END
            sentences += max(len(ends.findall(line)), 1)
            kept.append(line)
        return kept, "c4: too few sentences" if sentences < self.min_sentences else None, gone

    def _line(self, line: str, rules: LanguageRules) -> tuple[str, str | None]:
        """The line, and why it goes, or why ("c4: ...") the page goes."""
        words = split_words(line) if rules.letters else line.split()
        if len(line) > self.max_word_length and max(map(len, words)) > self.max_word_length:
            return line, "endless word"
        if self.cut_citations and "[" in line:
            line = _CITATION.sub("", line)
            words = words if self.count_citations else line.split()
        if self.end_marks and rules.ends_sentences:
            marks = self.end_marks if rules is ENGLISH else (*self.end_marks, *sentence_terminals(), *CLOSING)
            if not line.endswith(marks) or line.endswith("..."):
                return line, "no end mark"
        if rules.count(len(words)) < self.min_words:
            return line, "few words"
        small = line.lower()
        if self.drop_lorem_ipsum and "lorem ipsum" in small:
            return line, "c4: lorem ipsum"
        if self.cut_javascript and "javascript" in small:
            return line, "javascript"
        if self.drop_curly_bracket and "{" in line:
            return line, "c4: curly bracket"
        return line, "policy" if any(phrase in small for phrase in self.cut_phrases) else None


@dataclasses.dataclass(frozen=True)
class C4Paragraphs(Filter):
    """mC4 (Xue et al. 2021, arXiv:2010.11934): so many lines of so many characters."""

    applies_to: DocumentType = "prose"
    min_paragraphs: int = 3
    min_characters: int = 200

    measured_by: ClassVar[tuple[str, ...]] = ("min_characters",)

    def signals(self, text: str) -> Signals:
        return {"long_lines": sum(len(line) >= self.min_characters for line in text.split("\n"))}

    def reason(self, signals: Signals) -> str | None:
        return "c4: few long paragraphs" if signals["long_lines"] < self.min_paragraphs else None

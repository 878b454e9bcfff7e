"""Penedo et al. 2024, "The FineWeb Datasets", arXiv:2406.17557, section 3.6: three filters of lines, found by comparing
good and bad crawls; and the fourth of their code, lines a word."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from data.documents import DocumentType
from data.filters.languages import check_language, rules_for
from data.filters.ngrams import repeated_parts
from data.filters.words import CLOSING, WORDS, WordKind, sentence_terminals
from data.stage import Filter, Signals
from data.words import words as split_words


@dataclasses.dataclass(frozen=True)
class FineWebQuality(Filter):
    """Lines are those with something on them, as they stand."""

    applies_to: DocumentType = "prose"
    language: str = "auto"  # of the words: "en", ...; auto: the language of the text
    words: WordKind = "tokens"  # what its authors set the threshold with
    end_marks: tuple[str, ...] = ()  # empty: Unicode's sentence terminals, 160 of all scripts (no quotes)
    short_line: int = 30  # characters
    min_lines_with_end_mark: float = 0.12
    max_short_lines: float = 0.67
    max_duplicate_line_characters: float = 0.01
    max_newlines_per_word: float = 0.3

    measured_by: ClassVar[tuple[str, ...]] = ("language", "words", "end_marks", "short_line")
    version: ClassVar[int] = 2

    def __post_init__(self):
        check_language(self.language)

    def signals(self, text: str) -> Signals:
        rules = rules_for(text, self.language)
        words = split_words(text) if rules.letters else WORDS[self.words](text)
        # A line of 30 letters is six words of English.
        short = self.short_line * rules.letters / 5 if rules.letters else self.short_line
        lines = [line for line in text.split("\n") if line.strip()]
        rows = max(len(lines), 1)
        newlines, marks = text.count("\n"), self.end_marks or sentence_terminals()
        marks += CLOSING if rules.letters and not self.end_marks else ()  # a sentence ends inside of them
        return {
            "lines": len(lines),
            "lines_with_end_mark": (
                sum(line.endswith(marks) for line in lines) / rows if rules.ends_sentences else None
            ),
            "short_lines": sum(len(line) <= short for line in lines) / rows,
            "duplicate_line_characters": repeated_parts(lines)[1] / max(len(text) - newlines, 1),
            "newlines_per_word": newlines / max(rules.count(len(words)), 1),
        }

    def reason(self, signals: Signals) -> str | None:
        if signals["lines"] == 0:
            return "fineweb: empty"
        ended = signals["lines_with_end_mark"]
        if ended is not None and ended < self.min_lines_with_end_mark:
            return "fineweb: lines without an end mark"
        if signals["short_lines"] > self.max_short_lines:
            return "fineweb: short lines"
        if signals["duplicate_line_characters"] > self.max_duplicate_line_characters:
            return "fineweb: duplicate lines"
        if signals["newlines_per_word"] > self.max_newlines_per_word:
            return "fineweb: newlines per word"
        return None

"""Rae et al. 2021, "Scaling Language Models" (Gopher), arXiv:2112.11446, table A1: quality and repetition."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import numpy as np

from data.documents import DocumentType
from data.filters.languages import check_language, rules_for
from data.filters.ngrams import (
    covered_characters,
    duplicate_fractions,
    ends_of,
    repeated_ngrams,
    repeated_parts,
    skipped_characters,
    top_characters,
)
from data.filters.words import WORDS, WordKind, datatrove_punctuation, has_letter
from data.stage import Filter, Signals
from data.words import words as split_words

_PARAGRAPH = re.compile(r"\n{2,}")
_LINE = re.compile(r"\n+")


@dataclasses.dataclass(frozen=True)
class GopherQuality(Filter):
    """Words, symbols and lines. The mean word length is a mean, as in the paper (Dolma takes the median).

    `definition`:
        paper      marks alone are no word, an empty line is no line, and stop words count in any letter case
        datatrove  a mark that its list of punctuation lacks (a bullet) is a word, an empty line is a line, and "The" is
                   no stop word
    """

    applies_to: DocumentType = "prose"
    definition: Literal["paper", "datatrove"] = "paper"
    language: str = "auto"  # of words and stop words: "en", ...; auto: the language of the text
    words: WordKind = "white_space"
    stop_words: tuple[str, ...] = ()  # none: the language's (data/filters/languages.py)
    bullets: tuple[str, ...] = ("\u2022", "-", "*")
    min_words: int = 50  # with a letter, a digit or anything but punctuation in them
    max_words: int = 100_000
    min_mean_word_length: float = 3.0
    max_mean_word_length: float = 10.0
    max_symbols_per_word: float = 0.1  # of "#" and of ellipses, each
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8  # words with at least one letter
    min_stop_words: int = 2  # different ones

    measured_by: ClassVar[tuple[str, ...]] = ("definition", "language", "words", "stop_words", "bullets")
    version: ClassVar[int] = 2

    def __post_init__(self):
        check_language(self.language)

    def signals(self, text: str) -> Signals:
        rules = rules_for(text, self.language)
        words = WORDS[self.words](text)
        if rules.letters:  # vowel signs are no letters, and have none
            words = list(filter(str.isalnum, split_words(text)))
        lines = list(map(str.strip, text.splitlines()))
        if self.definition == "datatrove":
            spoken = [word for word in words if not datatrove_punctuation().issuperset(word)]
            found = set(words)
        else:
            spoken = [word for word in words if not _only_marks(word)]
            lines = list(filter(None, lines))
            found = {word.strip(".,;:!?\"'()") for word in set(text.lower().split())}
        count, rows = max(len(words), 1), max(len(lines), 1)
        listed = self.stop_words or rules.stop_words
        if rules.letters:
            found = {word for word in listed if word in text}
        return {
            "words": int(rules.count(len(spoken))),
            # Where a word is so many letters by definition, its length says nothing.
            "mean_word_length": None if rules.letters else sum(map(len, spoken)) / max(len(spoken), 1),
            "hashes": text.count("#") / rules.count(count),
            "ellipses": (text.count("...") + text.count("\u2026")) / rules.count(count),
            "bullet_lines": sum(line.startswith(self.bullets) for line in lines) / rows,
            "ellipsis_lines": sum(line.endswith(("...", "\u2026")) for line in lines) / rows,
            "alphabetic_words": sum(map(has_letter, words)) / count,
            "stop_words": len(found.intersection(listed)),
        }

    def reason(self, signals: Signals) -> str | None:
        if signals["words"] < self.min_words:
            return "gopher: too few words"
        if signals["words"] > self.max_words:
            return "gopher: too many words"
        mean = signals["mean_word_length"]
        if mean is not None and not self.min_mean_word_length <= mean <= self.max_mean_word_length:
            return "gopher: mean word length"
        if signals["hashes"] > self.max_symbols_per_word:
            return "gopher: hashes"
        if signals["ellipses"] > self.max_symbols_per_word:
            return "gopher: ellipses"
        if signals["bullet_lines"] > self.max_bullet_lines:
            return "gopher: bullet lines"
        if signals["ellipsis_lines"] > self.max_ellipsis_lines:
            return "gopher: lines ending in ellipsis"
        if signals["alphabetic_words"] < self.min_alphabetic_words:
            return "gopher: words without a letter"
        return "gopher: stop words" if signals["stop_words"] < self.min_stop_words else None


@dataclasses.dataclass(frozen=True)
class GopherRepetition(Filter):
    """Lines, paragraphs and n-grams that repeat. A duplicate line is any occurrence after the first.

    The paper leaves open what a share of characters is, and the references differ. `definition`:
        covered    over the characters of the words: of the top n-gram, occurrences times length where it occurs more
                   than once; of duplicate n-grams, the words inside any n-gram that repeats, each word once
        datatrove  over all characters of the text: the top n-gram counts with its spaces, also where it occurs once;
                   of duplicate n-grams, those met again when each such one is skipped whole
    """

    applies_to: DocumentType = "prose"
    definition: Literal["covered", "datatrove"] = "covered"
    language: str = "auto"  # of the words: "en", ...; auto: the language of the text
    words: WordKind = "white_space"
    max_duplicate_lines: float = 0.30
    max_duplicate_line_characters: float = 0.20
    max_duplicate_paragraphs: float = 0.30
    max_duplicate_paragraph_characters: float = 0.20
    max_top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)  # of 2, 3, 4 words
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)  # of 5 to 10 words

    measured_by: ClassVar[tuple[str, ...]] = ("definition", "language", "words")
    version: ClassVar[int] = 2

    def __post_init__(self):
        check_language(self.language)

    def signals(self, text: str) -> Signals:
        letters = rules_for(text, self.language).letters
        words = split_words(text) if letters else WORDS[self.words](text)
        return _REPETITION[self.definition](text, words, max(letters, 1))

    def reason(self, signals: Signals) -> str | None:
        for what in ("paragraph", "line"):
            by_count = getattr(self, f"max_duplicate_{what}s")
            by_characters = getattr(self, f"max_duplicate_{what}_characters")
            count, characters = signals[f"duplicate_{what}s"], signals[f"duplicate_{what}_characters"]
            if count > by_count or characters > by_characters:
                return f"gopher: duplicate {what}s"
        for n, limit in enumerate(self.max_top_ngrams, start=2):
            if signals[f"top_{n}gram"] > limit:
                return f"gopher: top {n}-gram"
        for n, limit in enumerate(self.max_duplicate_ngrams, start=5):
            if signals[f"duplicate_{n}grams"] > limit:
                return f"gopher: duplicate {n}-grams"
        return None


def _covered(text: str, words: list[str], letters: int) -> Signals:
    """`letters`: how many of `words` count as one."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    paragraphs = [part for part in map(str.strip, _PARAGRAPH.split(text)) if part]
    found: dict[str, float] = {}
    found["duplicate_lines"], found["duplicate_line_characters"] = duplicate_fractions(lines)
    found["duplicate_paragraphs"], found["duplicate_paragraph_characters"] = duplicate_fractions(paragraphs)
    ends = ends_of(words)
    total = max(int(ends[-1]), 1)
    for n, starts, which in _repeated_ngrams(words, letters):
        if n <= 4:
            found[f"top_{n}gram"] = top_characters(n * letters, starts, which, ends) / total
        else:
            found[f"duplicate_{n}grams"] = covered_characters(n * letters, starts, which, ends) / total
    return found


def _repeated_ngrams(words: list[str], letters: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for n, starts, which in repeated_ngrams(words, 10 * letters):
        if n % letters == 0 and n > letters:
            yield n // letters, starts, which


def _datatrove(text: str, words: list[str], letters: int) -> Signals:
    size = max(len(text), 1)
    found: dict[str, float] = {}
    for what, parts in (("paragraph", _PARAGRAPH.split(text.strip())), ("line", _LINE.split(text))):
        count, characters = repeated_parts(parts)
        found[f"duplicate_{what}s"] = count / len(parts)
        found[f"duplicate_{what}_characters"] = characters / size
    ends = ends_of(words)
    for n, starts, which in _repeated_ngrams(words, letters):
        if n <= 4:
            found[f"top_{n}gram"] = _first_top(n * letters, starts, which, ends) / size
        else:
            found[f"duplicate_{n}grams"] = skipped_characters(n * letters, starts, which, ends) / size
    return found


def _first_top(n: int, starts, which, ends) -> int:
    """Characters with spaces, times occurrences, of the most frequent n-gram that comes first in the text."""
    if len(ends) <= n:
        return 0
    if not len(starts):
        return int(ends[n]) + n - 1
    counts: dict[int, int] = {}
    begin: dict[int, int] = {}
    for start, number in zip(starts.tolist(), which.tolist()):
        counts[number] = counts.get(number, 0) + 1
        begin.setdefault(number, start)
    top = max(counts, key=lambda number: (counts[number], -begin[number]))
    return counts[top] * (int(ends[begin[top] + n] - ends[begin[top]]) + n - 1)


def _only_marks(word: str) -> bool:
    return not any(map(str.isalnum, word)) and not any(map(str.isalpha, word))


_REPETITION: dict[str, Callable[[str, list[str], int], Signals]] = {
    "covered": _covered,
    "datatrove": _datatrove,
}

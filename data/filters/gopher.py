"""Rae et al. 2021, "Scaling Language Models" (Gopher), arXiv:2112.11446, table A1: quality and repetition."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import numpy as np

from data.documents import DocumentType
from data.stage import Filter, Signals

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))


@dataclasses.dataclass(frozen=True)
class GopherQuality(Filter):
    """Words are what white space separates."""

    applies_to: DocumentType = "prose"
    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3.0
    max_mean_word_length: float = 10.0
    max_symbols_per_word: float = 0.1  # of "#" and of ellipses, each
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8  # words with at least one letter
    min_stop_words: int = 2  # different ones among: the be to of and that have with

    def signals(self, text: str) -> Signals:
        words = text.split()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        count, rows = max(len(words), 1), max(len(lines), 1)
        bullets = ("\u2022", "-", "*")
        return {
            "words": len(words),
            "mean_word_length": sum(map(len, words)) / count,
            "hashes": text.count("#") / count,
            "ellipses": (text.count("...") + text.count("\u2026")) / count,
            "bullet_lines": sum(line.startswith(bullets) for line in lines) / rows,
            "ellipsis_lines": sum(line.endswith(("...", "\u2026")) for line in lines) / rows,
            "alphabetic_words": sum(any(c.isalpha() for c in word) for word in words) / count,
            "stop_words": len(_STOP_WORDS & {word.lower().strip(".,;:!?\"'()") for word in words}),
        }

    def reason(self, signals: Signals) -> str | None:
        if signals["words"] < self.min_words:
            return "gopher: too few words"
        if signals["words"] > self.max_words:
            return "gopher: too many words"
        if not self.min_mean_word_length <= signals["mean_word_length"] <= self.max_mean_word_length:
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
    """Lines, paragraphs and n-grams that repeat.

    A duplicate line is any occurrence after the first. The top n-gram fraction is occurrences times length of
    the most frequent n-gram over all word characters; the duplicate n-gram fraction is the word characters
    inside any n-gram that occurs more than once, each character once.
    """

    applies_to: DocumentType = "prose"
    max_duplicate_lines: float = 0.30
    max_duplicate_line_characters: float = 0.20
    max_duplicate_paragraphs: float = 0.30
    max_duplicate_paragraph_characters: float = 0.20
    max_top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)  # of 2, 3, 4 words
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)  # of 5 to 10 words

    def signals(self, text: str) -> Signals:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        paragraphs = [part.strip() for part in re.split(r"\n{2,}", text) if part.strip()]
        words = text.split()
        found: dict[str, float] = {}
        found["duplicate_lines"], found["duplicate_line_characters"] = duplicate_fractions(lines)
        found["duplicate_paragraphs"], found["duplicate_paragraph_characters"] = duplicate_fractions(
            paragraphs
        )
        for n in range(2, 5):
            found[f"top_{n}gram"] = top_ngram_fraction(words, n)
        for n in range(5, 11):
            found[f"duplicate_{n}grams"] = duplicate_ngram_fraction(words, n)
        return found

    def reason(self, signals: Signals) -> str | None:
        for what in ("line", "paragraph"):
            by_count = getattr(self, f"max_duplicate_{what}s")
            by_characters = getattr(self, f"max_duplicate_{what}_characters")
            if (
                signals[f"duplicate_{what}s"] > by_count
                or signals[f"duplicate_{what}_characters"] > by_characters
            ):
                return f"gopher: duplicate {what}s"
        for n, limit in enumerate(self.max_top_ngrams, start=2):
            if signals[f"top_{n}gram"] > limit:
                return f"gopher: top {n}-gram"
        for n, limit in enumerate(self.max_duplicate_ngrams, start=5):
            if signals[f"duplicate_{n}grams"] > limit:
                return f"gopher: duplicate {n}-grams"
        return None


def duplicate_fractions(parts: list[str]) -> tuple[float, float]:
    """(share of the parts that repeat an earlier one, their share of the characters)."""
    if not parts:
        return 0.0, 0.0
    counts = Counter(parts)
    extra = sum(count - 1 for count in counts.values())
    characters = sum((count - 1) * len(part) for part, count in counts.items())
    return extra / len(parts), characters / sum(map(len, parts))


def top_ngram_fraction(words: list[str], n: int) -> float:
    """Occurrences times length of the most frequent n-gram that repeats, over all word characters."""
    lengths, keys = _ngrams(words, n)
    if not len(keys):
        return 0.0
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    if counts.max() < 2:
        return 0.0
    size = np.convolve(lengths, np.ones(n, np.int64), "valid")[first]
    return float((counts * size)[counts == counts.max()].max() / lengths.sum())


def duplicate_ngram_fraction(words: list[str], n: int) -> float:
    """Share of the word characters that lie inside an n-gram which occurs more than once."""
    lengths, keys = _ngrams(words, n)
    if not len(keys):
        return 0.0
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    starts = np.flatnonzero(counts[inverse] > 1)
    edges = np.zeros(len(words) + 1, np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + n, -1)
    return float(lengths[np.cumsum(edges[:-1]) > 0].sum() / lengths.sum())


def _ngrams(words: list[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(characters of each word, a 64-bit key of each n-gram)."""
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    if len(words) < n:
        return lengths, np.zeros(0, np.uint64)
    numbers: dict[str, int] = {}
    ids = np.fromiter((numbers.setdefault(word, len(numbers) + 1) for word in words), np.uint64, len(words))
    keys = np.zeros(len(words) - n + 1, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(n):
            keys = (keys ^ ids[i : i + len(keys)]) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
    return lengths, keys

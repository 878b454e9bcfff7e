"""Normalisation and heuristic quality filters. A stage is a small frozen dataclass: `apply(text)` gives
(text, None) for what stays and (text, reason) for what goes. `applies_to` is the type of document it looks
at."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from typing import Literal

import numpy as np

DocumentType = Literal["any", "prose", "code"]
Verdict = tuple[str, str | None]
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))


@dataclasses.dataclass(frozen=True)
class Normalise:
    """NFC, newlines as \\n, no NUL and no byte-order mark; text without a visible character goes."""

    applies_to: DocumentType = "any"
    nfc: bool = True

    def apply(self, text: str) -> Verdict:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return text.encode("utf-8", "replace").decode(), "normalise: lone surrogates"
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").removeprefix("\ufeff")
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return text, None if text.strip() else "normalise: empty"


@dataclasses.dataclass(frozen=True)
class GopherQuality:
    """Rae et al. 2021, arXiv:2112.11446, table A1. Words are what white space separates."""

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

    def apply(self, text: str) -> Verdict:
        return text, self._reason(text)

    def _reason(self, text: str) -> str | None:
        words = text.split()
        if len(words) < self.min_words:
            return "gopher: too few words"
        if len(words) > self.max_words:
            return "gopher: too many words"
        mean = sum(map(len, words)) / len(words)
        if not self.min_mean_word_length <= mean <= self.max_mean_word_length:
            return "gopher: mean word length"
        if text.count("#") / len(words) > self.max_symbols_per_word:
            return "gopher: hashes"
        if (text.count("...") + text.count("\u2026")) / len(words) > self.max_symbols_per_word:
            return "gopher: ellipses"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if sum(line.startswith(("\u2022", "-", "*")) for line in lines) / len(lines) > self.max_bullet_lines:
            return "gopher: bullet lines"
        if sum(line.endswith(("...", "\u2026")) for line in lines) / len(lines) > self.max_ellipsis_lines:
            return "gopher: lines ending in ellipsis"
        if sum(any(c.isalpha() for c in word) for word in words) / len(words) < self.min_alphabetic_words:
            return "gopher: words without a letter"
        if len(_STOP_WORDS & {word.lower().strip(".,;:!?\"'()") for word in words}) < self.min_stop_words:
            return "gopher: stop words"
        return None


@dataclasses.dataclass(frozen=True)
class GopherRepetition:
    """Rae et al. 2021, arXiv:2112.11446, table A1: lines, paragraphs and n-grams that repeat.

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

    def apply(self, text: str) -> Verdict:
        return text, self._reason(text)

    def _reason(self, text: str) -> str | None:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        paragraphs = [part.strip() for part in re.split(r"\n{2,}", text) if part.strip()]
        limits = (
            ("lines", lines, self.max_duplicate_lines, self.max_duplicate_line_characters),
            (
                "paragraphs",
                paragraphs,
                self.max_duplicate_paragraphs,
                self.max_duplicate_paragraph_characters,
            ),
        )
        for what, parts, by_count, by_characters in limits:
            count, characters = duplicate_fractions(parts)
            if count > by_count or characters > by_characters:
                return f"gopher: duplicate {what}"
        words = text.split()
        for n, limit in enumerate(self.max_top_ngrams, start=2):
            if top_ngram_fraction(words, n) > limit:
                return f"gopher: top {n}-gram"
        for n, limit in enumerate(self.max_duplicate_ngrams, start=5):
            if duplicate_ngram_fraction(words, n) > limit:
                return f"gopher: duplicate {n}-grams"
        return None


@dataclasses.dataclass(frozen=True)
class CodeQuality:
    """Line lengths and characters as for Codex (Chen et al. 2021, arXiv:2107.03374, section 3.1) and
    StarCoder (Li et al. 2023, arXiv:2305.06161, appendix A)."""

    applies_to: DocumentType = "code"
    min_characters: int = 100
    max_characters: int = 1_000_000
    max_line_length: int = 1000
    max_mean_line_length: float = 100.0
    min_alphanumeric: float = 0.25  # of all characters
    generated_markers: tuple[str, ...] = ("auto-generated", "autogenerated", "generated by", "do not edit")

    def apply(self, text: str) -> Verdict:
        return text, self._reason(text)

    def _reason(self, text: str) -> str | None:
        if not self.min_characters <= len(text) <= self.max_characters:
            return "code: size"
        lengths = [len(line) for line in text.splitlines()]
        if max(lengths) > self.max_line_length:
            return "code: longest line"
        if sum(lengths) / len(lengths) > self.max_mean_line_length:
            return "code: mean line length"
        if sum(map(str.isalnum, text)) / len(text) < self.min_alphanumeric:
            return "code: few letters and digits"
        head = "\n".join(text.splitlines()[:5]).lower()
        if any(marker in head for marker in self.generated_markers):
            return "code: generated"
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

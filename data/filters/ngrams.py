"""Repetition within one text, exact: which parts and which runs of words occur more than once.

Only a run whose two shorter runs repeat can repeat, so after the pairs there is little left to sort.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def duplicate_fractions(parts: list[str]) -> tuple[float, float]:
    """(share of the parts that repeat an earlier one, their share of the characters)."""
    if not parts:
        return 0.0, 0.0
    extra, characters = repeated_parts(parts)
    return extra / len(parts), characters / max(sum(map(len, parts)), 1)


def repeated_parts(parts: Sequence[str]) -> tuple[int, int]:
    """(how many parts repeat an earlier one, their characters)."""
    if len(set(parts)) == len(parts):
        return 0, 0
    counts = Counter(parts)
    extra = len(parts) - len(counts)
    return extra, sum((count - 1) * len(part) for part, count in counts.items() if count > 1)


def repeated_ngrams(words: Sequence[str], longest: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(n, starts, which) for n = 2 to `longest`: where n-grams begin that occur more than once, ascending, and the
    number of the n-gram there. Both int64 of one length; equal numbers are equal n-grams."""
    numbers: dict[str, int] = {}
    ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64, len(words))
    which = ids  # of the (n-1)-gram at each start
    starts = np.arange(len(words))
    for n in range(2, longest + 1):
        at = np.full(len(words) + 1, -1, np.int64)
        at[starts] = which
        follows = starts + 1 < len(words)
        starts, which = starts[follows], which[follows]
        fits = at[starts + 1] >= 0  # the (n-1)-gram one word on repeats too
        starts, which = starts[fits], which[fits]
        starts, which = _more_than_once(starts, which * len(numbers) + ids[starts + n - 1])
        yield n, starts, which


def top_ngram_fraction(words: list[str], n: int) -> float:
    """Occurrences times length of the most frequent n-gram that repeats, over all word characters."""
    return _fraction(words, n, top_characters)


def duplicate_ngram_fraction(words: list[str], n: int) -> float:
    """Share of the word characters that lie inside an n-gram which occurs more than once."""
    return _fraction(words, n, covered_characters)


def ends_of(words: Sequence[str]) -> np.ndarray:
    """Characters of the first i words, int64 [len(words) + 1]."""
    ends = np.zeros(len(words) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, words), np.int64, len(words)), out=ends[1:])
    return ends


def top_characters(n: int, starts: np.ndarray, which: np.ndarray, ends: np.ndarray) -> int:
    """Characters of the most frequent n-gram times its occurrences; of equally frequent ones the longest."""
    if not len(starts):
        return 0
    _, first, counts = np.unique(which, return_index=True, return_counts=True)
    sizes = ends[starts[first] + n] - ends[starts[first]]
    return int((counts * sizes)[counts == counts.max()].max())


def covered_characters(n: int, starts: np.ndarray, which: np.ndarray, ends: np.ndarray) -> int:
    """Characters of the words inside any of these n-grams, each word once."""
    if not len(starts):
        return 0
    edges = np.zeros(len(ends), np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + n, -1)
    return int(np.diff(ends)[np.cumsum(edges[:-1]) > 0].sum())


def skipped_characters(n: int, starts: np.ndarray, which: np.ndarray, ends: np.ndarray) -> int:
    """Characters of the n-grams that repeat an earlier one when one goes through the text and skips each such
    n-gram whole: datatrove's count."""
    seen: set[int] = set()
    total = free = 0
    for start, number in zip(starts.tolist(), which.tolist()):
        if start < free:
            continue
        if number in seen:
            total += int(ends[start + n] - ends[start])
            free = start + n
        seen.add(number)
    return total


def _fraction(
    words: list[str], n: int, count: Callable[[int, np.ndarray, np.ndarray, np.ndarray], int]
) -> float:
    ends = ends_of(words)
    for m, starts, which in repeated_ngrams(words, n):
        if m == n and ends[-1]:
            return count(n, starts, which, ends) / int(ends[-1])
    return 0.0


def _more_than_once(starts: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those starts whose key occurs again, with small numbers in place of the keys."""
    if not len(keys):
        return starts, keys
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    again = counts[inverse] > 1
    return starts[again], inverse[again]

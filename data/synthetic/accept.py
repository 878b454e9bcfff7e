"""Which rows are taken: rules for one row alone, then for a row beside all that were taken before it.

Rows come in the order of their jobs, so what is taken never depends on which answer came first.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from data.dedup.minhash import MinHashDedup, jaccard
from data.synthetic.recipe import Row, Seed

T = TypeVar("T")
_REFUSALS = (
    "as an ai",
    "as a language model",
    "i cannot help",
    "i can't help",
    "i'm sorry, but",
    "i am sorry, but",
    "i cannot assist",
    "i can't assist",
    "i'm unable to",
)
_HEAD = 200  # characters in which a refusal is looked for


@dataclasses.dataclass(frozen=True)
class Accept:
    """Bounds on a row, and how unlike it must be to its seed and to the others."""

    min_characters: int = 40  # of the text, or of what the assistant says
    max_characters: int = 20_000
    refusals: tuple[str, ...] = _REFUSALS  # small letters, in the first 200 characters of an answer
    max_copied: float = 0.8  # of its runs of five words from the seed; 1 takes copies too
    max_similarity: float = 0.7  # Jaccard of runs of three words to any row taken before; 1 takes all

    def alone(self, row: Row, seed: Seed) -> str | None:
        """Why the row is not taken by itself."""
        said = row.text or next((m["content"] for m in row.messages if m["role"] == "assistant"), "")
        if len(said) < self.min_characters:
            return "length: too short"
        if len(said) > self.max_characters:
            return "length: too long"
        if any(phrase in said[:_HEAD].lower() for phrase in self.refusals):
            return "refusal"
        if row.text and self.max_copied < 1 and copied(row.text, seed.text) > self.max_copied:
            return "copied: mostly the seed"
        return None


def copied(text: str, seed: str) -> float:
    """Share of the text's runs of five words that the seed has."""
    shingles = MinHashDedup().shingles
    ours, theirs = shingles(text), shingles(seed)
    return len(np.intersect1d(ours, theirs, assume_unique=True)) / max(len(ours), 1)


def unlike(items: Iterable[tuple[T, str]], max_similarity: float) -> Iterator[tuple[T, T | None]]:
    """(item, None) of each item whose text is unlike that of all before it, else (item, the one that it is like)."""
    stage = MinHashDedup(shingle_words=3, bands=24, rows=4)
    taken: list[tuple[T, np.ndarray]] = []
    buckets: dict[tuple[int, int], list[int]] = {}
    for item, text in items:
        keys = stage.bands_of([text])[0, :-1].tolist()
        shingles = stage.shingles(text)
        near = sorted({i for band, key in enumerate(keys) for i in buckets.get((band, key), ())})
        like = next((i for i in near if jaccard(shingles, taken[i][1]) > max_similarity), None)
        if like is not None and max_similarity < 1:
            yield item, taken[like][0]
            continue
        for band, key in enumerate(keys):
            buckets.setdefault((band, key), []).append(len(taken))
        taken.append((item, shingles))
        yield item, None


def diversity(texts: Iterable[str]) -> dict[str, float]:
    """distinct_2: different pairs of words over all pairs (Li et al. 2016, arXiv:1510.03055); first_words: different
    first three words over all texts."""
    pairs: Counter[tuple[str, str]] = Counter()
    starts: Counter[str] = Counter()
    for text in texts:
        words = text.lower().split()
        pairs.update(zip(words, words[1:]))
        starts[" ".join(words[:3])] += 1
    return {
        "distinct_2": round(len(pairs) / max(pairs.total(), 1), 4),
        "first_words": round(len(starts) / max(starts.total(), 1), 4),
    }

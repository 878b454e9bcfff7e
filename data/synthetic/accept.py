"""Which rows stay: length, refusals, and how unlike they are to their seed and to what was accepted before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from data.dedup import MinHashDedup, jaccard
from data.synthetic.config import Accept
from data.synthetic.recipes import Made, Seed
from data.words import words_and_marks


class Accepted:
    """What one recipe has given so far. The same rows in the same order get the same verdicts."""

    def __init__(self, rules: Accept):
        self._rules = rules
        self._minhash = MinHashDedup(min_jaccard=rules.max_jaccard)
        self._buckets: dict[tuple[int, int], list[int]] = {}
        self._shingles: list[np.ndarray] = []
        self._instructions: list[list[str]] = []

    def reason(self, made: Made, seed: Seed) -> str | None:
        """Why a row goes; None where it stays, and counts as accepted from now on."""
        rules, content = self._rules, made.content()
        answer = made.messages[-1]["content"] if made.messages else made.text
        words = len(content.split())
        if words < rules.min_words or words > rules.max_words:
            return "length: too short" if words < rules.min_words else "length: too long"
        if any(phrase in answer[:300].lower().replace("\u2019", "'") for phrase in rules.refusals):
            return "refusal"
        shingles = self._minhash.shingles(content)
        if not made.messages and jaccard(shingles, self._minhash.shingles(seed.text)) >= rules.max_copied:
            return "copy: of its seed"
        keys = self._keys(content)
        near = sorted({row for key in keys for row in self._buckets.get(key, ())})
        if any(jaccard(shingles, self._shingles[row]) >= rules.max_jaccard for row in near):
            return "duplicate: of an accepted row"
        instruction = words_and_marks(made.instruction)
        if instruction and rules.max_rouge < 1 and self._is_known(instruction):
            return "diversity: like an accepted instruction"
        for key in keys:
            self._buckets.setdefault(key, []).append(len(self._shingles))
        self._shingles.append(shingles)
        if instruction:
            self._instructions.append(instruction)
        return None

    def _keys(self, text: str) -> list[tuple[int, int]]:
        """The bands of a text."""
        row = self._minhash.bands_of([text])[0]
        return [(band, int(value)) for band, value in enumerate(row[:-1])] if row[-1] else []

    def _is_known(self, instruction: list[str]) -> bool:
        counts = Counter(instruction)
        for other in self._instructions:
            most = 2 * (counts & Counter(other)).total() / (len(instruction) + len(other))
            if most > self._rules.max_rouge and rouge_l(instruction, other) > self._rules.max_rouge:
                return True
        return False


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words (Lin 2004)."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, start=1):
            kept = row[j]
            row[j] = before + 1 if word == other else max(row[j], row[j - 1])
            before = kept
    return 2 * row[-1] / max(len(a) + len(b), 1)

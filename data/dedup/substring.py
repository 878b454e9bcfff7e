"""Passages that stand more than once, wherever they begin: what a suffix array finds (Lee et al. 2022, "Deduplicating
Training Data Makes Language Models Better", arXiv:2107.06499), by the hashes of all windows of `min_tokens` tokens.

A passage of at least that length repeats exactly where its windows do, so both find the same spans; windows can be
sorted in pieces that fit in memory, and shard by shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from data.dedup.lines import hash64
from data.dedup.repeated import later_copies
from data.documents import Document, DocumentType
from data.stage import Corpus, Decision, Global
from data.words import WORD_OR_MARK

_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class SubstringDedup(Global):
    """Cuts every passage of `min_tokens` tokens (words and marks) or more that stood before, in this document or in an
    earlier one. A document that is left with less than `min_left` of its characters goes whole."""

    applies_to: DocumentType = "prose"
    min_tokens: int = 50
    min_left: float = 0.0

    cuts: ClassVar[bool] = True
    version: ClassVar[int] = 2

    def features(self, documents: Sequence[tuple[int, Document]]) -> Any:
        """A row for each token that begins a window: row, start of the token, end of the window's last one, hash."""
        import pyarrow as pa

        columns: list[list[np.ndarray]] = [[] for _ in range(5)]
        for row, document in documents:
            spans = [match.span() for match in WORD_OR_MARK.finditer(document["text"])]
            windows = len(spans) - self.min_tokens + 1
            if windows <= 0:
                continue
            edges = np.array(spans, np.int64)
            tokens = np.fromiter((hash64(document["text"][a:b]) for a, b in spans), np.uint64, len(spans))
            starts, stops = edges[:windows, 0], edges[self.min_tokens - 1 :, 1]
            sizes = np.full(windows, len(document["text"]))
            for column, values in zip(
                columns, (np.full(windows, row), starts, stops, sizes, window_hashes(tokens, self.min_tokens))
            ):
                column.append(values)
        types = (np.int32, np.int64, np.int64, np.int64, np.uint64)
        joined = [np.concatenate([np.zeros(0, t), *c]).astype(t) for c, t in zip(columns, types)]
        return pa.table(dict(zip(("row", "start", "stop", "size", "hash"), joined)))

    def resolve(self, corpus: Corpus) -> Iterator[tuple[str, list[Decision]]]:
        def hashes(shard: str) -> np.ndarray:
            return corpus.features(shard).column("hash").to_numpy()

        for shard, late in later_copies(list(corpus.shards), hashes):
            table = corpus.features(shard).filter(late)
            rows, starts, stops, sizes = (
                table.column(n).to_numpy() for n in ("row", "start", "stop", "size")
            )
            made = []
            for row in np.unique(rows).tolist():
                mine = rows == row
                pieces = _joined(starts[mine], stops[mine])
                left = 1 - sum(stop - start for start, stop in pieces) / int(sizes[mine][0])
                short = left < self.min_left
                made.append(Decision(row, "substring: little left") if short else Decision(row, None, pieces))
            yield shard, made


def window_hashes(tokens: np.ndarray, size: int) -> np.ndarray:
    """uint64 [n - size + 1]: a polynomial in the tokens of each window, modulo 2^64, mixed.

    By doubling: a window of 2k is two of k, so it takes log2(size) passes.
    """
    with np.errstate(over="ignore"):
        result, length, block, width = None, 0, tokens, 1
        power, remaining = _BASE, size
        while remaining:
            if remaining & 1:
                if result is None:
                    result, length = block, width
                else:
                    result = block[: len(block) - length] * _power(_BASE, length) + result[width:]
                    length += width
            remaining >>= 1
            if remaining:
                block = block[:-width] * power + block[width:]
                power, width = power * power, 2 * width
        assert result is not None
        mixed = result ^ (result >> np.uint64(31))
        return mixed * np.uint64(0x94D049BB133111EB)


def _power(base: np.uint64, exponent: int) -> np.uint64:
    return np.uint64(pow(int(base), exponent, 1 << 64))


def _joined(starts: np.ndarray, stops: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Windows in the order of their starts, as the spans that they cover together."""
    pieces: list[list[int]] = []
    for start, stop in zip(starts.tolist(), stops.tolist()):
        if pieces and start <= pieces[-1][1]:
            pieces[-1][1] = max(pieces[-1][1], stop)
        else:
            pieces.append([start, stop])
    return tuple((a, b) for a, b in pieces)

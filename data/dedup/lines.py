"""Lines and paragraphs that stand elsewhere too: exact (CCNet, Wenzek et al. 2020, arXiv:1911.00359), or by the share
of their n-grams seen before, in a Bloom filter (Groeneveld's "big friendly filter"; DCLM, Li et al. 2024,
arXiv:2406.11794, section 4.3).

Documents are gone through in the order of shards, so what comes first stays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from data.dedup.repeated import later_copies
from data.documents import Document, DocumentType
from data.stage import Corpus, Decision, Global
from data.words import words

Unit = Literal["line", "paragraph"]
_UNITS = {"line": re.compile(r"[^\n]+\n?"), "paragraph": re.compile(r"(?:[^\n]+\n?)+\n*")}


@dataclasses.dataclass(frozen=True)
class LineDedup(Global):
    """Keeps the first `max_copies` of lines or paragraphs that are equal but for letter case and white space, and cuts
    those after them. A document goes whole where more than `max_cut` of its characters would be cut."""

    applies_to: DocumentType = "prose"
    unit: Unit = "paragraph"
    min_characters: int = 20  # shorter ones may repeat
    max_copies: int = 1  # that stay
    max_cut: float = 1.0

    cuts: ClassVar[bool] = True

    def features(self, documents: Sequence[tuple[int, Document]]) -> Any:
        found = []
        for row, document in documents:
            for start, stop, text in units(document["text"], self.unit):
                plain = " ".join(text.lower().split())
                if len(plain) >= self.min_characters:
                    found.append((row, start, stop, len(document["text"]), hash64(plain)))
        return _table(found)

    def resolve(self, corpus: Corpus) -> Iterator[tuple[str, list[Decision]]]:
        def hashes(shard: str) -> np.ndarray:
            return corpus.features(shard).column("hash").to_numpy()

        for shard, late in later_copies(list(corpus.shards), hashes, self.max_copies):
            yield shard, _decisions(corpus.features(shard), late, self.max_cut, f"{self.unit}s: repeated")


@dataclasses.dataclass(frozen=True)
class BloomDedup(Global):
    """Cuts lines or paragraphs of which `min_overlap` of the runs of `ngram_words` words stood before, in an earlier
    document or in this one, and drops documents of which as much stood in earlier ones. A unit shorter than a run is
    one run of all its words."""

    applies_to: DocumentType = "prose"
    unit: Unit = "paragraph"
    ngram_words: int = 13
    min_words: int = 5  # shorter units are left alone
    min_overlap: float = 0.8
    false_positives: float = 0.01  # of the filter, when all n-grams are in it
    drop_documents: bool = True

    cuts: ClassVar[bool] = True
    version: ClassVar[int] = 3

    def features(self, documents: Sequence[tuple[int, Document]]) -> Any:
        found, grams = [], [np.zeros(0, np.uint64)]
        for row, document in documents:
            for start, stop, text in units(document["text"], self.unit):
                hashes = self._ngrams(text)
                if len(hashes):
                    found.append((row, start, stop, len(document["text"]), len(hashes)))
                    grams.append(hashes)
        import pyarrow as pa

        ends = np.concatenate([[0], np.cumsum([row[-1] for row in found])]).astype(np.int64)
        lists = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(grams)))
        return _table(found).append_column("ngrams", lists)

    def resolve(self, corpus: Corpus) -> Iterator[tuple[str, list[Decision]]]:
        total = 0
        for shard in corpus.shards:
            total += int(corpus.features(shard).column("hash").to_numpy().sum())
        seen = Bloom(total, self.false_positives)
        for shard in corpus.shards:
            yield shard, self._shard(seen, corpus.features(shard))

    def _shard(self, seen: Bloom, table: Any) -> list[Decision]:
        made = []
        ngrams = table.column("ngrams").combine_chunks()
        values, ends = (
            ngrams.flatten().to_numpy(),
            np.cumsum(table.column("hash").to_numpy()).astype(np.int64),
        )
        starts = np.concatenate([[0], ends[:-1]])
        units_of = np.split(
            np.arange(len(table)), np.flatnonzero(np.diff(table.column("row").to_numpy())) + 1
        )
        for members in units_of if len(table) else []:
            first, last = starts[members[0]], ends[members[-1]]
            grams, sizes = values[first:last], (ends - starts)[members]
            known = seen.has(grams)
            if self.drop_documents and known.mean() >= self.min_overlap:
                row = table.column("row")[int(members[0])].as_py()
                made.append(Decision(row, "bloom: document repeated"))
                continue
            late = late_units(grams, known, sizes, self.min_overlap)
            seen.add(grams[~np.repeat(late, sizes)])
            if late.any():
                made += _decisions(table.take(members[late]), np.ones(int(late.sum()), bool), 1.0, "")
        return made

    def _ngrams(self, text: str) -> np.ndarray:
        found = words(text.lower())
        if len(found) < self.min_words:
            return np.zeros(0, np.uint64)
        n = min(self.ngram_words, len(found))
        return np.array([hash64(" ".join(found[i : i + n])) for i in range(len(found) - n + 1)], np.uint64)


def late_units(grams: np.ndarray, known: np.ndarray, sizes: np.ndarray, min_overlap: float) -> np.ndarray:
    """Which units of a document repeat, bool [units]: `min_overlap` of their n-grams are `known`, or stand in a unit
    before that stays. `sizes`: n-grams of each unit, one after the other."""
    firsts = np.cumsum(sizes) - sizes
    late = np.add.reduceat(known, firsts, dtype=np.int64) / sizes >= min_overlap
    if len(np.unique(grams)) == len(grams):
        return late
    own: set[int] = set()
    for unit, (first, size) in enumerate(zip(firsts.tolist(), sizes.tolist())):
        mine = grams[first : first + size].tolist()
        seen = sum(before or gram in own for gram, before in zip(mine, known[first : first + size].tolist()))
        late[unit] = seen / size >= min_overlap
        if not late[unit]:
            own.update(mine)
    return late


class Bloom:
    """A set of uint64 hashes that may say yes to one that it has not, in ln(1/p) / ln(2)^2 bits an element.

    Bloom 1970; positions by double hashing, Kirsch and Mitzenmacher 2006.
    """

    def __init__(self, elements: int, false_positives: float):
        bits = max(64, math.ceil(max(elements, 1) * -math.log(false_positives) / math.log(2) ** 2))
        self.hashes = max(1, round(bits / max(elements, 1) * math.log(2)))
        self._bits = np.zeros(-(-bits // 8), np.uint8)
        self._size = np.uint64(bits)

    def has(self, values: np.ndarray) -> np.ndarray:
        """bool [n]."""
        found = np.ones(len(values), bool)
        for at in self._positions(values):
            found &= (self._bits[at >> np.uint64(3)] >> (at & np.uint64(7)).astype(np.uint8)) & 1 == 1
        return found

    def add(self, values: np.ndarray) -> None:
        for at in self._positions(values):
            bit = np.left_shift(1, (at & np.uint64(7)).astype(np.uint8), dtype=np.uint8)
            np.bitwise_or.at(self._bits, at >> np.uint64(3), bit)

    def _positions(self, values: np.ndarray) -> Iterator[np.ndarray]:
        with np.errstate(over="ignore"):
            step = (values * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
            for i in range(self.hashes):
                yield (values + np.uint64(i) * step) % self._size


def units(text: str, unit: Unit) -> Iterator[tuple[int, int, str]]:
    """(start, stop, text) of each line or paragraph, with the newlines that end it."""
    for match in _UNITS[unit].finditer(text):
        yield match.start(), match.end(), match[0]


def hash64(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _table(found: Sequence[tuple[int, int, int, int, int]]) -> Any:
    import pyarrow as pa

    columns = list(zip(*found)) or [()] * 5
    types = (pa.int32(), pa.int64(), pa.int64(), pa.int64(), pa.uint64())
    names = ("row", "start", "stop", "size", "hash")
    return pa.table({n: pa.array(c, t) for n, c, t in zip(names, columns, types)})


def _decisions(table: Any, late: np.ndarray, max_cut: float, reason: str) -> list[Decision]:
    """What is late is cut; a document goes whole where that is more than `max_cut` of it."""
    cut: dict[int, list[tuple[int, int]]] = {}
    sizes: dict[int, int] = {}
    for unit in table.select(["row", "start", "stop", "size"]).filter(late).to_pylist():
        cut.setdefault(unit["row"], []).append((unit["start"], unit["stop"]))
        sizes[unit["row"]] = unit["size"]
    made = []
    for row, pieces in cut.items():
        share = sum(stop - start for start, stop in pieces) / max(sizes[row], 1)
        made.append(Decision(row, reason) if share > max_cut else Decision(row, None, tuple(pieces)))
    return made

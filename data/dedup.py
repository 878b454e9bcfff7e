"""Deduplication, exact and near. What stays depends on the set of documents alone, not on their order or on
workers: of each group of duplicates the one with the smallest id."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from data.documents import Document
from data.stage import Corpus, Decision, Global

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class _Pairs(Global):
    """What exact and near deduplication share: a feature a document, and by them which ones go."""

    label: ClassVar[str] = ""

    def feature(self, text: str) -> bytes:
        raise NotImplementedError

    def duplicates(
        self, features: Mapping[str, bytes], text_of: Callable[[list[str]], dict[str, str]]
    ) -> dict[str, str]:
        raise NotImplementedError

    def features(self, documents: Sequence[tuple[int, Document]]) -> Any:
        import pyarrow as pa

        columns = {
            "row": pa.array([row for row, _ in documents], pa.int32()),
            "id": pa.array([d["id"] for _, d in documents], pa.large_string()),
            "feature": pa.array([self.feature(d["text"]) for _, d in documents], pa.large_binary()),
        }
        return pa.table(columns)

    def resolve(self, corpus: Corpus) -> Iterator[tuple[str, list[Decision]]]:
        features: dict[str, bytes] = {}
        place: dict[str, tuple[str, int]] = {}
        for shard in corpus.shards:
            for row in corpus.features(shard).to_pylist():
                features[row["id"]] = row["feature"]
                place[row["id"]] = (shard, row["row"])

        def text_of(names: list[str]) -> dict[str, str]:
            texts = {}
            for shard, group in _by_shard(names, place).items():
                documents = corpus.documents(shard, [place[name][1] for name in group])
                texts |= {document["id"]: document["text"] for document in documents}
            return texts

        gone = self.duplicates(features, text_of)
        for shard, group in sorted(_by_shard(sorted(gone), place).items()):
            yield (
                shard,
                [Decision(place[n][1], f"{self.label}: duplicate of {gone[n]}") for n in group],
            )


def _by_shard(names: Iterable[str], place: Mapping[str, tuple[str, int]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(place[name][0], []).append(name)
    return groups


@dataclasses.dataclass(frozen=True)
class ExactDedup(_Pairs):
    """Documents whose text is equal but for white space."""

    label: ClassVar[str] = "exact"

    def feature(self, text: str) -> bytes:
        """What is compared: 16 bytes."""
        return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()

    def duplicates(
        self, features: Mapping[str, bytes], text_of: Callable[[list[str]], dict[str, str]]
    ) -> dict[str, str]:
        """Each document that goes, and the one that it repeats."""
        first: dict[bytes, str] = {}
        gone: dict[str, str] = {}
        for name in sorted(features):
            kept = first.setdefault(features[name], name)
            if kept != name:
                gone[name] = kept
        return gone


@dataclasses.dataclass(frozen=True)
class MinHashDedup(_Pairs):
    """MinHash with banding (Broder 1997; FineWeb's bands, Penedo et al. 2024, arXiv:2406.17557): pairs that
    share a band are candidates, and candidates are verified by the true Jaccard similarity of their
    shingles."""

    label: ClassVar[str] = "minhash"
    shingle_words: int = 5
    bands: int = 14
    rows: int = 8
    min_jaccard: float = 0.75
    max_shingles: int = (
        65_536  # of a longer document those with the smallest hashes: the same ones in its twin
    )

    def feature(self, text: str) -> bytes:
        """One uint64 for each band; b"" for a text without a word."""
        shingles = self.shingles(text)
        if not len(shingles):
            return b""
        signature = np.empty(self.bands * self.rows, np.uint64)
        with np.errstate(over="ignore"):
            for i in range(len(signature)):
                signature[i] = _mix(shingles ^ _mix(np.uint64(i + 1) * _GOLDEN)).min()
            keys = np.zeros(self.bands, np.uint64)
            for column in signature.reshape(self.bands, self.rows).T:
                keys = _mix(keys ^ column) * _GOLDEN
        return keys.astype("<u8").tobytes()

    def shingles(self, text: str) -> np.ndarray:
        """Hashes of the distinct runs of `shingle_words` words, sorted, uint64; all words of a shorter text
        as one.
        """
        words = re.findall(r"\w+", text.lower())
        if not words:
            return np.zeros(0, np.uint64)
        hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
        n = min(self.shingle_words, len(words))
        keys = np.zeros(len(hashes) - n + 1, np.uint64)
        with np.errstate(over="ignore"):
            for i in range(n):
                keys = _mix(keys * _GOLDEN + hashes[i : i + len(keys)])
        return np.unique(keys)[: self.max_shingles]

    def duplicates(
        self, features: Mapping[str, bytes], text_of: Callable[[list[str]], dict[str, str]]
    ) -> dict[str, str]:
        """Each document that goes, and the one of its connected component that stays."""
        names = sorted(name for name, feature in features.items() if feature)
        buckets = self._buckets(names, features)
        candidates = sorted({i for bucket in buckets for i in bucket})
        texts = text_of([names[i] for i in candidates])
        shingles = {i: self.shingles(texts[names[i]]) for i in candidates}
        parent = np.arange(len(names))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return int(i)

        refused: set[tuple[int, int]] = set()
        for bucket in buckets:
            for k, j in enumerate(bucket):
                for i in bucket[:k]:
                    if root(i) == root(j) or (i, j) in refused:
                        continue
                    if jaccard(shingles[i], shingles[j]) >= self.min_jaccard:
                        low, high = sorted((root(i), root(j)))
                        parent[high] = low  # the root is the smallest id
                    else:
                        refused.add((i, j))
        return {names[i]: names[root(i)] for i in candidates if root(i) != i}

    def _buckets(self, names: list[str], features: Mapping[str, bytes]) -> list[list[int]]:
        """Groups of two or more documents that share a band, each sorted; no group twice."""
        if not names:
            return []
        keys = np.frombuffer(b"".join(features[name] for name in names), "<u8").reshape(
            len(names), self.bands
        )
        found: set[tuple[int, ...]] = set()
        for band in range(self.bands):
            order = np.argsort(keys[:, band], kind="stable")
            column = keys[order, band]
            edges = np.flatnonzero(column[1:] != column[:-1]) + 1
            found |= {tuple(sorted(group.tolist())) for group in np.split(order, edges) if len(group) > 1}
        return [list(group) for group in sorted(found)]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sorted arrays of distinct values."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(len(a) + len(b) - shared, 1)


@functools.lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of uint64 whose output bits depend on all input bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

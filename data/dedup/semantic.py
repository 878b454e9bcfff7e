"""Documents that say the same: SemDeDup (Abbas et al. 2023, arXiv:2303.09540). Embeddings are clustered by
k-means on the sphere, and within a cluster pairs of a high cosine are duplicates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data.callables import named
from data.dedup.corpus import Keep, best_of_components, components, decisions, feature_table, gather
from data.documents import Document, DocumentType
from data.stage import Corpus, Decision, Global

_SAMPLE = 200_000  # documents that centres are found on
_ROWS = 4096  # compared at a time


@dataclasses.dataclass(frozen=True)
class SemanticDedup(Global):
    """`embedder` names a function "module:function" that takes `model` and gives one from texts to unit
    vectors, float32 [N, D]. Pairs of one cluster with a cosine of at least `min_cosine` are duplicates;
    connected ones keep one.

    The mean size of a cluster bounds the work: it grows with documents times that size.
    """

    embedder: str = "serve.embedder:embedder"
    model: str = "all-MiniLM-L6-v2"
    applies_to: DocumentType = "any"
    min_cosine: float = 0.95
    cluster_documents: int = 1000  # the mean size of a cluster
    max_characters: int = 4000  # of a text that are embedded
    batch: int = 64
    iterations: int = 20
    keep: Keep = "first"  # "first": the smallest id; "longest"; "best": the highest score
    score: str = ""  # where the score lies in the metadata, e.g. "tags.Quality.score"

    def features(self, documents: Sequence[tuple[int, Document]]) -> Any:
        import pyarrow as pa

        embed = _embedder(self.embedder, self.model)
        texts = [document["text"][: self.max_characters] for _, document in documents]
        parts = [embed(texts[i : i + self.batch]) for i in range(0, len(texts), self.batch)]
        vectors = np.concatenate(parts).astype("<f4") if parts else np.zeros((0, 2), "<f4")
        raw = [row.tobytes() for row in np.pad(vectors, ((0, 0), (0, vectors.shape[1] % 2)))]
        width = (vectors.shape[1] + vectors.shape[1] % 2) * 4
        return feature_table(documents, self.keep, self.score, pa.array(raw, pa.binary(width)))

    def resolve(self, corpus: Corpus) -> Iterator[tuple[str, list[Decision]]]:
        rows, keys = gather(corpus)
        vectors = keys.view(np.float32)
        cluster = clusters(vectors, max(1, round(len(vectors) / self.cluster_documents)), self.iterations)
        pairs = [np.zeros((0, 2), np.int64)]
        for number in np.unique(cluster).tolist():
            members = np.flatnonzero(cluster == number)
            for at in range(0, len(members), _ROWS):
                cosine = vectors[members[at : at + _ROWS]] @ vectors[members].T
                i, j = np.nonzero(cosine >= self.min_cosine)
                later = members[i + at] < members[j]
                pairs.append(np.stack([members[i + at][later], members[j][later]], axis=1))
        found = components(len(vectors), np.concatenate(pairs))
        yield from decisions(corpus, rows, best_of_components(found, rows.order), "semantic")


def clusters(vectors: np.ndarray, count: int, iterations: int) -> np.ndarray:
    """k-means by cosine: the number of each vector's cluster, int64 [N]; the same for the same vectors in the
    same order.

    Starts as k-means++ (Arthur and Vassilvitskii 2007).
    """
    if count <= 1 or len(vectors) <= count:
        return np.zeros(len(vectors), np.int64)
    sample = vectors[:: max(1, len(vectors) // _SAMPLE)]
    rng = np.random.default_rng(0)
    centres = np.empty((count, vectors.shape[1]), np.float32)
    distance = np.full(len(sample), np.inf)
    for i in range(count):
        shares = distance / distance.sum() if i else None
        centres[i] = sample[rng.choice(len(sample), p=shares)]
        distance = np.minimum(distance, np.maximum(1 - sample @ centres[i], 0).astype(np.float64) + 1e-12)
    for _ in range(iterations):
        nearest = _nearest(sample, centres)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, sample)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centres)
    return _nearest(vectors, centres)


def _nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    parts = [(vectors[i : i + _ROWS] @ centres.T).argmax(1) for i in range(0, len(vectors), _ROWS)]
    return np.concatenate(parts)


_EMBEDDERS: dict[tuple[str, str], Any] = {}


def _embedder(name: str, model: str) -> Any:
    """Made once in a process: it holds a model."""
    if (name, model) not in _EMBEDDERS:
        _EMBEDDERS[name, model] = named(name)(model)
    return _EMBEDDERS[name, model]

"""Near duplicates by MinHash with banding (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4).

Documents that share a band are candidates; candidates are verified by the true Jaccard similarity of their shingles, as
many of them as data/dedup/candidates.py says; connected components of what holds keep one document each. Signatures
are daft's: (a x + b) mod a Mersenne prime.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data import storage
from data.dedup import index
from data.dedup.candidates import Buckets, Store, similar_pairs, verify_some
from data.dedup.corpus import (
    Keep,
    Rows,
    best_of_components,
    components,
    decisions,
    feature_table,
    fixed,
    gather,
)
from data.dedup.lines import hash64
from data.documents import Document, DocumentType, read_documents
from data.stage import Corpus, Decision, Global
from data.words import words

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PAIRS = 1 << 14  # verified by a worker at a time
_word_hash = functools.lru_cache(maxsize=1 << 18)(hash64)


@dataclasses.dataclass(frozen=True)
class MinHashDedup(Global):
    """Two documents are duplicates when `min_jaccard` of their runs of `shingle_words` words are shared.

    With b bands of r rows a pair of similarity s is a candidate with probability 1 - (1 - s^r)^b: 18 bands of 6 find
    0.996 of the pairs at 0.8 (FineWeb's 14 bands of 8 find 0.92, and take what they find without a look).
    """

    applies_to: DocumentType = "any"
    shingle_words: int = 5
    bands: int = 18
    rows: int = 6
    min_jaccard: float = 0.8
    max_shingles: int = (
        65_536  # of a longer document those with the smallest hashes: the same ones in its twin
    )
    keep: Keep = "first"  # "first": the smallest id; "longest"; "best": the highest score
    score: str = ""  # where the score lies in the metadata, e.g. "tags.Quality.score"
    index: tuple[
        str, ...
    ] = ()  # folders written by `save_index` before: their documents stay, twins of them go
    save_index: str | None = None  # a folder to write, for later crawls: what stays, with its shingles

    version: ClassVar[int] = 3

    def __post_init__(self):
        for folder in (*self.index, *filter(None, [self.save_index])):
            storage.local(folder, "an index")

    def files(self) -> tuple[str, ...]:
        return tuple(os.path.join(folder, index.KEYS) for folder in self.index)

    def outputs(self) -> tuple[str, ...]:
        names = (index.KEYS, index.SHINGLES)
        return tuple(os.path.join(self.save_index, name) for name in names) if self.save_index else ()

    def features(self, documents: Sequence[tuple[int, Document]]) -> Any:
        keys = self.bands_of([document["text"] for _, document in documents])
        return feature_table(documents, self.keep, self.score, fixed(keys))

    def bands_of(self, texts: Sequence[str]) -> np.ndarray:
        """uint64 [N, bands + 1]: a key for each band, and last how many words there are (0: no key counts)."""
        import daft
        import pyarrow as pa

        found = [words(text.lower()) for text in texts]
        keys = np.zeros((len(texts), self.bands + 1), np.uint64)
        keys[:, -1] = list(map(len, found))
        if not len(texts):
            return keys
        series = daft.Series.from_arrow(pa.array([" ".join(each) for each in found], pa.large_string()))
        signature = series.minhash(
            num_hashes=self.bands * self.rows, ngram_size=self.shingle_words, seed=1, hash_function="xxhash"
        )
        flat = signature.to_arrow().flatten().to_numpy(zero_copy_only=False).astype(np.uint64)
        columns = flat.reshape(len(texts), self.bands, self.rows)
        with np.errstate(over="ignore"):
            for i in range(self.rows):
                keys[:, :-1] = _mix(keys[:, :-1] ^ columns[:, :, i]) * _GOLDEN
        return keys

    def shingles(self, text: str) -> np.ndarray:
        """Hashes of the distinct runs of `shingle_words` words, sorted, uint64; all words of a shorter text
        as one.
        """
        found = words(text.lower())
        if not found:
            return np.zeros(0, np.uint64)
        hashes = np.fromiter(map(_word_hash, found), np.uint64, len(found))
        n = min(self.shingle_words, len(found))
        keys = np.zeros(len(hashes) - n + 1, np.uint64)
        with np.errstate(over="ignore"):
            for i in range(n):
                keys = _mix(keys * _GOLDEN + hashes[i : i + len(keys)])
        return np.unique(keys)[: self.max_shingles]

    def resolve(self, corpus: Corpus) -> Iterator[tuple[str, list[Decision]]]:
        rows, keys = gather(corpus)
        own = len(keys)
        rows, keys = index.with_indices(rows, keys, self.index, self.bands)
        buckets = Buckets.of(keys, rows.order)
        wanted = buckets.documents(len(keys))
        corpus.log(f"minhash: {len(wanted):,} of {len(keys):,} documents share a band with another")
        store = _store_shingles(self, corpus, rows, wanted, own)
        verify = functools.partial(_verify, self, corpus, store)
        pairs = similar_pairs(buckets, keys, rows.order, store, verify)
        found = components(len(keys), pairs)
        stays = best_of_components(found, rows.order)
        if self.save_index:
            _save_index(self, corpus, rows, keys, np.flatnonzero(stays[:own] == np.arange(own)))
        yield from decisions(corpus, rows, stays, "minhash", own)


def _verify(stage: MinHashDedup, corpus: Corpus, store: Store, pairs: np.ndarray) -> np.ndarray:
    """Those pairs whose true similarity is high enough."""
    items = [(store, stage.min_jaccard, pairs[i : i + _PAIRS]) for i in range(0, len(pairs), _PAIRS)]
    verdicts = list(corpus.map(verify_some, items, len(pairs) / _PAIRS))
    return pairs[np.concatenate(verdicts)] if verdicts else pairs


def _store_shingles(stage: MinHashDedup, corpus: Corpus, rows: Rows, wanted: np.ndarray, own: int) -> Store:
    items = _shard_items(stage, corpus, rows, wanted[wanted < own])
    sizes, parts = [], []
    for item, lengths in zip(items, corpus.map(_shingles_of_shard, items, _megabytes(items)), strict=True):
        sizes.append(lengths)
        parts.append(item[3])
    old_values, old_sizes = index.indexed_shingles(stage.index, wanted[wanted >= own] - own)
    ends = np.concatenate([[0], np.cumsum(np.concatenate([*sizes, old_sizes]))]).astype(np.int64)
    store = Store(*(corpus.scratch / f"{name}.npy" for name in Store._fields))
    np.save(store.documents, wanted)
    np.save(store.ends, ends)
    values = np.lib.format.open_memmap(store.shingles, "w+", np.uint64, (max(int(ends[-1]), 1),))
    at = 0
    for part in parts:
        piece = np.load(part)
        values[at : at + len(piece)] = piece
        at += len(piece)
        part.unlink()
    values[at : at + len(old_values)] = old_values
    values.flush()
    return store


def _megabytes(items: Sequence[Any]) -> float:
    return (
        sum(os.path.getsize(item[1]) for item in items) * 3 / 1e6
    )  # of text; it lies compressed to about a third


def _shingles_of_shard(item: tuple[MinHashDedup, Path, np.ndarray, Path]) -> np.ndarray:
    """Writes the shingles of these rows one after the other; gives how many each has."""
    stage, path, rows, target = item
    found = [stage.shingles(document["text"]) for document in read_documents(path, rows.tolist())]
    np.save(target, np.concatenate([np.zeros(0, np.uint64), *found]))
    return np.array([len(each) for each in found], np.int64)


def _save_index(stage: MinHashDedup, corpus: Corpus, rows: Rows, keys: np.ndarray, kept: np.ndarray) -> None:
    items, shingles, sizes = _shard_items(stage, corpus, rows, kept), [], [np.zeros(0, np.int64)]
    for item, lengths in zip(items, corpus.map(_shingles_of_shard, items, _megabytes(items)), strict=True):
        sizes.append(lengths)
        shingles.append(np.load(item[3]))
    folder = Path(stage.save_index or "")
    index.save(folder, rows.ids.take(kept), fixed(keys[kept]), shingles, np.concatenate(sizes))


def _shard_items(stage: MinHashDedup, corpus: Corpus, rows: Rows, wanted: np.ndarray) -> list[Any]:
    """What `_shingles_of_shard` takes, for each shard that has any of these documents."""
    items = []
    for shard in np.unique(rows.shard[wanted]).tolist():
        name, members = corpus.shards[shard], wanted[rows.shard[wanted] == shard]
        items.append((stage, corpus.documents_path(name), rows.row[members], corpus.scratch / f"{name}.npy"))
    return items


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sorted arrays of distinct values."""
    both = np.concatenate([a, b])
    both.sort(kind="stable")
    shared = int((both[1:] == both[:-1]).sum())
    return shared / max(len(both) - shared, 1)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of uint64 whose output bits depend on all input bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""What all deduplication shares: rows of all shards as one numbering, which of two stays, and sets that grow together.

A document is a number: its place among all rows of all features, in the order of shards. What stays never depends on
that number where it could depend on chance: the rule decides, then the smallest id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from data.documents import Document
from data.stage import Corpus, Decision

Keep = Literal["first", "longest", "best"]


class Rows(NamedTuple):
    """All documents with features. `order[i]` is the i-th best by the rule: of duplicates the one first in it stays."""

    shard: np.ndarray  # int64 [N], which of corpus.shards
    row: np.ndarray  # int32 [N]
    order: np.ndarray  # int64 [N]
    ids: Any  # Arrow string array [N]


def rank_of(document: Document, keep: Keep, score: str) -> float:
    """What the rule compares: nothing ("first": the smallest id stays), characters, or a number in the metadata by its
    dotted path, e.g. "tags.Quality.score"."""
    if keep == "first":
        return 0.0
    if keep == "longest":
        return float(len(document["text"]))
    value: Any = document["metadata"]
    for part in score.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) else float("-inf")


def feature_table(documents: Sequence[tuple[int, Document]], keep: Keep, score: str, feature: Any) -> Any:
    """The Arrow table of a shard: row, id, rank, and `feature`, an Arrow array of one for each document."""
    import pyarrow as pa

    return pa.table(
        {
            "row": pa.array([row for row, _ in documents], pa.int32()),
            "id": pa.array([d["id"] for _, d in documents], pa.large_string()),
            "rank": pa.array([rank_of(d, keep, score) for _, d in documents], pa.float64()),
            "feature": feature,
        }
    )


def fixed(features: np.ndarray) -> Any:
    """uint64 [N, k] as an Arrow array of N binaries."""
    import pyarrow as pa

    width = features.shape[1] * 8
    data = pa.py_buffer(np.ascontiguousarray(features, "<u8").tobytes())
    return pa.Array.from_buffers(pa.binary(width), len(features), [None, data])


def gather(corpus: Corpus) -> tuple[Rows, np.ndarray]:
    """All rows, and their features as uint64 [N, k]."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # makes its functions when it is imported
    tables = [corpus.features(shard) for shard in corpus.shards]
    sizes = [len(table) for table in tables]
    table = pa.concat_tables(tables)
    keys = pa.table(
        {"rank": pc.negate(table.column("rank")), "id": table.column("id"), "n": np.arange(len(table))}
    )
    order = pc.sort_indices(keys, [("rank", "ascending"), ("id", "ascending"), ("n", "ascending")])
    rows = Rows(
        np.repeat(np.arange(len(sizes)), sizes),
        table.column("row").to_numpy().astype(np.int32),
        order.to_numpy().astype(np.int64),
        table.column("id").combine_chunks(),
    )
    return rows, features_of(table)


def features_of(table: Any) -> np.ndarray:
    """What `fixed` made, of all chunks of the column "feature": uint64 [N, k]."""
    import pyarrow as pa

    column = table.column("feature").combine_chunks()
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    width = column.type.byte_width
    parts = []
    for chunk in chunks:
        raw = np.frombuffer(chunk.buffers()[1], np.uint8) if len(chunk) else np.zeros(0, np.uint8)
        parts.append(raw[chunk.offset * width : (chunk.offset + len(chunk)) * width])
    joined = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
    return joined.view("<u8").reshape(-1, width // 8)


def decisions(
    corpus: Corpus, rows: Rows, stays: np.ndarray, label: str, limit: int | None = None
) -> Iterator[tuple[str, list[Decision]]]:
    """Drops each document n with `stays[n] != n`, as a duplicate of `stays[n]`. `limit`: only documents below it are
    of this corpus (those above are of an index)."""
    gone = np.flatnonzero(stays[:limit] != np.arange(len(stays))[:limit])
    for shard in np.unique(rows.shard[gone]):
        members = gone[rows.shard[gone] == shard]
        kept = rows.ids.take(stays[members]).to_pylist()
        pairs = zip(rows.row[members].tolist(), kept)
        yield (
            corpus.shards[shard],
            [Decision(row, f"{label}: duplicate of {name}") for row, name in pairs],
        )


def best_of_components(component: np.ndarray, order: np.ndarray) -> np.ndarray:
    """For each document the best one of its component: int64 [N]."""
    best = np.full(int(component.max(initial=-1)) + 1, -1, np.int64)
    best[component[order[::-1]]] = order[::-1]  # the best is written last
    return best[component]


def components(count: int, pairs: np.ndarray) -> np.ndarray:
    """The connected component of each of `count` nodes under the edges `pairs`, int64 [n, 2]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(pairs), np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def groups(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Members of groups of equal keys, of two or more: (members, ends), `members[ends[i-1]:ends[i]]` one group.

    Members ascend within a group.
    """
    if not len(keys):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    inside = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    members = order[inside]
    kept = ordered[inside]
    last = np.concatenate([kept[1:] != kept[:-1], [True]]) if len(kept) else np.zeros(0, bool)
    return members, np.flatnonzero(last) + 1


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

"""What stays of a crawl, kept for later ones: ids, MinHash keys and shingles, so that their twins are found
and verified.

keys.parquet    id, feature (a key for each band, and the number of words), shingles (how many)
shingles.npy    uint64, those of all documents one after the other
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.files import remove_leftovers, temporary_beside
from configs.typed import ConfigError
from data.dedup.corpus import Rows, features_of
from data.documents import write_table

KEYS, SHINGLES = "keys.parquet", "shingles.npy"


def with_indices(rows: Rows, keys: np.ndarray, folders: Sequence[str], bands: int) -> tuple[Rows, np.ndarray]:
    """The documents of earlier crawls added; each of them is better than any new one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for folder in folders:
        path = os.path.join(folder, KEYS)
        if not os.path.exists(path):
            raise ConfigError(f"index: {folder} holds no {KEYS}; it is made by MinHashDedup with save_index")
        table = pq.read_table(path)
        old = features_of(table)
        if old.shape[1] != bands + 1:
            raise ConfigError(f"index: {folder} has {old.shape[1] - 1} bands, the config {bands}")
        ids = pa.chunked_array([rows.ids, table.column("id").combine_chunks()]).combine_chunks()
        numbers = np.arange(len(keys), len(keys) + len(old))
        outside = np.full(len(old), -1, np.int64)
        rows = Rows(
            np.concatenate([rows.shard, outside]),
            np.concatenate([rows.row, outside.astype(np.int32)]),
            np.concatenate([numbers, rows.order]),
            ids,
        )
        keys = np.concatenate([keys, old])
    return rows, keys


def indexed_shingles(folders: Sequence[str], wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shingles of documents of the indices (numbered through all of them), and how many each has."""
    import pyarrow.parquet as pq

    values, sizes, first = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    for folder in folders:
        counts = pq.read_table(os.path.join(folder, KEYS), columns=["shingles"]).column(0).to_numpy()
        ends = np.concatenate([[0], np.cumsum(counts)])
        stored = np.load(os.path.join(folder, SHINGLES), mmap_mode="r")
        mine = wanted[(wanted >= first) & (wanted < first + len(counts))] - first
        values += [np.asarray(stored[ends[i] : ends[i + 1]]) for i in mine.tolist()]
        sizes.append(counts[mine])
        first += len(counts)
    return np.concatenate(values), np.concatenate(sizes)


def save(folder: Path, ids: Any, features: Any, shingles: Sequence[np.ndarray], sizes: np.ndarray) -> None:
    """Writes the documents that stay: their ids, keys (as `fixed` gives them), and shingles one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    temporary = temporary_beside(folder / SHINGLES)
    with open(temporary, "wb") as file:
        np.save(file, np.concatenate([np.zeros(0, np.uint64), *shingles]))
    os.replace(temporary, folder / SHINGLES)
    write_table(folder / KEYS, {"id": ids, "feature": features, "shingles": sizes})

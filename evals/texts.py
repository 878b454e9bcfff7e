"""Held-out text to measure on: a text dataset, a folder of files, or one text, JSONL or Parquet file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs import ConfigError
from data.shards import open_dataset, read_manifest
from data.sources import Folder, Jsonl, Parquet, Rejected, TextFile, file_state


def read_texts(path: str | os.PathLike, text_field: str = "text", limit: int | None = None) -> list[str]:
    """The documents of `path` that are not empty; of a text file, the whole file is one.

    `limit`: only so many, those first in the order of a hash of their text, so that a smaller sample is part
    of a larger one. Raises ConfigError for a path that holds no text, and for a line or row that can't be
    read.
    """
    documents = [text for text in _documents(Path(path), text_field) if text]
    if not documents:
        raise ConfigError(f"{path}: holds no text.")
    if limit is not None and limit < len(documents):
        documents = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())[:limit]
    return documents


def texts_state(path: str | os.PathLike) -> list[Any]:
    """What must be unchanged for an earlier measurement to stand: a dataset's hash, or files' sizes and
    times.
    """
    path = Path(path)
    if _is_dataset(path):
        return [read_manifest(path)["sha256"]]
    return [(name, *file_state(name)) for name in _source(path, "text").files()]


def _documents(path: Path, text_field: str) -> Iterator[str]:
    if _is_dataset(path):
        dataset = open_dataset(path)
        if dataset.kind != "text":
            raise ConfigError(
                f"{path} is a dataset of kind {dataset.kind!r}; bits per byte needs one of kind 'text'."
            )
        yield from (record["text"] for record in dataset)
        return
    for item in _source(path, text_field).documents():
        if isinstance(item, Rejected):
            raise ConfigError(f"{path}: {item.id}: {item.reason}")
        yield item["text"]


def _is_dataset(path: Path) -> bool:
    """Whether it is a dataset folder, or holds some (then opening it says which)."""
    return path.is_dir() and ((path / "manifest.json").exists() or any(path.glob("*/manifest.json")))


def _source(path: Path, text_field: str) -> Folder | Jsonl | Parquet | TextFile:
    if not path.exists():
        raise ConfigError(f"{path}: no such text dataset, folder or file.")
    if path.is_dir():
        return Folder(str(path), text_field=text_field)
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    if suffixes and suffixes[-1] in (".jsonl", ".json"):
        return Jsonl(str(path), text_field=text_field)
    if suffixes and suffixes[-1] == ".parquet":
        return Parquet(str(path), text_field=text_field)
    return TextFile(str(path))

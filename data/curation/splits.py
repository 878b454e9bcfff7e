"""The documents that passed all stages, as text datasets by split."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.typed import ConfigError
from data.curation.config import CurationConfig
from data.curation.shard import Rows, ShardTask
from data.documents import COPY_MARK, Document
from data.shards import Dataset, hash_of, is_current, open_dataset, write_dataset


def split_of(document: Document, validation_fraction: float, test_fraction: float) -> str:
    """train, validation or test: by a hash of the document's group, else of its id. Copies fall into one split."""
    group = document["metadata"].get("group") or document["id"].partition(COPY_MARK)[0]
    point = int.from_bytes(hashlib.sha256(str(group).encode("utf-8", "replace")).digest()[:8], "big") / 2**64
    if point < validation_fraction:
        return "validation"
    return "test" if point < validation_fraction + test_fraction else "train"


def write_splits(
    config: CurationConfig, tasks: Sequence[ShardTask], reports: Sequence[Any], workdir: Path
) -> dict[str, Dataset]:
    """`workdir/text/SPLIT` for each split that has a share. Raises ConfigError where one is left empty."""
    fractions = (config.validation_fraction, config.test_fraction)
    key = hash_of([task.keys[-1] for task in tasks], fractions)
    datasets = {}
    for split, share in zip(("train", "validation", "test"), (1.0, *fractions)):
        if share <= 0:
            continue
        target = workdir / "text" / split
        if is_current(target, key):
            datasets[split] = open_dataset(target)
        else:
            datasets[split] = _write_split(split, config, tasks, reports, key, target)
        if len(datasets[split]) == 0:
            raise ConfigError(
                f"no document is left for {split}: {reports[0].documents_out} came in, "
                f"{reports[-1].documents_out} passed all stages. See {workdir / 'dropped'} for the "
                "reasons; give more text, or a larger fraction."
            )
    return datasets


def _write_split(
    split: str,
    config: CurationConfig,
    tasks: Sequence[ShardTask],
    reports: Sequence[Any],
    key: str,
    target: Path,
) -> Dataset:
    count = {"characters": 0, "bytes": 0}
    sources: dict[str, dict[str, Any]] = {}
    stages = [dataclasses.asdict(report) for report in reports]
    dropped = sum((Counter(report.dropped) for report in reports), Counter())
    facts = {"key": key, "split": split, "stages": stages, "dropped": dict(sorted(dropped.items()))}

    def records() -> Iterator[Document]:
        for document in itertools.chain.from_iterable(map(_documents, tasks)):
            if split_of(document, config.validation_fraction, config.test_fraction) != split:
                continue
            count["characters"] += len(document["text"])
            count["bytes"] += len(document["text"].encode("utf-8"))
            name = document["source"]
            entry = sources.setdefault(name, {"name": name, "licence": document["licence"], "documents": 0})
            entry["documents"] += 1
            yield document

    def manifest() -> dict[str, Any]:
        return {**facts, **count, "sources": [sources[name] for name in sorted(sources)]}

    return write_dataset(target, records(), "text", manifest)


def _documents(task: ShardTask) -> Iterator[Document]:
    """What passed all stages."""
    rows = Rows.load(task, len(task.steps))
    return (document for document, alive in zip(rows.documents, rows.alive) if alive)

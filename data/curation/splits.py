"""The documents that passed all stages, as text datasets by split."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.curation.config import CurationConfig
from data.curation.shard import Rows, ShardTask
from data.documents import COPY_MARK, Document
from data.shards import Dataset, hash_of, is_current, open_dataset, write_dataset

Log = Callable[[str], None]


def split_of(document: Document, validation_fraction: float, test_fraction: float) -> str:
    """train, validation or test: by a hash of the document's group, else of its id. Copies fall into one split."""
    point = _point(_group(document))
    if point < validation_fraction:
        return "validation"
    return "test" if point < validation_fraction + test_fraction else "train"


def write_splits(
    config: CurationConfig, tasks: Sequence[ShardTask], reports: Sequence[Any], workdir: Path, log: Log
) -> dict[str, Dataset]:
    """`workdir/text/SPLIT` for each split that has a share.

    A corpus so small that none falls into validation or test gives it the group with the nearest hash, as long as
    train keeps one; a split that stays empty is not written. The log says both.
    """
    fractions = {"validation": config.validation_fraction, "test": config.test_fraction}
    key = hash_of([task.keys[-1] for task in tasks], *fractions.values())
    lent: dict[str, str] = {}  # split by group
    datasets: dict[str, Dataset] = {}
    for split in (*(name for name, share in fractions.items() if share > 0), "train"):
        target = workdir / "text" / split
        if is_current(target, key):
            datasets[split] = open_dataset(target)
            lent |= datasets[split].manifest.get("lent", {})
            continue
        made = _write_split(split, config, tasks, reports, key, target, lent)
        if not len(made) and split != "train" and (group := _nearest(config, tasks, split, lent)):
            lent[group] = split
            made = _write_split(split, config, tasks, reports, key, target, lent)
        if len(made):
            datasets[split] = made
        else:
            shutil.rmtree(target)
    for split, share in fractions.items():
        if share > 0 and split not in datasets:
            log(f"{split}: no document of {reports[-1].documents_out}; give more text, or a larger fraction")
    for group, split in lent.items():
        log(
            f"{split}: no document fell into its share of {fractions[split]:.3g}, so it has the nearest: {group}"
        )
    return {split: datasets[split] for split in ("train", "validation", "test") if split in datasets}


def _group(document: Document) -> str:
    return str(document["metadata"].get("group") or document["id"].partition(COPY_MARK)[0])


def _point(group: str) -> float:
    """Where a group lies between 0 and 1."""
    return int.from_bytes(hashlib.sha256(group.encode("utf-8", "replace")).digest()[:8], "big") / 2**64


def _split(document: Document, config: CurationConfig, lent: dict[str, str]) -> str:
    return lent.get(_group(document)) or split_of(document, config.validation_fraction, config.test_fraction)


def _nearest(
    config: CurationConfig, tasks: Sequence[ShardTask], split: str, lent: dict[str, str]
) -> str | None:
    """The group of train with the smallest hash (its share lies before train's), unless it is the only one."""
    points = {}
    for document in itertools.chain.from_iterable(map(_documents, tasks)):
        if _split(document, config, lent) == "train":
            points[_group(document)] = _point(_group(document))
            points = dict(sorted(points.items(), key=lambda item: item[1])[:2])
    return next(iter(points)) if len(points) == 2 else None


def _write_split(
    split: str,
    config: CurationConfig,
    tasks: Sequence[ShardTask],
    reports: Sequence[Any],
    key: str,
    target: Path,
    lent: dict[str, str],
) -> Dataset:
    count = {"characters": 0, "bytes": 0}
    sources: dict[str, dict[str, Any]] = {}
    stages = [dataclasses.asdict(report) for report in reports]
    dropped = sum((Counter(report.dropped) for report in reports), Counter())
    facts = {"key": key, "split": split, "stages": stages, "dropped": dict(sorted(dropped.items()))}
    if mine := {group: name for group, name in lent.items() if name == split}:
        facts["lent"] = mine

    def records() -> Iterator[Document]:
        for document in itertools.chain.from_iterable(map(_documents, tasks)):
            if _split(document, config, lent) != split:
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

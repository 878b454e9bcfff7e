"""What a data card says, gathered from what a curation left in its workdir, shard by shard.

Samples are those with the smallest hashes of their ids, so the same corpus has the same card.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.documents import read_parquet
from data.shards import open_dataset
from data.urls import host_of

_BINS = 30
_SAMPLES, _SAMPLE_CHARACTERS = 5, 600
_CLUSTERS = 8
_COMMON = 20  # lines of a table of shares


def gather(workdir: Path) -> dict[str, Any]:
    """Everything on the card, JSON-able. Raises FileNotFoundError where there is no curation."""
    manifest = json.loads((workdir / "manifest.json").read_text())
    kept, dropped = _Kept(), _Dropped()
    for split in manifest["splits"]:
        kept.add(open_dataset(workdir / "text" / split))
    for folder in sorted((workdir / "dropped").iterdir()):
        dropped.add(folder)
    scale = _tokens_per_character(workdir, manifest)
    return {
        "stages": [_stage(stage, scale) for stage in manifest["stages"]],
        "splits": manifest["splits"],
        "tokens_per_character": scale,
        "licences": kept.shares("licence"),
        "sources": kept.shares("source"),
        "domains": kept.shares("domain"),
        "dropped_domains": _shares(dropped.domains),
        "lengths": _histogram("characters", kept.lengths, dropped.lengths, log=True),
        "signals": [*_signals(workdir)],
        "kept": kept.samples(),
        "dropped": dropped.samples(),
        "clusters": dropped.largest_clusters(),
        "cluster_sizes": dropped.cluster_sizes(),
    }


class _Kept:
    """Counts and samples of what passed."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {
            "licence": Counter(),
            "source": Counter(),
            "domain": Counter(),
        }
        self.lengths: list[int] = []
        self._sample = Sample(_SAMPLES)

    def add(self, documents: Iterable[dict[str, Any]]) -> None:
        for document in documents:
            size = len(document["text"])
            self.lengths.append(size)
            self.counts["licence"][document["licence"]] += size
            self.counts["source"][document["source"]] += size
            if domain := _domain(document["metadata"]):
                self.counts["domain"][domain] += size
            self._sample.add(document["id"], document["text"], "")

    def shares(self, what: str) -> list[tuple[str, float]]:
        return _shares(self.counts[what])

    def samples(self) -> list[dict[str, str]]:
        return self._sample.rows()


class _Dropped:
    """Counts and samples of what went, by stage and reason, and the clusters of duplicates."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.domains: Counter[str] = Counter()
        self._samples: dict[tuple[str, str], Sample] = {}
        self._clusters: dict[str, list[tuple[str, str]]] = {}

    def add(self, folder: Path) -> None:
        stage = folder.name.removesuffix(".parquet")
        for file in sorted(folder.iterdir()):
            for row in read_parquet(file).to_pylist():
                self._add_row(stage, row)

    def _add_row(self, stage: str, row: dict[str, Any]) -> None:
        reason = row["reason"]
        self.lengths.append(len(row["text"]))
        if domain := _domain(json.loads(row["metadata"])):
            self.domains[domain] += len(row["text"])
        if " duplicate of " in reason:
            reason, kept = reason.split(" of ", 1)
            self._clusters.setdefault(kept, []).append((row["id"], row["text"][:200]))
        kind = ":".join(reason.split(":")[:2])
        self._samples.setdefault((stage, kind), Sample(_SAMPLES)).add(row["id"], row["text"], row["reason"])

    def samples(self) -> list[dict[str, Any]]:
        return [
            {"stage": stage, "reason": reason, "count": sample.count, "rows": sample.rows()}
            for (stage, reason), sample in sorted(
                self._samples.items(), key=lambda item: (item[0][0], -item[1].count, item[0][1])
            )
        ]

    def largest_clusters(self) -> list[dict[str, Any]]:
        largest = sorted(self._clusters.items(), key=lambda item: (-len(item[1]), item[0]))[:_CLUSTERS]
        return [
            {"kept": kept, "size": len(gone) + 1, "gone": sorted(gone)[:_SAMPLES]} for kept, gone in largest
        ]

    def cluster_sizes(self) -> list[tuple[str, int]]:
        """(size, how many clusters have it), sizes in powers of two."""
        counts = Counter(int(np.log2(len(gone) + 1)) for gone in self._clusters.values())
        return [(f"{2**k} to {2 ** (k + 1) - 1}", counts[k]) for k in sorted(counts)]


class Sample:
    """The `size` documents whose ids have the smallest hashes."""

    def __init__(self, size: int):
        self.count, self._size = 0, size
        self._heap: list[tuple[int, str, str, str]] = []

    def add(self, name: str, text: str, reason: str) -> None:
        self.count += 1
        order = -int.from_bytes(
            hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "big"
        )
        if len(self._heap) == self._size and order < self._heap[0][0]:
            return
        item = (order, name, text[:_SAMPLE_CHARACTERS], reason)
        (heapq.heappushpop if len(self._heap) == self._size else heapq.heappush)(self._heap, item)

    def rows(self) -> list[dict[str, str]]:
        return [{"id": n, "text": t, "reason": r} for _, n, t, r in sorted(self._heap, reverse=True)]


def _signals(workdir: Path) -> Iterator[dict[str, Any]]:
    """Of each filter's signals: a histogram of numbers by whether the filter let the document pass, or the shares of
    its strings."""
    import pyarrow as pa

    manifest = json.loads((workdir / "manifest.json").read_text())
    taggers = {folder.name.rsplit("-", 1)[0]: folder for folder in sorted((workdir / "tags").glob("*"))}
    for stage in manifest["stages"]:
        folder = taggers.get(stage["name"].split("-", 1)[-1])
        if folder is None:
            continue
        tables, passed = [], []
        for file in sorted(folder.iterdir()):
            table = read_parquet(file)
            verdicts = workdir / "stages" / stage["name"] / "verdicts" / file.name
            gone = set(read_parquet(verdicts).column("row").to_pylist())
            passed += [row not in gone for row in table.column("row").to_pylist()]
            tables.append(table.drop_columns(["row"]))
        table = pa.concat_tables(tables, promote_options="permissive")
        for name in table.column_names:
            yield from _signal(stage["name"], name, table.column(name).to_pylist(), np.array(passed, bool))


def _signal(stage: str, name: str, values: list[Any], passed: np.ndarray) -> Iterator[dict[str, Any]]:
    known = [value is not None for value in values]
    numbers = [v for v in values if isinstance(v, (int, float))]
    if numbers and len(numbers) == sum(known):
        array = np.array(numbers, float)
        inside = passed[np.array(known, bool)]
        yield {"stage": stage, **_histogram(name, array[inside], array[~inside])}
    elif any(known) and name != "error":
        counts = Counter(str(value) for value in values if value is not None)
        if len(counts) <= 1000:
            yield {"stage": stage, "name": name, "shares": _shares(counts)}


def _histogram(name: str, kept: Any, dropped: Any, log: bool = False) -> dict[str, Any]:
    """Counts of both in common bins between the 0.5th and the 99.5th of a hundred; the outermost take the rest."""
    kept, dropped = np.asarray(kept, float), np.asarray(dropped, float)
    both = np.concatenate([kept, dropped])
    both = both[np.isfinite(both)]
    if not len(both):
        return {"name": name, "edges": [], "kept": [], "dropped": []}
    low, high = np.quantile(both, [0.005, 0.995])
    if log:
        low = max(low, 1)
        edges = np.geomspace(low, max(high, low * 1.01), _BINS + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    counts = [np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0].tolist() for x in (kept, dropped)]
    return {"name": name, "edges": edges.tolist(), "kept": counts[0], "dropped": counts[1], "log": log}


def _stage(stage: dict[str, Any], scale: float | None) -> dict[str, Any]:
    tokens = None if scale is None else round(stage["characters_out"] * scale)
    return {**stage, "tokens_out": tokens}


def _tokens_per_character(workdir: Path, manifest: dict[str, Any]) -> float | None:
    """Of the training split, where it was tokenized."""
    try:
        tokens = json.loads((workdir / "tokens" / "train" / "manifest.json").read_text())["tokens"]
        return tokens / max(manifest["splits"]["train"]["characters"], 1)
    except (OSError, ValueError, KeyError):
        return None


def _shares(counts: Counter[str]) -> list[tuple[str, float]]:
    """The most common with their shares, and what is left as "others"."""
    total = max(sum(counts.values()), 1)
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_COMMON]
    rest = total - sum(count for _, count in common) if counts else 0
    shares = [(name, count / total) for name, count in common]
    return shares + ([("others", rest / total)] if rest > 0 else [])


def _domain(metadata: dict[str, Any]) -> str:
    return host_of(metadata.get("url"))

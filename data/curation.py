"""Curation: sources, then a list of stages on daft, then train, validation and test as text datasets.

    workdir/stages/NN-name/   kept.parquet, stage.json (counts, config hash)
    workdir/dropped/NN-name.parquet   every document that a stage dropped, with its reason
    workdir/text/{train,validation,test}/   text datasets
    workdir/manifest.json     sources with licences, each stage's counts and config hash, documents per split

A stage's output is keyed by a hash of its input and its config, and appears whole; the same command again
redoes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.files import atomic_write
from configs.typed import ConfigError, to_dict
from data.dedup import ExactDedup, MinHashDedup
from data.filters import CodeQuality, GopherQuality, GopherRepetition, Normalise
from data.shards import Dataset, hash_of, is_current, open_dataset, write_dataset
from data.sources import Folder, Jsonl, Parquet, PythonStdlib, Rejected, TextFile, source_state
from data.stages import Log, StageOutput, StageReport, import_daft, reusable, run_stage

_CODE_VERSION = 1  # raise it when a stage's result changes for the same config

DEFAULT_STAGES = (
    Normalise(),
    GopherQuality(),
    GopherRepetition(),
    CodeQuality(),
    ExactDedup(),
    MinHashDedup(),
)


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """What goes in and what is done to it."""

    sources: tuple[TextFile | Jsonl | Parquet | Folder | PythonStdlib, ...] = (PythonStdlib(),)
    stages: tuple[
        Normalise | GopherQuality | GopherRepetition | CodeQuality | ExactDedup | MinHashDedup, ...
    ] = DEFAULT_STAGES
    validation_fraction: float = 0.02  # of documents, by a hash of their id (or group)
    test_fraction: float = 0.02

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty: name at least one")
        if (
            min(self.validation_fraction, self.test_fraction) < 0
            or self.validation_fraction + self.test_fraction >= 1
        ):
            raise ValueError(
                "validation_fraction and test_fraction must not be negative, and leave some to train on"
            )


def curate(config: CurationConfig, workdir: str | os.PathLike, log: Log | None = None) -> dict[str, Dataset]:
    """Runs sources and stages; returns the text datasets by split. Stages that are done are not redone.

    `log` takes a line of progress (default: stderr). Raises ConfigError for sources that are missing.
    """
    log = log or _stderr
    workdir = Path(workdir)
    key, reports = _run_sources(config, workdir, log)
    folder = workdir / "stages" / "00-sources"
    for number, stage in enumerate(config.stages, start=1):
        name = f"{number:02d}-{type(stage).__name__}"
        config_hash = hash_of(type(stage).__name__, to_dict(stage), _CODE_VERSION)
        key = hash_of(key, config_hash)
        target = workdir / "stages" / name
        report = reusable(target, workdir, key)
        if report is None:
            report = run_stage(stage, folder, target, workdir, key, config_hash, log)
        else:
            log(f"{name}: done before, {report.documents_out} documents")
        reports.append(report)
        folder = target
    _remove_stale(workdir, {f"{n:02d}-{type(s).__name__}" for n, s in enumerate(config.stages, start=1)})
    datasets = _write_splits(config, folder, workdir, key, reports)
    atomic_write(workdir / "manifest.json", json.dumps(_manifest(reports, datasets, key), indent=2) + "\n")
    return datasets


def table(workdir: str | os.PathLike) -> str:
    """The counts in a workdir's manifest.json as a table to print."""
    manifest = json.loads((Path(workdir) / "manifest.json").read_text())
    rows = [("stage", "documents", "dropped", "characters", "seconds")]
    for stage in manifest["stages"]:
        dropped = sum(stage["dropped"].values())
        characters = f"{stage['characters_out']:,}"
        rows.append(
            (
                stage["name"],
                f"{stage['documents_out']:,}",
                f"{dropped:,}",
                characters,
                f"{stage['seconds']:.1f}",
            )
        )
    for split, counts in manifest["splits"].items():
        rows.append((split, f"{counts['documents']:,}", "", f"{counts['characters']:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        row[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def split_of(document: dict[str, Any], validation_fraction: float, test_fraction: float) -> str:
    """train, validation or test: by a hash of the document's group, else of its id."""
    group = document["metadata"].get("group") or document["id"]
    point = int.from_bytes(hashlib.sha256(group.encode("utf-8", "replace")).digest()[:8], "big") / 2**64
    if point < validation_fraction:
        return "validation"
    return "test" if point < validation_fraction + test_fraction else "train"


def _run_sources(config: CurationConfig, workdir: Path, log: Log) -> tuple[str, list[StageReport]]:
    state = [[type(source).__name__, to_dict(source), source_state(source)] for source in config.sources]
    key = hash_of(state, _CODE_VERSION)
    target = workdir / "stages" / "00-sources"
    report = reusable(target, workdir, key)
    if report is not None:
        log(f"00-sources: done before, {report.documents_out} documents")
        return key, [report]
    output = StageOutput(target, workdir, key, hash_of(state), log)
    names: Counter[str] = Counter()
    for source in config.sources:
        for item in source.documents():
            name = item.id if isinstance(item, Rejected) else item["id"]
            names[name] += 1
            unique = name if names[name] == 1 else f"{name}~{names[name]}"  # two sources may use one id
            if isinstance(item, Rejected):
                row = [unique, "", item.source, "", "{}", f"source: {item.reason}"]
            else:
                metadata = json.dumps(item["metadata"], ensure_ascii=False)
                row = [unique, item["text"], item["source"], item["licence"], metadata, None]
            row, clean = _valid(row)
            row[-1] = row[-1] if clean or row[-1] else "source: lone surrogates"
            output.add(*([value] for value in row))
    return key, [output.close()]


def _valid(row: list[str | None]) -> tuple[list[str | None], bool]:
    """The row with lone surrogates (in file names, in JSON escapes) replaced, and whether its text had
    none.
    """
    try:
        "".join(value for value in row if value).encode("utf-8")
        return row, True
    except UnicodeEncodeError:
        replaced = [value and value.encode("utf-8", "replace").decode() for value in row]
        return replaced, replaced[1] == row[1]


def _remove_stale(workdir: Path, current: set[str]) -> None:
    """What an earlier list of stages left, and what killed runs left half written."""
    current = current | {"00-sources"}
    for folder in (workdir / "stages").iterdir():
        if folder.name not in current:
            shutil.rmtree(folder, ignore_errors=True)
    for file in (workdir / "dropped").iterdir():
        if file.stem not in current:
            file.unlink()


def _write_splits(
    config: CurationConfig, folder: Path, workdir: Path, key: str, reports: list[StageReport]
) -> dict[str, Dataset]:
    fractions = (config.validation_fraction, config.test_fraction)
    splits = [s for s, share in zip(("train", "validation", "test"), (1.0, *fractions)) if share > 0]
    datasets = {}
    for split in splits:
        datasets[split] = _write_split(split, fractions, folder, workdir, hash_of(key, fractions), reports)
        if len(datasets[split]) == 0:
            raise ConfigError(
                f"no document is left for {split}: {reports[0].documents_out} came in, "
                f"{reports[-1].documents_out} passed all stages. See {workdir / 'dropped'} for the "
                "reasons; give more text, or a larger fraction."
            )
    return datasets


def _write_split(
    split: str,
    fractions: tuple[float, float],
    folder: Path,
    workdir: Path,
    key: str,
    reports: list[StageReport],
) -> Dataset:
    target = workdir / "text" / split
    if is_current(target, key):
        return open_dataset(target)
    count = {"characters": 0, "bytes": 0}
    sources: dict[str, dict[str, Any]] = {}
    stages = [dataclasses.asdict(report) for report in reports]
    dropped = sum((Counter(report.dropped) for report in reports), Counter())
    facts = {"key": key, "split": split, "stages": stages, "dropped": dict(dropped)}
    records = _split_records(folder / "kept.parquet", split, fractions, count, sources)
    return write_dataset(
        target, records, "text", lambda: {**facts, **count, "sources": list(sources.values())}
    )


def _split_records(
    path: Path,
    split: str,
    fractions: tuple[float, float],
    count: dict[str, int],
    sources: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    daft, _ = import_daft()
    for batch in daft.read_parquet(str(path)).sort("id").to_arrow_iter():
        for document in batch.to_pylist():
            document["metadata"] = json.loads(document["metadata"])
            if split_of(document, *fractions) != split:
                continue
            count["characters"] += len(document["text"])
            count["bytes"] += len(document["text"].encode("utf-8"))
            name = document["source"]
            entry = sources.setdefault(name, {"name": name, "licence": document["licence"], "documents": 0})
            entry["documents"] += 1
            yield document


def _manifest(reports: list[StageReport], datasets: dict[str, Dataset], key: str) -> dict[str, Any]:
    splits = {
        split: {"documents": len(dataset)}
        | {k: dataset.manifest[k] for k in ("characters", "bytes", "sha256", "sources")}
        for split, dataset in datasets.items()
    }
    return {"key": key, "stages": [dataclasses.asdict(report) for report in reports], "splits": splits}


def _stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

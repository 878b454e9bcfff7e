"""Curation: sources, then a list of stages on daft, then train, validation and test as text datasets.

    workdir/stages/NN-name/   kept.parquet, stage.json (counts, config hash)
    workdir/dropped/NN-name.parquet   every document that a stage dropped, with its reason
    workdir/text/{train,validation,test}/   text datasets
    workdir/manifest.json     sources with licences, each stage's counts and config hash, documents per split

A stage's output is keyed by a hash of its input and its config, and appears whole; the same command again redoes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.files import atomic_write
from configs.typed import ConfigError, to_dict
from data.dedup import ExactDedup, MinHashDedup
from data.filters import CodeQuality, GopherQuality, GopherRepetition, Normalise
from data.shards import Dataset, hash_of, is_current, open_dataset, write_dataset
from data.sources import Folder, Jsonl, Parquet, PythonStdlib, Rejected, TextFile, source_state

Log = Callable[[str], None]
FilterStage = Normalise | GopherQuality | GopherRepetition | CodeQuality
DedupStage = ExactDedup | MinHashDedup
_COLUMNS = ("id", "text", "source", "licence", "metadata")
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


@dataclasses.dataclass(frozen=True)
class StageReport:
    """What a stage did: documents and characters in and out, and how many went for which reason."""

    name: str
    config_hash: str
    documents_in: int
    documents_out: int
    characters_out: int
    dropped: dict[str, int]
    seconds: float


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
        report = _reusable(target, workdir, key)
        if report is None:
            report = _run_stage(stage, folder, target, workdir, key, config_hash, log)
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
    report = _reusable(target, workdir, key)
    if report is not None:
        log(f"00-sources: done before, {report.documents_out} documents")
        return key, [report]
    output = _Output(target, workdir, key, hash_of(state), log)
    names: Counter[str] = Counter()
    for source in config.sources:
        for item in source.documents():
            name = item.id if isinstance(item, Rejected) else item["id"]
            names[name] += 1
            unique = name if names[name] == 1 else f"{name}~{names[name]}"  # two sources may use one id
            if isinstance(item, Rejected):
                output.drop([unique], [""], [item.source], [""], ["{}"], [f"source: {item.reason}"])
            else:
                text = (
                    item["text"].encode("utf-8", "replace").decode()
                    if _surrogates(item["text"])
                    else item["text"]
                )
                reason = "source: lone surrogates" if text is not item["text"] else None
                metadata = json.dumps(item["metadata"], ensure_ascii=False)
                output.add([unique], [text], [item["source"]], [item["licence"]], [metadata], [reason])
    return key, [output.close()]


def _surrogates(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text) if not text.isascii() else False


def _run_stage(
    stage: FilterStage | DedupStage,
    source: Path,
    target: Path,
    workdir: Path,
    key: str,
    config_hash: str,
    log: Log,
) -> StageReport:
    output = _Output(target, workdir, key, config_hash, log)
    run = _deduplicated if isinstance(stage, DedupStage) else _filtered
    for columns in run(stage, source / "kept.parquet"):
        output.add(*columns)
    return output.close()


def _filtered(stage: FilterStage, path: Path) -> Iterator[list[list[Any]]]:
    """Columns of documents with the reason why each one goes, or None."""
    daft, pa = _daft()
    verdict = pa.struct([("text", pa.large_string()), ("reason", pa.large_string())])

    @daft.func.batch(return_dtype=daft.DataType.from_arrow_type(verdict))
    def judge(text: Any, metadata: Any) -> Any:
        rows = zip(text.to_pylist(), metadata.to_pylist())
        return pa.array([_judge(stage, t, json.loads(m)) for t, m in rows], type=verdict)

    frame = daft.read_parquet(str(path))
    frame = frame.with_column("verdict", judge(daft.col("text"), daft.col("metadata")))
    for batch in frame.to_arrow_iter():
        columns = {name: batch.column(name).to_pylist() for name in (*_COLUMNS, "verdict")}
        verdicts = columns.pop("verdict")
        columns["text"] = [v["text"] for v in verdicts]
        yield [*(columns[name] for name in _COLUMNS), [v["reason"] for v in verdicts]]


def _judge(stage: FilterStage, text: str, metadata: dict[str, Any]) -> dict[str, str | None]:
    if stage.applies_to not in ("any", metadata.get("type", "prose")):
        return {"text": text, "reason": None}
    try:
        text, reason = stage.apply(text)
    except Exception as error:  # a bad document goes with its reason, and the run goes on
        return {"text": text, "reason": f"error: {type(error).__name__}: {error}"}
    return {"text": text, "reason": reason}


def _deduplicated(stage: DedupStage, path: Path) -> Iterator[list[list[Any]]]:
    """Columns of documents with the reason why each one goes, or None."""
    daft, pa = _daft()
    import pyarrow.parquet as pq

    @daft.func.batch(return_dtype=daft.DataType.binary())
    def feature(text: Any) -> Any:
        return pa.array([stage.feature(t) for t in text.to_pylist()], type=pa.large_binary())

    frame = daft.read_parquet(str(path)).select(daft.col("id"), feature(daft.col("text")).alias("feature"))
    features: dict[str, bytes] = {}
    for batch in frame.to_arrow_iter():
        features.update(zip(batch.column("id").to_pylist(), batch.column("feature").to_pylist()))

    def text_of(names: list[str]) -> dict[str, str]:
        wanted = set(names)
        rows = (
            row
            for b in pq.ParquetFile(path).iter_batches(256, columns=["id", "text"])
            for row in b.to_pylist()
        )
        return {row["id"]: row["text"] for row in rows if row["id"] in wanted}

    gone = stage.duplicates(features, text_of)
    kind = "exact" if isinstance(stage, ExactDedup) else "minhash"
    for batch in pq.ParquetFile(path).iter_batches(256, columns=list(_COLUMNS)):
        columns = batch.to_pydict()
        reasons = [f"{kind}: duplicate of {gone[name]}" if name in gone else None for name in columns["id"]]
        yield [*(columns[name] for name in _COLUMNS), reasons]


def _daft() -> tuple[Any, Any]:
    os.environ.setdefault("DO_NOT_TRACK", "true")  # before the import, which reports home
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    import daft
    import pyarrow

    return daft, pyarrow


class _Output:
    """A stage's kept and dropped documents, written as they come; `close` makes them appear."""

    def __init__(self, target: Path, workdir: Path, key: str, config_hash: str, log: Log):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._target, self._key, self._config_hash, self._log = target, key, config_hash, log
        self._dropped_path = workdir / "dropped" / f"{target.name}.parquet"
        self._folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._dropped_path.parent.mkdir(exist_ok=True)
        self._kept_schema = pa.schema([(name, pa.large_string()) for name in _COLUMNS])
        self._dropped_schema = self._kept_schema.append(pa.field("reason", pa.large_string()))
        self._kept = pq.ParquetWriter(self._folder / "kept.parquet", self._kept_schema, compression="zstd")
        self._dropped = pq.ParquetWriter(
            self._folder / "dropped.parquet", self._dropped_schema, compression="zstd"
        )
        self._buffers: dict[Any, list[tuple]] = {self._kept: [], self._dropped: []}
        self._sizes = {self._kept: 0, self._dropped: 0}
        self._reasons: Counter[str] = Counter()
        self._counts = {"in": 0, "out": 0, "characters": 0}
        self._start = self._said = time.monotonic()

    def add(self, *columns: list[Any]) -> None:
        """Documents as columns: id, text, source, licence, metadata, and the reason to drop it or None."""
        for row in zip(*columns, strict=True):
            self._counts["in"] += 1
            if row[-1] is None:
                self._counts["out"] += 1
                self._counts["characters"] += len(row[1])
                self._write(self._kept, row[:-1])
            else:
                # What follows the second colon names one document; counts go by kind of reason.
                self._reasons[
                    row[-1].split(" of ")[0]
                    if " duplicate of " in row[-1]
                    else ":".join(row[-1].split(":")[:2])
                ] += 1
                self._write(self._dropped, row)
        if time.monotonic() - self._said > 2:
            self._say("")

    drop = add

    def _write(self, writer: Any, row: tuple) -> None:
        self._buffers[writer].append(row)
        self._sizes[writer] += len(row[1])
        if self._sizes[writer] > 1 << 22 or len(self._buffers[writer]) >= 1024:
            self._flush(writer)

    def _flush(self, writer: Any) -> None:
        import pyarrow as pa

        schema = self._kept_schema if writer is self._kept else self._dropped_schema
        if self._buffers[writer]:
            columns = list(zip(*self._buffers[writer], strict=True))
            writer.write_table(pa.table([pa.array(c, pa.large_string()) for c in columns], schema=schema))
        self._buffers[writer], self._sizes[writer] = [], 0

    def close(self) -> StageReport:
        for writer in (self._kept, self._dropped):
            self._flush(writer)
            writer.close()
        report = StageReport(
            name=self._target.name,
            config_hash=self._config_hash,
            documents_in=self._counts["in"],
            documents_out=self._counts["out"],
            characters_out=self._counts["characters"],
            dropped=dict(sorted(self._reasons.items())),
            seconds=round(time.monotonic() - self._start, 3),
        )
        content = {"key": self._key, "report": dataclasses.asdict(report)}
        atomic_write(self._folder / "stage.json", json.dumps(content, indent=2) + "\n")
        # The dropped file first: a stage folder that exists says that both are there.
        shutil.rmtree(self._target, ignore_errors=True)
        os.replace(self._folder / "dropped.parquet", self._dropped_path)
        os.rename(self._folder, self._target)
        self._say(f", dropped {sum(self._reasons.values())}\n")
        return report

    def _say(self, end: str) -> None:
        self._said = time.monotonic()
        seconds = max(self._said - self._start, 1e-9)
        self._log(
            f"{self._target.name}: {self._counts['in']} documents, {self._counts['in'] / seconds:,.0f}/s{end}".rstrip()
        )


def _reusable(target: Path, workdir: Path, key: str) -> StageReport | None:
    try:
        content = json.loads((target / "stage.json").read_text())
        done = content["key"] == key and (target / "kept.parquet").is_file()
        done = done and (workdir / "dropped" / f"{target.name}.parquet").is_file()
        return StageReport(**content["report"]) if done else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
    key = hash_of(key, fractions)
    datasets = {}
    for split in splits:
        target = workdir / "text" / split
        if not is_current(target, key):
            count = {"characters": 0, "bytes": 0}
            sources: dict[str, dict[str, Any]] = {}
            records = _split_records(folder / "kept.parquet", split, fractions, count, sources)
            stages = [dataclasses.asdict(report) for report in reports]
            write_dataset(
                target,
                records,
                "text",
                lambda count=count, sources=sources, stages=stages: {
                    "key": key, "split": split, **count, "sources": list(sources.values()), "stages": stages,
                    "dropped": dict(sum((Counter(s["dropped"]) for s in stages), Counter())),
                },
            )  # fmt: skip
        datasets[split] = open_dataset(target)
        if len(datasets[split]) == 0:
            raise ConfigError(
                f"no document is left for {split}: {reports[0].documents_out} came in, {reports[-1].documents_out} passed "
                f"all stages. See {workdir / 'dropped'} for the reasons; give more text, or a larger fraction."
            )
    return datasets


def _split_records(
    path: Path,
    split: str,
    fractions: tuple[float, float],
    count: dict[str, int],
    sources: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    daft, _ = _daft()
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

"""Running one curation stage on daft: documents in, what stays and what goes (with its reason) out as
Parquet.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.files import atomic_write
from data.dedup import ExactDedup, MinHashDedup
from data.filters import CodeQuality, GopherQuality, GopherRepetition, Normalise

Log = Callable[[str], None]
FilterStage = Normalise | GopherQuality | GopherRepetition | CodeQuality
DedupStage = ExactDedup | MinHashDedup
COLUMNS = ("id", "text", "source", "licence", "metadata")  # metadata is JSON


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


def run_stage(
    stage: FilterStage | DedupStage,
    source: Path,
    target: Path,
    workdir: Path,
    key: str,
    config_hash: str,
    log: Log,
) -> StageReport:
    """Puts the documents of the folder `source` through `stage` into the folder `target`, whole or not at
    all.
    """
    output = StageOutput(target, workdir, key, config_hash, log)
    run = _deduplicated if isinstance(stage, DedupStage) else _filtered
    for columns in run(stage, source / "kept.parquet"):
        output.add(*columns)
    return output.close()


def _filtered(stage: FilterStage, path: Path) -> Iterator[list[list[Any]]]:
    """Columns of documents with the reason why each one goes, or None."""
    daft, pa = import_daft()
    verdict = pa.struct([("text", pa.large_string()), ("reason", pa.large_string())])

    @daft.func.batch(return_dtype=daft.DataType.from_arrow_type(verdict))
    def judge(text: Any, metadata: Any) -> Any:
        rows = zip(text.to_pylist(), metadata.to_pylist())
        return pa.array([_judge(stage, t, json.loads(m)) for t, m in rows], type=verdict)

    frame = daft.read_parquet(str(path))
    frame = frame.with_column("verdict", judge(daft.col("text"), daft.col("metadata")))
    for batch in frame.to_arrow_iter():
        columns = {name: batch.column(name).to_pylist() for name in (*COLUMNS, "verdict")}
        verdicts = columns.pop("verdict")
        columns["text"] = [v["text"] for v in verdicts]
        yield [*(columns[name] for name in COLUMNS), [v["reason"] for v in verdicts]]


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
    daft, pa = import_daft()
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
    for batch in pq.ParquetFile(path).iter_batches(256, columns=list(COLUMNS)):
        columns = batch.to_pydict()
        reasons = [f"{kind}: duplicate of {gone[name]}" if name in gone else None for name in columns["id"]]
        yield [*(columns[name] for name in COLUMNS), reasons]


def import_daft() -> tuple[Any, Any]:
    os.environ.setdefault("DO_NOT_TRACK", "true")  # before the import, which reports home
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    import daft
    import pyarrow

    return daft, pyarrow


class StageOutput:
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
        self._kept_schema = pa.schema([(name, pa.large_string()) for name in COLUMNS])
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
                self._reasons[_kind_of(row[-1])] += 1
                self._write(self._dropped, row)
        if time.monotonic() - self._said > 2:
            self._say("")

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
        done, seconds = self._counts["in"], max(self._said - self._start, 1e-9)
        self._log(f"{self._target.name}: {done} documents, {done / seconds:,.0f}/s{end}".rstrip())


def reusable(target: Path, workdir: Path, key: str) -> StageReport | None:
    try:
        content = json.loads((target / "stage.json").read_text())
        done = content["key"] == key and (target / "kept.parquet").is_file()
        done = done and (workdir / "dropped" / f"{target.name}.parquet").is_file()
        return StageReport(**content["report"]) if done else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kind_of(reason: str) -> str:
    """What counts go by: "minhash: duplicate of x" is "minhash: duplicate", "source: bad line: why" "source:
    bad line".
    """
    return reason.split(" of ")[0] if " duplicate of " in reason else ":".join(reason.split(":")[:2])

"""One shard through consecutive stages: the work of one worker.

A stage that changes texts writes the documents anew (a base); those after it only note which rows of that base
went. So a corpus is stored once for each change of its texts, and a changed threshold costs no text.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from configs.typed import ConfigError
from data.curation.layout import SOURCES, Layout, facts_of, mark_done
from data.documents import Document, read_documents, read_table, write_documents, write_table
from data.stage import Filter, Global, Signals, Stage, Transform, cut_text


class Step(NamedTuple):
    """A stage at its place in the list."""

    name: str  # "03-GopherQuality"
    stage: Stage
    hash: str  # of its config, its code's version and the files it reads
    tagger: str = ""  # of a Filter: its name and the hash of what changes its signals
    attached: bool = False  # its signals go into the documents' metadata


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """What a worker gets. `keys[i]` marks the result of `steps[i]` for this shard."""

    layout: Layout
    shard: str
    steps: tuple[Step, ...]  # from the sources on
    keys: tuple[str, ...]
    first: int  # the steps from here on are to be done
    features_of_last: bool  # the last one is Global and not decided yet: only its features are to be made
    tag_dropped: bool  # filters also measure what an earlier filter dropped


class Counts(NamedTuple):
    """What a step did to a shard."""

    documents_in: int
    documents_out: int
    characters_out: int
    dropped: dict[str, int]
    seconds: float


def run_shard(task: ShardTask) -> dict[str, Counts]:
    """Does what is not done yet; gives the counts of each step that decided."""
    counts, rows = {}, None
    for i in range(task.first, len(task.steps)):
        step, key = task.steps[i], task.keys[i]
        features_only = task.features_of_last and i == len(task.steps) - 1
        mark = task.layout.done(step.name, task.shard, "features" if features_only else "done")
        facts = facts_of(mark, key)
        if facts is None:
            rows = rows if rows is not None else Rows.load(task, i)
            began = time.monotonic()
            if features_only:
                _write_features(step, rows, task)
                mark_done(mark, key)
                continue
            dropped = _STEPS[_kind(step.stage)](step, rows, task)
            done = rows.counts(dropped, time.monotonic() - began)
            mark_done(mark, key, counts=done._asdict())
        elif not features_only:
            done = Counts(**facts["counts"])
            rows = None if rows is None else Rows.load(task, i + 1)
        if not features_only:
            counts[step.name] = done
    return counts


class Rows:
    """A base's documents, which of them are still there, and which are within reach of the present filters."""

    def __init__(self, documents: list[Document], base: str):
        self.came_in, self._filtering = 0, False
        self.rebase(documents, base)

    @classmethod
    def load(cls, task: ShardTask, upto: int) -> Rows:
        """What the steps before number `upto` left."""
        base = max(i for i in range(upto) if _changes_text(task.steps[i]))
        rows = cls(read_documents(task.layout.documents(task.steps[base].name, task.shard)), task.keys[base])
        for step in task.steps[base + 1 : upto]:
            rows.enter(step.stage)
            if step.attached:
                rows.attach(step, _read_tags(task.layout.tags(step.tagger, task.shard), rows))
            for row in read_table(task.layout.verdicts(step.name, task.shard)).column("row").to_pylist():
                rows.alive[row] = False
        return rows

    def enter(self, stage: Stage) -> None:
        """A filter reaches all rows that were there before the first filter of its run."""
        self.came_in = sum(self.alive)
        if isinstance(stage, Filter) and not self._filtering:
            self.reach = list(self.alive)
        self._filtering = isinstance(stage, Filter)

    def rebase(self, documents: list[Document], base: str) -> None:
        self.documents, self.base = documents, base
        self.alive = [True] * len(documents)
        self.reach = self.alive

    def attach(self, step: Step, tags: Sequence[Signals | None]) -> None:
        """Puts a filter's signals into the metadata: `tags`, by the filter's name."""
        name = type(step.stage).__name__
        for row, signals in enumerate(tags):
            if signals is not None:
                document = self.documents[row]
                metadata = document["metadata"]
                known = metadata.get("tags", {}) | {name: dict(signals)}
                self.documents[row] = {**document, "metadata": {**metadata, "tags": known}}

    def counts(self, dropped: dict[str, int], seconds: float) -> Counts:
        left = [d for d, alive in zip(self.documents, self.alive) if alive]
        return Counts(self.came_in, len(left), sum(len(d["text"]) for d in left), dropped, round(seconds, 3))


def _filter(step: Step, rows: Rows, task: ShardTask) -> dict[str, int]:
    stage = cast(Filter, step.stage)
    rows.enter(stage)
    tags = _tags(step, stage, rows, task)
    if step.attached:
        rows.attach(step, tags)
    gone: dict[int, str] = {}
    for row, signals in enumerate(tags):
        if rows.alive[row] and signals is not None:
            reason = f"error: {signals['error']}" if signals.get("error") else stage.reason(signals)
            if reason is not None:
                gone[row] = reason
    return _write_verdicts(step, rows, task, gone)


def _tags(step: Step, stage: Filter, rows: Rows, task: ShardTask) -> list[dict[str, Any] | None]:
    """Signals by row, None where the stage does not look; those of an earlier run are taken from its file."""
    path = task.layout.tags(step.tagger, task.shard)
    known = _read_tags(path, rows)
    reach = rows.reach if task.tag_dropped else rows.alive
    missing = [
        i
        for i, document in enumerate(rows.documents)
        if reach[i] and known[i] is None and stage.wants(document)
    ]
    if missing:
        found = _signals(stage, [rows.documents[i] for i in missing])
        for i, signals in zip(missing, found, strict=True):
            known[i] = dict(signals)
    if missing or not path.exists():
        tagged = {i: signals for i, signals in enumerate(known) if signals is not None}
        names = list(dict.fromkeys(name for signals in tagged.values() for name in signals))
        columns = {name: [signals.get(name) for signals in tagged.values()] for name in names}
        write_table(path, {"row": _int32(list(tagged)), **columns}, {"base": rows.base})
    return known


def _read_tags(path: Path, rows: Rows) -> list[dict[str, Any] | None]:
    """Signals by row from a file, as far as it is of the same documents."""
    table = read_table(path)
    known: list[dict[str, Any] | None] = [None] * len(rows.documents)
    if table is not None and (table.schema.metadata or {}).get(b"base") == rows.base.encode():
        for row in table.to_pylist():
            known[row.pop("row")] = row
    return known


def _signals(stage: Filter, documents: list[Document]) -> list[Signals]:
    try:
        return stage.signals_of(documents)
    except ConfigError:  # of the stage, not of a document
        raise
    except Exception:  # one of them is bad: find it, and the others go on
        return [_signals_of_one(stage, document) for document in documents]


def _signals_of_one(stage: Filter, document: Document) -> Signals:
    try:
        return stage.signals_of([document])[0]
    except ConfigError:
        raise
    except Exception as error:  # a bad document goes with its reason, and the run goes on
        return {"error": f"{type(error).__name__}: {error}"}


def _transform(step: Step, rows: Rows, task: ShardTask) -> dict[str, int]:
    stage = cast(Transform, step.stage)
    rows.enter(stage)
    kept, gone, reasons = [], [], []
    for document, alive in zip(rows.documents, rows.alive):
        if not alive:
            continue
        try:
            changed, reason = stage.edit(document) if stage.wants(document) else (document, None)
        except Exception as error:  # a bad document goes with its reason, and the run goes on
            changed, reason = document, f"error: {type(error).__name__}: {error}"
        if reason is None:
            kept.append(changed)
        else:
            gone.append(document)
            reasons.append(reason)
    return _write_base(step, rows, task, kept, gone, reasons)


def _decided(step: Step, rows: Rows, task: ShardTask) -> dict[str, int]:
    """What a Global stage decided is done to the shard."""
    stage = cast(Global, step.stage)
    rows.enter(stage)
    table = read_table(task.layout.decisions(step.name, task.shard))
    decisions = [] if table is None else table.to_pylist()
    if not stage.cuts:
        return _write_verdicts(step, rows, task, {d["row"]: d["reason"] for d in decisions})
    by_row = {d["row"]: d for d in decisions}
    kept, gone, reasons = [], [], []
    for row, (document, alive) in enumerate(zip(rows.documents, rows.alive)):
        decision = by_row.get(row)
        if not alive:
            continue
        text, reason = document["text"], None
        if decision is not None:
            text, reason = cut_text(text, json.loads(decision["cut"])), decision["reason"]
            if reason is None and not text.strip():
                reason = f"{type(stage).__name__}: nothing left"
        if reason is None:
            kept.append({**document, "text": text})
        else:
            gone.append(document)
            reasons.append(reason)
    return _write_base(step, rows, task, kept, gone, reasons)


def _write_features(step: Step, rows: Rows, task: ShardTask) -> None:
    stage = cast(Global, step.stage)
    rows.enter(stage)
    wanted = [
        (row, document)
        for row, (document, alive) in enumerate(zip(rows.documents, rows.alive))
        if alive and stage.wants(document)
    ]
    table = stage.features(wanted)
    columns = {name: table.column(name) for name in table.column_names}
    write_table(task.layout.features(step.name, task.shard), columns)


def _write_base(
    step: Step, rows: Rows, task: ShardTask, kept: list[Document], gone: list[Document], reasons: list[str]
) -> dict[str, int]:
    write_documents(task.layout.documents(step.name, task.shard), kept)
    write_documents(task.layout.dropped(step.name, task.shard), gone, reasons)
    rows.rebase(kept, task.keys[[s.name for s in task.steps].index(step.name)])
    return _counted(reasons)


def _write_verdicts(step: Step, rows: Rows, task: ShardTask, gone: dict[int, str]) -> dict[str, int]:
    numbers = sorted(gone)
    reasons = [gone[row] for row in numbers]
    write_documents(
        task.layout.dropped(step.name, task.shard), [rows.documents[row] for row in numbers], reasons
    )
    write_table(task.layout.verdicts(step.name, task.shard), {"row": _int32(numbers), "reason": reasons})
    for row in numbers:
        rows.alive[row] = False
    return _counted(reasons)


def _counted(reasons: Sequence[str]) -> dict[str, int]:
    return dict(sorted(Counter(map(kind_of, reasons)).items()))


def kind_of(reason: str) -> str:
    """What counts go by: "minhash: duplicate of x" is "minhash: duplicate", "source: bad line: why" "source:
    bad line".
    """
    return reason.split(" of ")[0] if " duplicate of " in reason else ":".join(reason.split(":")[:2])


def _changes_text(step: Step) -> bool:
    stage = step.stage
    return step.name == SOURCES or isinstance(stage, Transform) or (isinstance(stage, Global) and stage.cuts)


def _kind(stage: Stage) -> type:
    return next(kind for kind in _STEPS if isinstance(stage, kind))


def _int32(values: list[int]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.int32())


_STEPS = {Filter: _filter, Transform: _transform, Global: _decided}

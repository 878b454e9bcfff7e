"""One shard through consecutive stages: the work of one worker.

A stage that changes texts writes the documents again (a base); those after it only note which rows of that base
went. So a corpus is stored once for each change of its texts, and a changed threshold costs no text.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from configs.typed import ConfigError
from data.curation.child import careful, tell
from data.curation.layout import SOURCES, Layout, facts_of, mark_done
from data.documents import Document, read_documents, read_table, write_documents, write_table
from data.stage import Filter, Global, Signals, Stage, Transform, cut_text

Place = tuple[str, int]  # a step's name and a row


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
    killers: tuple[tuple[Place, str], ...] = ()  # documents that no stage may look at, and why

    @property
    def label(self) -> str:
        names = [step.name for step in self.steps[self.first :]]
        return f"shard {self.shard} of {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "")

    def without(self, place: Place, reason: str) -> ShardTask:
        return dataclasses.replace(self, killers=(*self.killers, (place, reason)))


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
    judged = [(row, signals) for row, signals in enumerate(tags) if rows.alive[row] and signals is not None]

    def judge(signals: Signals) -> str | None:
        return f"error: {signals['error']}" if signals.get("error") else stage.reason(signals)

    gone: dict[int, str] = {}
    for (row, _), (reason, error) in zip(judged, _each(step, task, judged, judge)):
        if reason is not None or error is not None:
            gone[row] = reason or f"error: {error}"
    return _write_verdicts(step, rows, task, gone)


def _guarded(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """(what the function returns, None), or (None, what it raised): a bad document goes, and the run goes on."""
    try:
        return function(*arguments), None
    except ConfigError:  # of the stage, not of a document
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _each(
    step: Step, task: ShardTask, rows: Sequence[tuple[int, Any]], function: Callable[[Any], Any]
) -> Iterator[tuple[Any, str | None]]:
    """`function` of the second of each (row, value), guarded; or why the row is known to kill."""
    killers = dict(task.killers)
    for row, value in rows:
        place = (step.name, row)
        if place in killers:
            yield None, killers[place]
        else:
            tell(place)
            yield _guarded(function, value)


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
        found = _signals(step, task, [(i, rows.documents[i]) for i in missing])
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


def _signals(step: Step, task: ShardTask, documents: list[tuple[int, Document]]) -> list[Signals]:
    stage = cast(Filter, step.stage)
    if not careful():
        found, error = _guarded(stage.signals_of, [document for _, document in documents])
        if error is None:
            return found
    one_by_one = _each(step, task, documents, lambda document: stage.signals_of([document])[0])
    return [signals if error is None else {"error": error} for signals, error in one_by_one]


def _transform(step: Step, rows: Rows, task: ShardTask) -> dict[str, int]:
    stage = cast(Transform, step.stage)
    rows.enter(stage)
    kept, gone, reasons = [], [], []
    alive = [(row, d) for row, (d, alive) in enumerate(zip(rows.documents, rows.alive)) if alive]

    def edit(document: Document) -> tuple[Document, str | None]:
        return stage.edit(document) if stage.wants(document) else (document, None)

    for (_, document), (edited, error) in zip(alive, _each(step, task, alive, edit)):
        changed, reason = edited if error is None else (document, f"error: {error}")
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
    decisions += [
        {"row": row, "reason": why, "cut": "[]"} for row, why in _feature_errors(step, task).items()
    ]
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
    table, errors = _features(step, task, wanted)
    columns = {name: table.column(name) for name in table.column_names}
    noted = {"errors": json.dumps(errors)} if errors else None
    write_table(task.layout.features(step.name, task.shard), columns, noted)


def _features(
    step: Step, task: ShardTask, documents: list[tuple[int, Document]]
) -> tuple[Any, dict[int, str]]:
    """The table of what is compared, and why documents are not in it, by row."""
    import pyarrow as pa

    stage = cast(Global, step.stage)
    if not careful():
        table, error = _guarded(stage.features, documents)
        if error is None:
            return table, {}
    rows = iter([row for row, _ in documents])
    one_by_one = _each(step, task, documents, lambda document: stage.features([(next(rows), document)]))
    tables, errors = [], {}
    for (row, _), (table, error) in zip(documents, one_by_one):
        if error is None:
            tables.append(table)
        else:
            errors[row] = f"error: {error}"
    return pa.concat_tables(tables or [stage.features([])]).combine_chunks(), errors


def _feature_errors(step: Step, task: ShardTask) -> dict[int, str]:
    """What `_write_features` noted of documents that can't be compared: they go."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(task.layout.features(step.name, task.shard)).metadata or {}
    return {int(row): why for row, why in json.loads(metadata.get(b"errors", b"{}")).items()}


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

"""Sources, then a list of stages, then train, validation and test as text datasets.

    workdir/stages/, tags/, dropped/        see data/curation/layout.py
    workdir/text/{train,validation,test}/   text datasets
    workdir/manifest.json                   sources with licences, each stage's counts and config hash
    workdir/timings.json                    seconds of work by stage; all else has the same bytes in every run
    workdir/running.{sources,shards}        the file or shard that is under way, while one process does all

Stages run shard by shard in passes that end where a stage has to see all documents. A shard's result is keyed by a
hash of its input and of the stages' configs, and appears whole, so the same command again redoes nothing, and
goes on wherever it was killed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from configs.files import atomic_write, remove_leftovers
from configs.typed import ConfigError, to_dict
from data import storage
from data.curation.config import CurationConfig
from data.curation.ingest import Part, ingest, parts, remove_stale
from data.curation.layout import SOURCES, Layout, facts_of, mark_done
from data.curation.shard import Counts, ShardTask, Step, run_shard
from data.curation.splits import write_splits
from data.curation.workers import map_items, stop_idle
from data.documents import write_table
from data.shards import Dataset, hash_of
from data.sources import file_state
from data.stage import Corpus, Decision, Filter, Global, Stage

_CODE_VERSION = 2  # raised when a stage's result changes for the same config
_ALL = "all"  # where a mark stands for all shards
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class StageReport:
    """What a stage did: documents and characters in and out, and how many went for which reason."""

    name: str
    config_hash: str
    documents_in: int
    documents_out: int
    characters_out: int
    dropped: dict[str, int]


def curate(config: CurationConfig, workdir: str | os.PathLike, log: Log | None = None) -> dict[str, Dataset]:
    """Runs sources and stages; returns the text datasets by split. What is done is not redone.

    `log` takes a line of progress (default: stderr). Raises ConfigError for sources that are missing, and
    where nothing is left to train on.
    """
    workdir = storage.local(workdir, "the workdir")
    remove_leftovers(workdir)
    run = _Run(config, Layout(Path(workdir)), log or _stderr)
    try:
        run.read_sources()
        run.run_stages()
    finally:
        stop_idle()
    reports = run.reports()
    datasets = write_splits(config, run.tasks(len(run.steps)), reports, Path(workdir), run.log)
    key = hash_of([task.keys[-1] for task in run.tasks(len(run.steps))])
    manifest = {"key": key, "stages": [dataclasses.asdict(r) for r in reports], "splits": _splits(datasets)}
    atomic_write(Path(workdir) / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    if "train" not in datasets:
        raise ConfigError(
            f"no document is left for train: {reports[0].documents_out} came in, {reports[-1].documents_out} passed "
            f"all stages. {Path(workdir) / 'dropped'} has the others, with the reasons."
        )
    return datasets


def table(workdir: str | os.PathLike) -> str:
    """The counts in a workdir's manifest.json as a table to print."""
    manifest = json.loads((Path(workdir) / "manifest.json").read_text())
    timings = json.loads((Path(workdir) / "timings.json").read_text())
    rows = [("stage", "documents", "dropped", "characters", "seconds")]
    for stage in manifest["stages"]:
        dropped = f"{sum(stage['dropped'].values()):,}"
        seconds = f"{timings.get(stage['name'], 0):.1f}"
        counts = f"{stage['documents_out']:,}", dropped, f"{stage['characters_out']:,}"
        rows.append((stage["name"], *counts, seconds))
    for split, counts in manifest["splits"].items():
        rows.append((split, f"{counts['documents']:,}", "", f"{counts['characters']:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        row[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


class _Run:
    """One curation as it goes: the steps, the shards with the keys of their results so far, and the counts."""

    def __init__(self, config: CurationConfig, layout: Layout, log: Log):
        self.config, self.layout, self.log = config, layout, log
        self.steps = (Step(SOURCES, Stage(), ""), *steps_of(config))
        for step in self.steps:
            for note in step.stage.notes():
                log(f"{step.name}: {note}")
        self.keys: dict[str, list[str]] = {}  # by shard
        self.counts: dict[str, dict[str, Counts]] = {}  # by stage and shard

    def read_sources(self) -> None:
        found = parts(self.config.sources, self.layout, self.config.shard_megabytes << 20)
        self.counts[SOURCES] = {}
        if self.config.limit is None:
            self._read(found)
        else:
            found = self._read_limited(found, self.config.limit)
        stages, taggers = {step.name for step in self.steps}, {step.tagger for step in self.steps}
        remove_stale(self.layout, stages, taggers, {*self.keys, _ALL, *(part.name for part in found)})
        _Progress(self.log, SOURCES, 0, "").end(self.counts[SOURCES].values())

    def _read(self, found: Sequence[Part]) -> list[int]:
        """Reads parts; how many documents each gave, those that were rejected among them."""
        megabytes = sum(file_state(path)[0] for part in found for path in part.paths) / 1e6
        progress = _Progress(self.log, SOURCES, len(found), "files or groups of files")
        counts = []
        for part, shards in zip(found, self._map(ingest, found, megabytes, "running.sources"), strict=True):
            self.counts[SOURCES] |= shards
            self.keys |= {name: [hash_of(part.key, name)] for name in shards}
            counts.append(sum(c.documents_in for c in shards.values()))
            progress.add(counts[-1])
        return counts

    def _read_limited(self, found: Sequence[Part], limit: int) -> list[Part]:
        """Reads `limit` documents of each source, part after part until there are so many; which parts."""
        queues: dict[Any, list[Part]] = {}
        for part in sorted(found, key=lambda part: part.paths):
            queues.setdefault((part.source.label(), part.twin), []).append(part)
        left, read = dict.fromkeys(queues, limit), []
        while now := [(name, queues[name].pop(0)) for name in queues if queues[name] and left[name] > 0]:
            batch = [part.limited(left[name]) for name, part in now]
            for (name, _), count in zip(now, self._read(batch), strict=True):
                left[name] -= count
            read += batch
        return read

    def run_stages(self) -> None:
        """Passes over the shards; each ends with the features of a Global stage, or with the last stage."""
        first = 1
        for last in [i for i, s in enumerate(self.steps) if isinstance(s.stage, Global)]:
            self._pass(first, last, features_of_last=True)
            self._resolve(last)
            first = last
        self._pass(first, len(self.steps) - 1, features_of_last=False)

    def tasks(self, count: int, first: int = 0, features_of_last: bool = False) -> list[ShardTask]:
        """A task for each shard with the first `count` steps."""
        return [
            ShardTask(
                self.layout,
                shard,
                self.steps[:count],
                tuple(self.keys[shard]),
                first,
                features_of_last,
                self.config.tag_dropped,
            )
            for shard in sorted(self.keys)
        ]

    def reports(self) -> list[StageReport]:
        reports, timings = [], {}
        for step in self.steps:
            counts = self.counts[step.name].values()
            dropped = sum((Counter(c.dropped) for c in counts), Counter())
            came, left = sum(c.documents_in for c in counts), sum(c.documents_out for c in counts)
            characters = sum(c.characters_out for c in counts)
            reports.append(
                StageReport(step.name, step.hash, came, left, characters, dict(sorted(dropped.items())))
            )
            timings[step.name] = round(sum(c.seconds for c in counts), 3)
        atomic_write(self.layout.workdir / "timings.json", json.dumps(timings, indent=2) + "\n")
        return reports

    def _map(
        self,
        function: Callable[[Any], Any],
        items: Iterable[Any],
        megabytes: float,
        running: str | None = None,
        what: str = "",
    ) -> Iterator[Any]:
        path = None if running is None else self.layout.workdir / running
        return map_items(self.config.workers, function, list(items), megabytes, path, what)

    def _megabytes(self) -> float:
        """About what all shards hold."""
        return sum(c.characters_out for c in self.counts[SOURCES].values()) / 1e6

    def _pass(self, first: int, last: int, features_of_last: bool) -> None:
        """Steps first to last of every shard. A Global step at `first` has its decisions already."""
        if last < first:
            return
        for keys in self.keys.values():
            while len(keys) <= last:
                keys.append(hash_of(keys[-1], self.steps[len(keys)].hash))
        names = [step.name for step in self.steps[first : last + 1]]
        label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        progress = _Progress(self.log, label, len(self.keys), "shards")
        tasks = self.tasks(last + 1, first, features_of_last)
        for name in names:
            self.counts.setdefault(name, {})
        for task, counts in zip(
            tasks, self._map(run_shard, tasks, self._megabytes(), "running.shards"), strict=True
        ):
            for name, count in counts.items():
                self.counts[name][task.shard] = count
            progress.add(max((c.documents_in for c in counts.values()), default=0))
        for name in names[: len(names) - features_of_last]:
            _Progress(self.log, name, 0, "").end(self.counts[name].values())

    def _resolve(self, number: int) -> None:
        """A Global stage's decision, and new keys for what each shard becomes by it."""
        step, shards = self.steps[number], tuple(sorted(self.keys))
        stage = cast(Global, step.stage)
        key = hash_of([(shard, self.keys[shard][number]) for shard in shards])
        for shard in shards:
            self.keys[shard][number] = hash_of(self.keys[shard][number], key)
        mark = self.layout.done(step.name, _ALL, "decisions")
        facts, present = facts_of(mark, key), _sizes(stage.outputs())
        if facts is not None:
            gone = [path for path, size in facts.get("outputs", {}).items() if present.get(path) != size]
            if not gone:
                return
            self.log(f"{step.name}: {', '.join(gone)} is gone or not as it was written: written again")
        began = time.monotonic()
        folder = self.layout.decisions(step.name, _ALL).parent
        scratch = folder.with_name("scratch")
        for old in (folder, scratch):
            shutil.rmtree(old, ignore_errors=True)
        scratch.mkdir(parents=True)
        base = max(i for i in range(number) if i == 0 or changes_texts(self.steps[i].stage))
        corpus = Corpus(
            shards,
            lambda shard: self.layout.features(step.name, shard),
            lambda shard: self.layout.documents(self.steps[base].name, shard),
            scratch,
            functools.partial(self._map, what=step.name),
            self.log,
        )
        total = 0
        for shard, decisions in stage.resolve(corpus):
            total += len(decisions)
            _write_decisions(self.layout.decisions(step.name, shard), decisions)
        shutil.rmtree(scratch, ignore_errors=True)
        mark_done(mark, key, outputs=_sizes(stage.outputs()))
        self.log(f"{step.name}: {total:,} decisions, {time.monotonic() - began:.1f} s")


class _Progress:
    """Lines of progress with rate and time left, at most one every two seconds."""

    def __init__(self, log: Log, label: str, total: int, unit: str):
        self._log, self._label, self._total, self._unit = log, label, total, unit
        self._done = self._documents = 0
        self._began = self._said = time.monotonic()

    def add(self, documents: int) -> None:
        self._done += 1
        self._documents += documents
        now = time.monotonic()
        if now - self._said > 2 and self._done < self._total:
            self._said, seconds = now, now - self._began
            left = seconds / self._done * (self._total - self._done)
            rate = f"{self._documents:,} documents, {self._documents / seconds:,.0f}/s"
            self._log(f"{self._label}: {self._done}/{self._total} {self._unit}, {rate}, {_clock(left)} left")

    def end(self, counts: Iterable[Counts]) -> None:
        counts = list(counts)
        documents, seconds = sum(c.documents_in for c in counts), sum(c.seconds for c in counts)
        dropped = documents - sum(c.documents_out for c in counts)
        rate = documents / max(seconds, 1e-3)
        self._log(f"{self._label}: {documents:,} documents, {rate:,.0f}/s, dropped {dropped:,}")


def steps_of(config: CurationConfig) -> list[Step]:
    """The stages of a config in order, each with its name and the hashes of what its results depend on."""
    steps = []
    for number, stage in config.numbered_stages():
        name, settings = type(stage).__name__, to_dict(stage)
        files = [(path, file_state(path)) for path in stage.files()]
        attached = name in config.tags_in_metadata
        module = type(stage).__module__
        kind = name if module.startswith("data.") else f"{module}:{name}"  # of one's own
        config_hash = hash_of(kind, settings, stage.version, files, attached, _CODE_VERSION)
        tagger = ""
        if isinstance(stage, Filter):
            measured: Any = {field: settings[field] for field in ("applies_to", *stage.measured_by)}
            measured = measured if kind == name else [kind, measured]
            tagger = f"{name}-{hash_of(measured, stage.version, files, _CODE_VERSION)[:8]}"
        steps.append(Step(f"{number:02d}-{name}", stage, config_hash, tagger, attached))
    return steps


def changes_texts(stage: Stage) -> bool:
    """Whether documents are written again after it."""
    return stage.cuts if isinstance(stage, Global) else not isinstance(stage, Filter)


def _sizes(paths: Sequence[str]) -> dict[str, int]:
    """Bytes of those files that are there."""
    return {path: os.path.getsize(path) for path in paths if os.path.exists(path)}


def _write_decisions(path: Path, decisions: Sequence[Decision]) -> None:
    ordered = sorted(decisions, key=lambda decision: decision.row)
    if len({d.row for d in ordered}) != len(ordered):
        raise ValueError(f"{path}: two decisions for one row")
    columns = {
        "row": [d.row for d in ordered],
        "reason": [d.reason for d in ordered],
        "cut": [json.dumps(d.cut) for d in ordered],
    }
    write_table(path, columns)


def _splits(datasets: dict[str, Dataset]) -> dict[str, Any]:
    return {
        split: {"documents": len(dataset)}
        | {k: dataset.manifest[k] for k in ("characters", "bytes", "sha256", "sources")}
        for split, dataset in datasets.items()
    }


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""`python -m data.thresholds --config=NEW.py --workdir=runs/corpus`: what other thresholds would drop, in seconds.

The workdir is that of a finished `python -m data`, and NEW.py a config with the same stages and other thresholds.
Nothing is measured: the signals are those under workdir/tags. Writes thresholds.html and thresholds.json: of each
filter what it drops now and would drop, by domain and language, with samples of documents with another verdict.
"""

from __future__ import annotations

import html
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import configs
from configs.files import atomic_write
from configs.loading import load
from configs.typed import ConfigError
from data.card.facts import Sample
from data.corpus import CorpusConfig
from data.curation.layout import SOURCES, Layout
from data.curation.run import changes_texts, steps_of
from data.curation.shard import Step
from data.documents import read_documents, read_table
from data.stage import Filter
from data.urls import host_of

_SAMPLES, _COMMON = 5, 12


def try_thresholds(old: CorpusConfig, new: CorpusConfig, workdir: Path) -> list[dict[str, Any]]:
    """Of each filter: documents measured, dropped now and then, by reason, domain and language, and samples.

    Raises ConfigError where the configs differ in more than thresholds, or nothing was measured yet.
    """
    before, after = ((Step(SOURCES, Filter(), ""), *steps_of(config.curation)) for config in (old, new))
    if [step.name for step in before] != [step.name for step in after]:
        names = ", ".join(step.name for step in before[1:])
        raise ConfigError(f"the stages of {workdir} are {names}: give a config with the same ones.")
    found = []
    for number, (now, then) in enumerate(zip(before, after)):
        if now.tagger and now.tagger != then.tagger:
            raise ConfigError(
                f"{then.name}: more than thresholds changed, which has to be measured: run python -m data."
            )
        if now.tagger:
            base = max(i for i in range(number) if i == 0 or changes_texts(before[i].stage))
            found.append(_of_filter(Layout(workdir), before[base].name, now, then))
    return found


def _of_filter(layout: Layout, base: str, now: Step, then: Step) -> dict[str, Any]:
    counts: dict[str, Counter[str]] = {
        f"{when} {what}": Counter() for when in ("now", "then") for what in ("reason", "domain", "language")
    }
    samples = {what: Sample(_SAMPLES) for what in ("would go", "would stay")}
    changed, measured = Counter[str](), 0
    for document, signals in _tagged(layout, base, now.tagger):
        measured += 1
        reasons = [_reason(cast(Filter, step.stage), signals) for step in (now, then)]
        metadata = document["metadata"]
        language = signals.get("language") or metadata.get("tags", {}).get("Language", {}).get(
            "language", "not measured"
        )
        for when, reason in zip(("now", "then"), reasons):
            if reason is not None:
                counts[f"{when} reason"][reason] += 1
                counts[f"{when} domain"][host_of(metadata.get("url")) or "none"] += 1
                counts[f"{when} language"][str(language)] += 1
        if (reasons[0] is None) != (reasons[1] is None):
            what = "would go" if reasons[0] is None else "would stay"
            changed[what] += 1
            why = f"{reasons[0] or reasons[1]}; {json.dumps(signals, ensure_ascii=False, default=str)}"
            samples[what].add(document["id"], document["text"], why)
    tables = {name: count.most_common(_COMMON) for name, count in counts.items()}
    totals = {when: counts[f"{when} reason"].total() for when in ("now", "then")}
    rows = {what: sample.rows() for what, sample in samples.items()}
    return {
        "filter": now.name,
        "measured": measured,
        **totals,
        "changed": dict(changed),
        **tables,
        "samples": rows,
    }


def _tagged(layout: Layout, base: str, tagger: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(document, signals) of all that were measured."""
    files = sorted((layout.workdir / "tags" / tagger).glob("*.parquet"))
    if not files:
        raise ConfigError(
            f"{layout.workdir / 'tags' / tagger} is not there: run python -m data with this workdir first."
        )
    for file in files:
        rows = read_table(file).to_pylist()
        numbers = [row.pop("row") for row in rows]
        yield from zip(read_documents(layout.documents(base, file.stem), numbers), rows, strict=True)


def _reason(stage: Filter, signals: dict[str, Any]) -> str | None:
    return "error" if signals.get("error") else stage.reason(signals)


def page(found: list[dict[str, Any]], name: str) -> str:
    """The page; all text from documents is escaped."""
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Thresholds: {html.escape(name)}</title><style>{_STYLE}</style>"
    ]
    parts.append(f"<h1>Thresholds: {html.escape(name)}</h1>")
    for each in found:
        parts.append(
            f"<h2>{html.escape(each['filter'])}</h2><p>{each['measured']:,} measured; dropped now {each['now']:,}, "
            f"then {each['then']:,}; {each['changed'].get('would go', 0):,} more would go, "
            f"{each['changed'].get('would stay', 0):,} more would stay.</p><div>"
        )
        for what in ("reason", "domain", "language"):
            now, then = dict(each[f"now {what}"]), dict(each[f"then {what}"])
            names = list(dict.fromkeys([*then, *now]))
            cells = "".join(
                f"<tr><td>{html.escape(n)}<td>{now.get(n, 0):,}<td>{then.get(n, 0):,}" for n in names
            )
            parts.append(f"<table><tr><th>{what}<th>now<th>then{cells}</table>")
        parts.append("</div>")
        for what, rows in each["samples"].items():
            for row in rows:
                parts.append(
                    f"<details><summary>{what}: {html.escape(row['id'])}</summary><p>{html.escape(row['reason'])}</p>"
                    f"<pre>{html.escape(row['text'])}</pre></details>"
                )
    return "\n".join(parts)


_STYLE = (
    "body{font:15px/1.5 system-ui;max-width:70em;margin:2em auto;padding:0 1em}div{display:flex;gap:2em;flex-wrap:wrap}"
    "td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}"
    "pre{white-space:pre-wrap}"
)


def main(config: CorpusConfig, workdir: Path) -> int:
    if not (workdir / "config.json").is_file():
        raise ConfigError(f"{workdir} has no config.json: it is no workdir of python -m data.")
    found = try_thresholds(load(CorpusConfig, workdir / "config.json"), config, workdir)
    atomic_write(workdir / "thresholds.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    atomic_write(workdir / "thresholds.html", page(found, workdir.name))
    for each in found:
        print(
            f"{each['filter']}: {each['measured']:,} measured, dropped now {each['now']:,}, then {each['then']:,}"
        )
    print(f"\nWhat changes, and samples: {workdir / 'thresholds.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(configs.run(main, CorpusConfig, description=__doc__ or ""))

"""`python -m data.decontaminate report|model`: a finished corpus, or a model, against benchmarks.

    python -m data.decontaminate report --corpus runs/corpus/text/train --benchmarks math.jsonl:question --out=runs/dirt
    python -m data.decontaminate model --model=runs/1b --items=math.jsonl:question --others=new.txt --out=runs/dirt

A benchmark is FILE, or FILE:FIELD,FIELD with the fields that hold its text (default: all text of an item): JSONL, JSON,
CSV, Parquet, or text with an item a line. `report` writes report.json and report.html; `model` writes model.json.
To keep benchmarks out of a corpus, put the stage Decontaminate or DecontaminateSpans into its curation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.commands import Commands
from configs.files import atomic_write
from configs.typed import ConfigError
from data import storage
from data.callables import named
from data.decontaminate.index import Benchmark, read_items
from data.decontaminate.report import corpus_report, membership_report, write_report
from data.shards import MANIFEST, open_dataset
from data.sources.files import BadLine, json_rows
from data.tokenizer.texts import read_texts


def main(argv: list[str] | None = None) -> int:
    return _commands().run(argv)


def _commands() -> Commands:
    commands = Commands("python -m data.decontaminate", __doc__)
    report = commands.add("report", _report, "A corpus against benchmarks: report.json and report.html.")
    report.add_argument("--corpus", nargs="+", required=True, help="text datasets, files or folders")
    report.add_argument("--benchmarks", nargs="+", required=True, help="FILE or FILE:FIELD,FIELD")
    report.add_argument(
        "--scores", help='JSONL of {"benchmark", "item", "score"}: how a model did on each item'
    )
    report.add_argument("--ngram_words", type=int, default=13)
    report.add_argument("--min_words", type=int, default=8, help="of an item; a shorter one counts as a line")
    report.add_argument("--out", required=True, help="the folder to write")
    model = commands.add("model", _model, "A model against benchmarks (Min-K%% Prob): model.json.")
    model.add_argument("--model", required=True, help="run, checkpoint or Hugging Face folder")
    model.add_argument("--items", nargs="+", required=True, help="benchmarks")
    model.add_argument("--others", nargs="+", required=True, help="paraphrases, or items that are surely new")
    model.add_argument("--scorer", default="evals.text_scorer:token_scorer", help="module:function")
    model.add_argument("--share", type=float, default=0.2, help="of the tokens, the unlikeliest")
    model.add_argument("--out", required=True, help="the folder to write")
    return commands


def _report(options: argparse.Namespace) -> int:
    report = corpus_report(
        _documents(options.corpus),
        [benchmark_of(given) for given in options.benchmarks],
        ngram_words=options.ngram_words,
        min_words=options.min_words,
        scores=_scores(options.scores) if options.scores else None,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    write_report(report, storage.local(options.out, "--out"))
    print(f"{report['documents']:,} documents, {report['documents_with_hits']:,} with a hit")
    for row in report["benchmarks"]:
        print(
            f"{row['name']}: {row['hit']:,} of {row['items']:,} items hit ({row['hit_rate']:.2%}), "
            f"{row['covered']:,} for the most part; {row['not_looked_for']:,} texts too short to look for, "
            f"{row['broken_lines']:,} broken lines"
        )
    print(f"{Path(options.out) / 'report.html'}")
    return 0


def _model(options: argparse.Namespace) -> int:
    items, others = (
        [item.text for given in files for item in read_items(benchmark_of(given)) if item.text.strip()]
        for files in (options.items, options.others)
    )
    out = storage.local(options.out, "--out")
    found = membership_report(named(options.scorer)(options.model), items, others, options.share)
    atomic_write(out / "model.json", json.dumps(found, indent=2) + "\n")
    print(
        f"area under ROC {found['area_under_roc']:.4f} (0.5: the model knows the items no better than the others)"
    )
    return 0


def benchmark_of(given: str) -> Benchmark:
    """FILE or FILE:FIELD,FIELD."""
    path, _, fields = given.rpartition(":")
    if not path or "/" in fields:
        path, fields = given, ""
    storage.check_exists(path)
    return Benchmark(path, tuple(filter(None, fields.split(","))))


def _documents(paths: list[str]) -> Iterator[dict[str, Any]]:
    unread: Counter[str] = Counter()
    for path in paths:
        if (Path(path) / MANIFEST).is_file():
            yield from open_dataset(path)
        else:
            yield from (
                {"id": f"{path}/{i}", "text": text}
                for i, text in enumerate(read_texts([path], unread=unread))
            )
    for reason, count in unread.most_common():
        print(f"left out: {count:,} with {reason!r}", file=sys.stderr)


def _scores(path: str) -> dict[tuple[str, int], float]:
    found = {}
    for number, row in json_rows(path):
        try:
            if isinstance(row, BadLine):
                raise ValueError(row.why)
            found[str(row["benchmark"]), int(row["item"])] = float(row["score"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}, line {number + 1}: {error}; wanted benchmark, item and score"
            ) from error
    return found


if __name__ == "__main__":
    sys.exit(main())

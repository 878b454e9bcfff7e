"""datatrove's heuristic filters on a JSONL file, called by benchmarks/filters.py in its virtual environment.

`decide` prints each filter's verdict on each document (with FineWeb's settings: examples/fineweb.py), `run` times the
chain as its own executor runs it.
"""

import json
import sys
import time
from pathlib import Path

import datatrove.pipeline.filters.fineweb_quality_filter as fineweb
import datatrove.pipeline.filters.gopher_quality_filter as quality
import datatrove.pipeline.filters.gopher_repetition_filter as repetition
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def filters(words, writer=lambda name: None, fineweb_settings=False):
    if words == "white_space":  # the definition of a word that both sides can have
        for module in (fineweb, quality, repetition):
            module.split_into_words = lambda text, language: text.split()
    c4 = {"filter_no_terminal_punct": False} if fineweb_settings else {"min_num_sentences": -1}
    return {
        "GopherRepetition": GopherRepetitionFilter(exclusion_writer=writer("1")),
        "GopherQuality": GopherQualityFilter(exclusion_writer=writer("2")),
        "C4Lines": C4QualityFilter(exclusion_writer=writer("3"), **c4),
        "FineWebQuality": FineWebQualityFilter(exclusion_writer=writer("4")),
    }


def decide(path, words, settings=""):
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        found = {}
        for name, each in filters(words, fineweb_settings=settings == "fineweb").items():
            document = Document(text=row["text"], id=row["id"])
            try:
                verdict = each.filter(document)
            except ZeroDivisionError:
                verdict = (False, "ZeroDivisionError")
            found[name] = [
                None if verdict is True else verdict[1],
                document.text if name == "C4Lines" else None,
            ]
        print(json.dumps({"id": row["id"], "verdicts": found}))


def run(folder, words, out, workers):
    writer = lambda name: JsonlWriter(f"{out}/dropped/{name}")
    steps = list(filters(words, writer).values())
    began = time.perf_counter()
    pipeline = [JsonlReader(folder), *steps, JsonlWriter(f"{out}/kept")]
    LocalPipelineExecutor(
        pipeline, tasks=len(list(Path(folder).iterdir())), workers=int(workers), logging_dir=f"{out}/logs"
    ).run()
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    {"decide": decide, "run": run}[sys.argv[1]](*sys.argv[2:])

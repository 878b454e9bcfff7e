"""The chain of heuristic filters beside datatrove's: the same decisions where definitions agree, and documents
a second.

    python -m benchmarks.filters [--texts=FILE.jsonl ...] [--documents=6000] [--rounds=3]

Gopher's repetition and quality, C4's lines and FineWeb's quality, on the texts of the Python library and of the given
JSONL files, repeated up to the number of documents; two processes each, reading and writing included. The decisions
are compared filter by filter, with words by white space (where both sides mean the same by everything but what is
listed) and with datatrove's own words (spaCy's).
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.venvs import python_of

DATATROVE = ("datatrove[processing]==0.10.1", "spacy", "datasketch==2.0.0", "orjson", "xxhash<4")
PEER = Path(__file__).parent / "peers" / "datatrove_filters.py"
SHARDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", nargs="*", default=[], help='JSONL files (also .gz) with a field "text"')
    parser.add_argument("--documents", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    python = python_of("datatrove", *DATATROVE)
    with tempfile.TemporaryDirectory() as folder:
        texts = _texts(args.texts)
        for words in ("white_space", "tokens"):
            _compare(texts, words, python, Path(folder))
        _time(texts, args, python, Path(folder))


def _texts(files: list[str]) -> list[str]:
    from data.sources import Jsonl, PythonStdlib, Rejected

    sources = [PythonStdlib(code=False), *map(Jsonl, files)]
    found = (item for source in sources for item in source.documents() if not isinstance(item, Rejected))
    return [item["text"] for item in found if item["text"].strip()]


def _stages(words: str) -> list:
    from data.filters import C4Lines, FineWebQuality, GopherQuality, GopherRepetition

    return [
        GopherRepetition(definition="datatrove", language="en", words=words),
        GopherQuality(definition="datatrove", language="en", words=words, bullets=("\u2022", "-")),
        C4Lines(language="en", end_marks=(".", "?", "!", '"', "'"), min_sentences=-1, count_citations=True),
        FineWebQuality(language="en", words=words),
    ]


def _compare(texts: list[str], words: str, python: Path, folder: Path) -> None:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    command = [str(python), str(PEER), "decide", str(path), words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    theirs = [json.loads(line)["verdicts"] for line in done.stdout.splitlines()]
    print(
        f"\nDecisions on {len(texts)} documents, words: {words if words != 'tokens' else 'ours tokens, theirs spaCy'}"
    )
    for stage in _stages(words):
        name = type(stage).__name__
        unlike, kinds, same_text = [], Counter(), 0
        for text, verdicts in zip(texts, theirs, strict=True):
            changed, ours = stage.apply(text)
            reason, their_text = verdicts[name]
            if (ours is None) != (reason is None):
                unlike.append(reason)
                kinds[f"ours {ours}, theirs {reason}"] += 1
            same_text += ours is None and reason is None and changed == their_text
        line = f"  {name:18} {len(texts) - len(unlike):5} equal, {len(unlike):3} not"
        print(line + (f"; {same_text} texts equal" if name == "C4Lines" else ""))
        for kind, count in kinds.most_common(6):
            print(f"      {count:4}  {kind}")


def _time(texts: list[str], args: argparse.Namespace, python: Path, folder: Path) -> None:
    raw = folder / "raw"
    raw.mkdir()
    rows = itertools.islice(itertools.cycle(texts), args.documents)
    lines = [json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(rows)]
    for shard in range(SHARDS):
        (raw / f"{shard}.jsonl").write_text("".join(lines[shard::SHARDS]))
    size = sum(map(len, lines))
    times: dict[str, list[float]] = {"ours": [], "datatrove": [], "datatrove, words by white space": []}
    for _ in range(args.rounds):
        times["ours"].append(_ours(raw, folder / "ours"))
        for name, words in (("datatrove", "tokens"), ("datatrove, words by white space", "white_space")):
            shutil.rmtree(folder / "theirs", ignore_errors=True)
            command = [str(python), str(PEER), "run", str(raw), words, str(folder / "theirs"), "2"]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True
            )
            times[name].append(json.loads(done.stdout.splitlines()[-1])["seconds"])
    print(f"\n{args.documents} documents, {size / 1e6:.1f} MB, two processes, medians of {args.rounds}")
    ours = statistics.median(times["ours"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(
            f"  {name:34} {args.documents / median:8,.0f} documents/s   ours is {median / ours:.2f} times as fast"
        )


def _ours(raw: Path, out: Path) -> float:
    """The same chain as a command of its own, with the start of its workers."""
    shutil.rmtree(out, ignore_errors=True)
    program = f"""
from data.curation import CurationConfig, Workers, curate
from data.filters import *
from data.sources import Folder
curate(CurationConfig(sources=(Folder({str(raw)!r}),), validation_fraction=0.0, test_fraction=0.0,
       stages=(GopherRepetition(words="tokens"), GopherQuality(words="tokens"), C4Lines(), FineWebQuality()),
       shard_megabytes=4, workers=Workers(processes=2, min_megabytes=8)), {str(out)!r}, log=lambda line: None)
"""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

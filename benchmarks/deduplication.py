"""Near deduplication beside datatrove's and datasketch's, on made documents whose true similarities are known.

    python -m benchmarks.deduplication [--documents=20000] [--words=300] [--rounds=3] [--templated] [--alone]

Half of the documents are copies with words changed, so that their true Jaccard similarity (runs of five words) to the
original lies anywhere from 0.5 to 1. Recall is the share of copies at 0.8 and more that are found in one cluster with
their original; precision the share of what goes whose similarity to something that stays, through its cluster, was
truly 0.8. ours and datatrove run with two processes and datasketch with its one; reading and writing are in the time.
`--templated` makes all originals pages of one template, each two of them at about 0.78, just below the threshold.
`--alone` runs ours only and prints its peak memory, e.g. with --documents=1000000 --words=100.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.filters import DATATROVE
from benchmarks.venvs import python_of

PEERS = Path(__file__).parent / "peers"
BANDS, ROWS = 18, 6
SHARDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--templated", action="store_true", help="pages of one template")
    parser.add_argument("--alone", action="store_true", help="ours alone, with its peak memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        truth = make(raw, args.documents, args.words, args.templated)
        runs = {"ours": lambda: _ours(raw, Path(folder) / "ours")}
        if not args.alone:
            python = str(python_of("datatrove", *DATATROVE))
            numbers = [str(BANDS), str(ROWS)]
            theirs = Path(folder) / "theirs"
            trove = [python, str(PEERS / "datatrove_minhash.py"), str(raw), str(theirs), *numbers, "2"]
            sketch = [python, str(PEERS / "datasketch_minhash.py"), str(raw), str(theirs / "kept"), *numbers]
            runs |= {"datatrove": lambda: _peer(trove, theirs), "datasketch": lambda: _peer(sketch, theirs)}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        gone: dict[str, set[str]] = {}
        for _ in range(1 if args.alone else args.rounds):
            for name, run in runs.items():
                took, gone[name] = run()
                seconds[name].append(took)
        _print(args, truth, seconds, gone)


def make(folder: Path, documents: int, words: int, templated: bool) -> dict[str, tuple[str, float]]:
    """Writes JSONL files; gives {id of a copy: (id of its original, their true similarity)}."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    files = [open(folder / f"{i}.jsonl", "w") for i in range(SHARDS)]
    truth = {}
    for i in range(documents // 2):
        original = [_word(rng.randrange(50_000)) for _ in range(words)]
        if templated:
            own = [_word(rng.randrange(10**9)) for _ in range(round(words * 0.11))]
            original = [*own, *(f"t{_word(n)}" for n in range(words - len(own)))]
        copy = list(original)
        # A changed word spoils five runs in both texts, so c changes leave about (n - 5c) / (n + 5c) of them.
        similarity = rng.uniform(0.5, 1.0)
        changes = round(words * (1 - similarity) / (1 + similarity) / 5)
        for at in rng.sample(range(words), changes):
            copy[at] = "x" + _word(rng.randrange(50_000))
        truth[f"{i}-copy"] = (f"{i}-a", _jaccard(original, copy))
        for name, text in ((f"{i}-a", original), (f"{i}-copy", copy)):
            row = json.dumps({"id": name, "text": " ".join(text)})
            print(row, file=files[rng.randrange(SHARDS)])
    for file in files:
        file.close()
    return truth


def _word(number: int) -> str:
    """Letters alone: datatrove takes all numbers for the same."""
    letters = "w"
    while number:
        number, digit = divmod(number, 26)
        letters += chr(97 + digit)
    return letters


def _jaccard(a: list[str], b: list[str]) -> float:
    x, y = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b))
    return len(x & y) / len(x | y)


def _ours(raw: Path, out: Path) -> tuple[float, set[str]]:
    import pyarrow.parquet as pq

    shutil.rmtree(out, ignore_errors=True)
    program = f"""
import os
from data.curation import CurationConfig, Workers, curate
from data.dedup import MinHashDedup
from data.sources import Jsonl
curate(CurationConfig(sources=tuple(Jsonl(os.path.join({str(raw)!r}, f), id_field="id") for f in
os.listdir({str(raw)!r})),
       validation_fraction=0.0, test_fraction=0.0, stages=(MinHashDedup(),),
       workers=Workers(processes=2)), {str(out)!r})
"""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    seconds = time.perf_counter() - began
    table = pq.read_table(out / "dropped" / "01-MinHashDedup.parquet", columns=["id"])
    return seconds, {name.split("/")[1] for name in table.column("id").to_pylist()}


def _peer(command: list[str], folder: Path) -> tuple[float, set[str]]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"], set(found["gone"])


def _print(args: argparse.Namespace, truth: dict, seconds: dict, gone: dict) -> None:
    above = {name for name, (_, similarity) in truth.items() if similarity >= 0.8}
    kind = "pages of one template" if args.templated else "documents"
    print(f"{args.documents:,} {kind} of {args.words} words; {len(above):,} copies at 0.8 and more")
    ours = statistics.median(seconds["ours"])
    for name, times in seconds.items():
        found = {copy for copy, (original, _) in truth.items() if {copy, original} & gone[name]}
        recall = len(found & above) / len(above)
        precision = len(found & above) / max(len(found), 1)
        median = statistics.median(times)
        rate = args.documents / median
        print(
            f"  {name:11} {rate:8,.0f} documents/s  recall {recall:.4f}  precision {precision:.4f}"
            f"  ours is {median / ours:.2f} times as fast"
        )
    if args.alone:
        own = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"  peak memory of the largest of our processes: {own:.2f} GiB")


if __name__ == "__main__":
    main()

"""Training byte-level BPE beside `tokenizers` and rustbpe, on the same text with the same pattern, turn by turn.

    python -m benchmarks.tokenizer_training [--vocab_size=32768] [--megabytes=100] [--rounds=3] [--peers rustbpe]

The text is that of the shared data folder (books, encyclopaedia, web pages, manuals in eight languages, Python), again
and again with some words changed until there is enough; without that folder, the Python files that lie on the machine.
Every run is a process of its own. The figures are medians. CPU seconds and the peak memory of ours are those of all its
processes together. A vocabulary in common near 100% says that the work was the same.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("rustbpe==0.1.0", "tokenizers==0.23.3")
_DOCUMENT = 20_000  # characters


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peers", nargs="+", choices=("tokenizers", "rustbpe"), default=["tokenizers", "rustbpe"]
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    work(options) if options.worker else compare(options)


def compare(options: argparse.Namespace) -> None:
    from benchmarks.venvs import python_of
    from data.tokenizer.pretokenizers import pattern

    peer = str(python_of("tokenizers", *PEERS))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.jsonl"
        size = write_texts(file, options.megabytes * 10**6)
        common = [f"--vocab_size={options.vocab_size}", f"--pattern={pattern('ours').patterns[0]}"]
        script = [peer, str(ROOT / "benchmarks/peers/tokenizer_trainers.py")]
        commands = {
            "Crucible": [
                sys.executable,
                "-m",
                "benchmarks.tokenizer_training",
                f"--worker={file}",
                common[0],
            ],
            **{name: [*script, name, str(file), *common] for name in options.peers},
        }
        answers: dict[str, list[dict]] = {name: [] for name in commands}
        for round in range(options.rounds):
            for name, command in commands.items():
                done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
                answers[name].append(json.loads(done.stdout))
                print(
                    f"round {round + 1}: {name} {answers[name][-1]['seconds']:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
    report(options, size, answers)


def report(options: argparse.Namespace, size: int, answers: dict[str, list[dict]]) -> None:
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in answers.items()}
    ours = set(answers["Crucible"][0]["tokens"])
    same = all(run["tokens"] == answers["Crucible"][0]["tokens"] for run in answers["Crucible"])
    print(f"{options.vocab_size:,} tokens from {size / 1e6:.1f} MB, {options.rounds} rounds")
    print(
        f"{'':<12} {'s':>7} {'MB/s':>6} {'ours takes':>11} {'CPU s':>7} {'peak MB':>8}  vocabulary in common"
    )
    for name, runs in answers.items():
        peak = statistics.median(run["peak_bytes"] for run in runs) / 1e6
        cpu = statistics.median(run["cpu_seconds"] for run in runs)
        shared = len(ours & set(runs[0]["tokens"])) / len(ours)
        print(
            f"{name:<12} {seconds[name]:>7.1f} {size / 1e6 / seconds[name]:>6.1f} "
            f"{seconds['Crucible'] / seconds[name]:>10.2f}x {cpu:>7.1f} {peak:>8.0f}  {shared:.1%}"
        )
    fastest = min(time for name, time in seconds.items() if name != "Crucible")
    print(f"ours / the fastest peer: {seconds['Crucible'] / fastest:.2f} (wanted: at most 1.5)")
    print(f"every round of ours gave the same vocabulary: {'yes' if same else 'NO'}")


def work(options: argparse.Namespace) -> None:
    from data import SpecialTokens, train_tokenizer

    with open(options.worker, encoding="utf-8") as file:
        texts = (json.loads(line) for line in file)
        start = time.perf_counter()
        special = SpecialTokens((), bos=None, eos=(), pad=None, chat_template=None)
        tokenizer = train_tokenizer("bpe", texts, options.vocab_size, special)
        seconds = time.perf_counter() - start
    own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(used.ru_utime + used.ru_stime for used in (own, workers))
    peak = 1024 * (own.ru_maxrss + (os.cpu_count() or 1) * workers.ru_maxrss)
    tokens = [base64.b64encode(tokenizer.bytes_of(i)).decode() for i in range(tokenizer.vocab_size)]
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, "tokens": tokens}))


def write_texts(path: Path, size: int) -> int:
    """Writes documents as JSONL until they have `size` bytes of UTF-8; returns how many they have."""
    written = repeat = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            for text in _texts():
                for start in range(0, len(text), _DOCUMENT):
                    document = _varied(text[start : start + _DOCUMENT], repeat)
                    file.write(json.dumps(document) + "\n")
                    written += len(document.encode("utf-8"))
                    if written >= size:
                        return written
            repeat += 1
    return written


def _varied(text: str, repeat: int) -> str:
    """The text with one in sixteen of its longer words turned around, other words in each repetition."""
    if repeat == 0:
        return text

    def turned(word: re.Match) -> str:
        return word[0][::-1] if zlib.crc32(f"{repeat} {word[0]}".encode()) % 16 == 0 else word[0]

    return re.sub(r"\w{4,}", turned, text)


def _texts() -> Iterator[str]:
    folder = Path(os.environ.get("CRUCIBLE_SHARED", ROOT.parent / "shared")) / "data" / "pretrain-text"
    if not folder.is_dir():
        paths = sysconfig.get_paths()
        files = sorted({f for key in ("stdlib", "purelib") for f in Path(paths[key]).rglob("*.py")})
        yield from (file.read_text(encoding="utf-8", errors="replace") for file in files)
        return
    for file in sorted(folder.rglob("*")):
        if file.name.endswith(".tar.gz"):
            with tarfile.open(file) as archive:
                members = [member for member in archive.getmembers() if member.isfile()]
                yield from (archive.extractfile(m).read().decode("utf-8", "replace") for m in members)
        elif file.name.endswith(".txt.gz"):
            yield gzip.decompress(file.read_bytes()).decode("utf-8", "replace")
        elif file.suffix == ".txt":
            yield file.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    main()

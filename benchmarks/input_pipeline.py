"""Whether the input pipeline keeps up: tokens/s and memory of `make_batches` beside what a train step eats.

    python -m benchmarks.input_pipeline [--tokens=20000000] [--length=4096] [--rows=32] [--seconds=10]

Three made-up datasets (log-normal document lengths) are mixed in two phases, packed best-fit and by concatenation,
and read by one host and by one of two. Each line is a process of its own, and its memory is what it had at most beyond
what it had after its imports. The appetite of a TPU host is chips * peak * MFU / (6 * parameters).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CPU_STEP = 700.0  # tokens/s of `python -m benchmarks.train_step` on two cores: 25 million parameters
V5P_CHIPS, V5P_PEAK, MFU, PARAMETERS = 4, 459e12, 0.5, 8e9  # of one host; bfloat16 FLOP/s of a chip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of the three datasets together")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=32, help="of a global batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="that each line is measured for")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options, *options.worker)
        return
    v5p = V5P_CHIPS * V5P_PEAK * MFU / (6 * PARAMETERS)
    print(f"a step here eats {CPU_STEP:,.0f} tokens/s; a v5p host with 8B at 50% MFU eats {v5p:,.0f}")
    print(
        f"{'packing':<10} {'hosts':>5} {'tokens/s':>12} {'x a step here':>14} {'x a v5p host':>13} {'MB':>6} "
        f"{'ready after s':>13} {'padding':>9} {'cut':>8}"
    )
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.tokens)
        for packing in ("best_fit", "concat"):
            for hosts in (1, 2):
                got = measure(options, folder, packing, hosts)
                rate = got["tokens_per_second"]
                print(
                    f"{packing:<10} {hosts:>5} {rate:>12,.0f} {rate / CPU_STEP:>14,.0f} {rate / (v5p):>13,.1f} "
                    f"{got['megabytes']:>6.0f} {got['ready']:>13.2f} {got['padding']:>9.3%} {got['cut']:>8.2%}",
                    flush=True,
                )


def write(folder: Path, tokens: int) -> None:
    import numpy as np

    from data.shards import TokenRecord, write_dataset

    rng = np.random.default_rng(0)
    for name, share in zip("abc", (0.6, 0.3, 0.1)):
        lengths = rng.lognormal(6.5, 1.1, int(tokens * share / 1200)).astype(np.int64) + 1
        write_dataset(folder / name, (TokenRecord(rng.integers(0, 32_000, n)) for n in lengths), "tokens")


def measure(options: argparse.Namespace, folder: str, packing: str, hosts: int) -> dict:
    arguments = [f"--length={options.length}", f"--rows={options.rows}", f"--seconds={options.seconds}"]
    command = [sys.executable, "-m", "benchmarks.input_pipeline", *arguments]
    run = subprocess.run(
        [*command, "--worker", folder, packing, str(hosts)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def work(options: argparse.Namespace, folder: str, packing: str, hosts: str) -> None:
    """Reads as host 0 of `hosts` for some seconds; answers in JSON. Its share of a batch counts alone."""
    import grain  # noqa: F401  (its memory is not the pipeline's)

    from data import Mixture, Phase, Reading, make_batches

    a, b, c = (str(Path(folder) / name) for name in "abc")
    mixture = Mixture((Phase({a: 5, b: 3, c: 2}), Phase({a: 1, b: 1, c: 8}, 20)))
    before, start = peak_megabytes(), time.monotonic()
    reading = Reading(packing=packing)  # type: ignore[arg-type]
    batches = make_batches(mixture, options.rows, options.length, 0, reading, process_count=int(hosts))
    next(batches)
    ready, tokens, begun = time.monotonic() - start, 0, time.monotonic()
    while time.monotonic() - begun < options.seconds:
        tokens += int((next(batches)["segment_ids"] > 0).sum())
    rate = tokens / (time.monotonic() - begun)
    waste = [source.packer.waste() for source in batches.opened.sources.values()]
    print(
        json.dumps(
            {
                "tokens_per_second": rate,
                "megabytes": peak_megabytes() - before,
                "ready": ready,
                "padding": sum(w.padding for w in waste) / len(waste),
                "cut": sum(w.cut for w in waste) / len(waste),
            }
        )
    )


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()

"""Work on many prompts in shards, each a JSONL file that appears when it is whole and outlives a kill."""

from __future__ import annotations

import collections
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs import atomic_write
from train.metrics import clock

Row = dict[str, Any]


def in_shards(
    folder: Path, key: str, count: int, size: int, make: Callable[[range], Sequence[Row]], title: str
) -> Iterator[Row]:
    """The rows of prompts 0 to count - 1 in order, `size` prompts a shard; those of finished shards are read.

    Args:
      key: a hash of all that decides the rows. Shards lie in a folder of this name, so other settings never meet them.
      make: the rows of some prompts, a pure function of their numbers.
    """
    files, began, made = [], time.monotonic(), 0
    for start in range(0, count, size):
        numbers = range(start, min(start + size, count))
        files.append(folder / key / f"{start // size:05d}.jsonl")
        if files[-1].exists():
            continue
        rows = make(numbers)
        atomic_write(files[-1], lines(rows))
        made += len(numbers)
        spent = time.monotonic() - began
        left = clock(spent / made * (count - numbers.stop))
        dropped = sum(row["dropped"] is not None for row in rows)
        said = f"{made / spent:.1f} prompts/s, {dropped} of these {len(rows)} dropped, left {left}"
        print(f"{title}: {numbers.stop}/{count} prompts, {said}", flush=True)
    for file in files:
        with open(file, encoding="utf-8") as opened:
            yield from map(json.loads, opened)


def dropped_counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows were dropped for which reason, by reason."""
    counts = collections.Counter(row["dropped"] for row in rows if row["dropped"] is not None)
    return dict(sorted(counts.items()))


def print_dropped(report: Row) -> None:
    for reason, count in report["dropped"].items():
        print(f"  dropped: {count:,} x {reason}")


def lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def seed_of(seed: int, prompt: int, stage: int) -> int:
    """The seed of what is sampled for a prompt in a stage, whatever else is sampled beside it."""
    return int(np.random.SeedSequence([seed, prompt, stage]).generate_state(1, np.uint32)[0])

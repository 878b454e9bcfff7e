"""Stages that drop documents in which items of benchmarks stand, or cut these out: Brown et al. 2020
(arXiv:2005.14165, appendix C), with runs of 13 words and 200 characters around them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from configs.typed import ConfigError
from data import storage
from data.decontaminate.index import LINE_WORDS, Benchmark, Index, open_index, read_words
from data.documents import DocumentType
from data.stage import Filter, Signals, Transform, Verdict, cut_text

# The line that BIG-bench asks for in every file of a benchmark, and that others took over.
CANARY = r"canary\s+guid\s+[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@dataclasses.dataclass(frozen=True)
class Decontaminate(Filter):
    """Drops a document with `min_hits` runs of `ngram_words` words of a benchmark, or a whole item that is shorter,
    that are at least `min_share` of its own runs; and one with a canary. An item below `min_words` counts as a line."""

    benchmarks: tuple[Benchmark, ...] = ()
    ngram_words: int = 13  # 8 to 13 in the literature
    min_words: int = 8  # shorter items are in innocent texts too: they count only as a line of their own
    min_hits: int = 1
    min_share: float = 0.0
    canaries: tuple[str, ...] = ()  # more strings that mark a benchmark, besides BIG-bench's
    examples: int = 3  # spans that the signals show
    applies_to: DocumentType = "any"

    measured_by: ClassVar[tuple[str, ...]] = (
        "benchmarks",
        "ngram_words",
        "min_words",
        "canaries",
        "examples",
    )

    def __post_init__(self):
        _check(self.ngram_words, self.min_words)

    def files(self) -> tuple[str, ...]:
        return _files(self.benchmarks, type(self).__name__)

    def notes(self) -> tuple[str, ...]:
        return notes(open_index(self.benchmarks, self.ngram_words, self.min_words))

    def signals(self, text: str) -> Signals:
        index = open_index(self.benchmarks, self.ngram_words, self.min_words)
        words = read_words(text)
        hits = index.hits(words)
        names = sorted({index.items[i].benchmark for _, _, items in hits for i in items.tolist()})
        runs = max(len(words.hashes) - self.ngram_words + 1, 1)
        spans = joined([words.span(at, n) for at, n, _ in hits])
        shown = [{"start": a, "stop": b, "text": text[a:b][:300]} for a, b in spans[: self.examples]]
        return {
            "hits": len(hits),
            "share": min(len(hits) / runs, 1.0),
            "benchmarks": ", ".join(names),
            "spans": json.dumps(shown, ensure_ascii=False),
            "canary": canary_in(text, self.canaries),
        }

    def reason(self, signals: Signals) -> str | None:
        if signals["canary"]:
            return "decontaminate: canary"
        if signals["hits"] >= self.min_hits and signals["share"] >= self.min_share:
            return f"decontaminate: benchmark: {signals['benchmarks']}"
        return None


@dataclasses.dataclass(frozen=True)
class DecontaminateSpans(Transform):
    """Cuts runs of words of a benchmark with `margin` characters on both sides. A document that is left with less than
    `min_characters`, or cut at more than `max_cuts` places, goes whole, and so does one with a canary."""

    benchmarks: tuple[Benchmark, ...] = ()
    ngram_words: int = 13
    min_words: int = 8
    margin: int = 200
    min_characters: int = 200
    max_cuts: int = 10
    canaries: tuple[str, ...] = ()
    applies_to: DocumentType = "any"

    def __post_init__(self):
        _check(self.ngram_words, self.min_words)

    def files(self) -> tuple[str, ...]:
        return _files(self.benchmarks, type(self).__name__)

    def notes(self) -> tuple[str, ...]:
        return notes(open_index(self.benchmarks, self.ngram_words, self.min_words))

    def apply(self, text: str) -> Verdict:
        if canary_in(text, self.canaries):
            return text, "decontaminate: canary"
        spans = found_spans(open_index(self.benchmarks, self.ngram_words, self.min_words), text)
        if not spans:
            return text, None
        wide = joined([(max(a - self.margin, 0), min(b + self.margin, len(text))) for a, b in spans])
        left = cut_text(text, wide)
        if len(wide) > self.max_cuts:
            return text, "decontaminate: too many cuts"
        return (left, None) if len(left) >= self.min_characters else (text, "decontaminate: little left")


def notes(index: Index) -> tuple[str, ...]:
    """What of the benchmarks is not looked for."""
    lines = []
    for name, count in index.counts.items():
        text = f"{name}: {count['items']:,} items"
        if count["broken"]:
            text += f"; {count['broken']:,} lines are broken and not read"
        if count["short"]:
            text += f"; {count['short']:,} texts of fewer than {LINE_WORDS} words are not looked for"
        lines.append(text)
    return tuple(lines)


def found_spans(index: Index, text: str) -> list[tuple[int, int]]:
    """(start, stop) in characters of all that a text shares with items, overlapping runs as one."""
    words = read_words(text)
    return joined([words.span(at, n) for at, n, _ in index.hits(words)])


def joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans that these cover together, ascending."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def canary_in(text: str, more: Sequence[str]) -> str:
    """The canary that a text holds, "" for none."""
    small = text.lower()
    if "canary" in small and (match := re.search(CANARY, small)):
        return match.group()
    return next((canary for canary in more if canary.lower() in small), "")


def _check(ngram_words: int, min_words: int) -> None:
    if not 1 <= min_words <= ngram_words:
        raise ValueError(
            f"min_words={min_words}, ngram_words={ngram_words}: wanted 1 <= min_words <= ngram_words"
        )


def _files(benchmarks: tuple[Any, ...], stage: str) -> tuple[str, ...]:
    if not benchmarks:
        raise ConfigError(f'{stage} has no benchmark: give benchmarks=({{"path": FILE}}, ...).')
    for benchmark in benchmarks:
        storage.check_exists(benchmark.path)
    return tuple(benchmark.path for benchmark in benchmarks)

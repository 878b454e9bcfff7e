"""How much of each benchmark stands in a finished corpus, and whether a model knows items that it should not."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.files import atomic_write
from data.decontaminate.index import Benchmark, Index, is_looked_for, name_of, open_index, read_words
from data.decontaminate.stages import canary_in
from data.quality.curves import area

_EXAMPLES = 20  # shown of each benchmark
_AROUND = 120  # characters shown on both sides of a span
MOST = 0.8  # an item is covered for the most part from this share of its runs on
Log = Callable[[str], None]


@dataclasses.dataclass
class Found:
    """What the corpus holds of the items of an index."""

    documents: int = 0
    dirty_documents: int = 0
    canaries: Counter = dataclasses.field(default_factory=Counter)
    runs: dict[int, set[int]] = dataclasses.field(
        default_factory=lambda: defaultdict(set)
    )  # by item: its runs
    examples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=lambda: defaultdict(list))


def corpus_report(
    documents: Iterable[Mapping[str, Any]],
    benchmarks: Sequence[Benchmark],
    *,
    ngram_words: int = 13,
    min_words: int = 8,
    scores: Mapping[tuple[str, int], float] | None = None,
    log: Log = lambda line: None,
) -> dict[str, Any]:
    """Each benchmark's items with any run in the corpus ("hit") and with MOST of their runs ("covered"), with examples.

    scores: a model's result by (benchmark, number of the item), for its means on hit and on clean items.
    """
    index = open_index(benchmarks, ngram_words, min_words)
    found, began, said = Found(), time.monotonic(), time.monotonic()
    for document in documents:
        _look(document, index, found)
        if time.monotonic() - said > 2:
            said = time.monotonic()
            log(f"{found.documents:,} documents, {found.documents / (said - began):,.0f}/s")
    rows = [_of_benchmark(b, index, found, ngram_words, min_words, scores or {}) for b in benchmarks]
    return {
        "documents": found.documents,
        "documents_with_hits": found.dirty_documents,
        "canaries": dict(sorted(found.canaries.items())),
        "ngram_words": ngram_words,
        "min_words": min_words,
        "benchmarks": rows,
    }


def membership_report(
    logprobs: Callable[[Sequence[str]], Sequence[np.ndarray]],
    items: Sequence[str],
    others: Sequence[str],
    share: float = 0.2,
) -> dict[str, float]:
    """Whether a model likes the unlikeliest words of items better than those of texts that are like them but new
    (paraphrases, or items written after its training): Min-K% Prob, Shi et al. 2023, arXiv:2310.16789.

    An area under the ROC curve of 0.5 says that it does not; near 1, that the items were trained on.
    """
    of_items, of_others = (np.array([min_k(x, share) for x in logprobs(texts)]) for texts in (items, others))
    labels = np.repeat([True, False], [len(of_items), len(of_others)])
    return {
        "area_under_roc": area(np.concatenate([of_items, of_others]), labels),
        "mean_of_items": float(of_items.mean()),
        "mean_of_others": float(of_others.mean()),
        "items": len(of_items),
        "others": len(of_others),
        "share": share,
    }


def min_k(logprobs: np.ndarray, share: float) -> float:
    """The mean of the lowest `share` of the tokens' log-probabilities, in nats; of one token at least."""
    count = max(1, math.floor(len(logprobs) * share))
    return float(np.sort(logprobs)[:count].mean()) if len(logprobs) else 0.0


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """report.json, and report.html with the spans marked."""
    atomic_write(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    atomic_write(folder / "report.html", page(report))


def page(report: Mapping[str, Any]) -> str:
    """The report as a page that stands alone."""
    esc = html.escape
    rows, parts = [], []
    for b in report.get("benchmarks", []):
        cells = [
            esc(b["name"]),
            f"{b['items']:,}",
            f"{b['hit']:,} ({b['hit_rate']:.1%})",
            f"{b['covered']:,}",
        ]
        cells += ["" if b.get(k) is None else f"{b[k]:.4f}" for k in ("clean_score", "dirty_score")]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        shown = [
            f"<li><b>item {e['item']}</b> in {esc(e['document'])}<p>{esc(e['before'])}<mark>{esc(e['span'])}</mark>"
            f"{esc(e['after'])}</p></li>"
            for e in b["examples"]
        ]
        parts.append(f"<h2>{esc(b['name'])}</h2><ul>{''.join(shown) or '<li>nothing</li>'}</ul>")
    heads = ("benchmark", "items", "with a hit", f"covered ({MOST:.0%})", "score, clean", "score, dirty")
    return (
        "<!doctype html><meta charset=utf-8><title>Benchmarks in the corpus</title><style>"
        "body{font:16px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}"
        "td,th{padding:.3em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child{text-align:left}"
        "mark{background:#ffd54d}p{color:#333}</style>"
        f"<h1>Benchmarks in the corpus</h1><p>{report.get('documents', 0):,} documents, "
        f"{report.get('documents_with_hits', 0):,} of them with a run of {report.get('ngram_words')} words of a "
        f"benchmark (shorter items whole, below {report.get('min_words')} words as a line of their own).</p><table><tr>"
        + "".join(f"<th>{head}</th>" for head in heads)
        + f"</tr>{''.join(rows)}</table>{''.join(parts)}\n"
    )


def _look(document: Mapping[str, Any], index: Index, found: Found) -> None:
    text = document["text"]
    words = read_words(text)
    hits = index.hits(words)
    found.documents += 1
    found.dirty_documents += bool(hits)
    if canary := canary_in(text, ()):
        found.canaries[canary] += 1
    shown: set[int] = set()
    for at, length, items in hits:
        run = hash(words.hashes[at : at + length].tobytes())
        for number in items.tolist():
            found.runs[number].add(run)
            examples = found.examples[index.items[number].benchmark]
            if number not in shown and len(examples) < _EXAMPLES:
                shown.add(number)
                mine = [h for h in hits if number in h[2]]
                start, stop = words.span(at, mine[-1][0] + mine[-1][1] - at)
                examples.append(
                    {
                        "item": index.items[number].number,
                        "document": str(document.get("id", "")),
                        "before": text[max(start - _AROUND, 0) : start],
                        "span": text[start:stop][:1000],
                        "after": text[stop : stop + _AROUND],
                    }
                )


def _of_benchmark(
    benchmark: Benchmark,
    index: Index,
    found: Found,
    ngram_words: int,
    min_words: int,
    scores: Mapping[tuple[str, int], float],
) -> dict[str, Any]:
    name = name_of(benchmark)
    shares: dict[int, float] = {}  # of each item the best of its texts
    for number, item in enumerate(index.items):
        if item.benchmark == name:
            words = read_words(item.text).hashes
            length = min(ngram_words, len(words))
            if is_looked_for(length, min_words):
                runs = {words[i : i + length].tobytes() for i in range(len(words) - length + 1)}
                share = len(found.runs.get(number, ())) / len(runs)
                shares[item.number] = max(shares.get(item.number, 0.0), share)
    hit = {number for number, share in shares.items() if share > 0}
    known = {number: score for (given, number), score in scores.items() if given == name}
    dirty = [score for number, score in known.items() if number in hit]
    clean = [score for number, score in known.items() if number not in hit]
    return {
        "name": name,
        "items": len(shares),
        "not_looked_for": index.counts[name]["short"],  # texts of a word or two
        "broken_lines": index.counts[name]["broken"],
        "hit": len(hit),
        "hit_rate": len(hit) / max(len(shares), 1),
        "covered": sum(share >= MOST for share in shares.values()),
        "items_hit": sorted(hit),
        "clean_score": float(np.mean(clean)) if clean else None,
        "dirty_score": float(np.mean(dirty)) if dirty else None,
        "examples": found.examples.get(name, []),
    }

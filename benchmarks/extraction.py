"""Extraction beside the library alone: F1 of the text on pages whose text is known, and pages a second.

    python -m benchmarks.extraction --pages=readability_test_pages.tar.gz [--rounds=3]

The archive holds PAGE/source.html and PAGE/expected.html, as readability's tests do. The measure is that of
the article extraction benchmark: precision and recall of 4-word shingles, counted with their number, mean over pages.
A formula of the reference may be read as its characters or as LaTeX, whichever is nearer to the text at hand, for both
sides alike; the word after a fence is marking and does not count. "No worse" is a claim about the mean.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tarfile
import time
from collections import Counter
from collections.abc import Callable

WORD = re.compile(r"\w+")
FENCE = re.compile(r"^```+[\w+#]*$", re.M)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", required=True, help="archive of PAGE/source.html and PAGE/expected.html")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from data.extract.page import ENGINES, Extract

    pages = read_pages(args.pages)
    print(f"{len(pages)} pages, {sum(len(page) for page, _ in pages) / 1e6:.1f} million characters")
    for engine, library in ENGINES.items():
        stage = Extract(engine=engine)
        ways: dict[str, Callable[[str], str]] = {
            "ours": lambda page, stage=stage: _kept(*stage.apply(page)),
            "library alone": lambda page, stage=stage, library=library: library(page, stage),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        texts: dict[str, list[str]] = {}
        for _ in range(args.rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                texts[name] = [way(page) for page, _ in pages]
                seconds[name].append(time.perf_counter() - began)
        print(f"\n{engine:24} precision  recall      F1   pages/s")
        scores = {
            name: [
                max((f1(text, wanted) for wanted in readings), key=lambda found: found[2])
                for text, (_, readings) in zip(texts[name], pages)
            ]
            for name in ways
        }
        for name in ways:
            means = [statistics.fmean(column) for column in zip(*scores[name])]
            rate = len(pages) / statistics.median(seconds[name])
            print(f"  {name:20} {means[0]:11.4f} {means[1]:7.4f} {means[2]:7.4f} {rate:9.1f}")
        pairs = [(a[2], b[2]) for a, b in zip(scores["ours"], scores["library alone"])]
        better, worse = sum(a > b + 1e-9 for a, b in pairs), sum(a < b - 1e-9 for a, b in pairs)
        difference = statistics.fmean(a - b for a, b in pairs)
        print(f"  F1 of ours minus the library's: {difference:+.5f}; {better} pages better, {worse} worse")


def _kept(text: str, reason: str | None) -> str:
    return "" if reason else text


def read_pages(archive: str) -> list[tuple[str, list[str]]]:
    """(page, its text in one or two notations of formulas) by name."""
    from data.extract.encoding import decode
    from data.extract.protect import protect

    files: dict[str, dict[str, str]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            if name in ("source.html", "expected.html"):
                files.setdefault(folder, {})[name] = decode(tar.extractfile(member).read())[0]
    pages = []
    for _, both in sorted(files.items()):
        expected = both["expected.html"]
        in_latex = protect(expected, mathematics=True, code=False)[0]
        pages.append((both["source.html"], [_text(expected)] + [_text(in_latex)] * (in_latex != expected)))
    return pages


def f1(text: str, wanted: str) -> tuple[float, float, float]:
    """(precision, recall, F1) of 4-word shingles."""
    ours, theirs = _shingles(text), _shingles(wanted)
    common = (ours & theirs).total()
    precision = common / ours.total() if ours else float(not theirs)
    recall = common / theirs.total() if theirs else float(not ours)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)


def _shingles(text: str) -> Counter[tuple[str, ...]]:
    words = WORD.findall(FENCE.sub("", text))
    return Counter(tuple(words[i : i + 4]) for i in range(max(len(words) - 3, min(len(words), 1))))


def _text(page: str) -> str:
    """All text of a page that holds nothing but its article, words of neighbouring elements apart."""
    import lxml.html

    root = lxml.html.fragment_fromstring(page, create_parent="div")
    return " ".join(text for text in root.itertext())


if __name__ == "__main__":
    main()

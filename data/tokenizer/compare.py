"""Tokenizers beside each other over the same texts: how short they write each language, code and numbers, and how
fast."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.tokenizer.interface import Tokenizer

Texts = Mapping[str, Sequence[str]]  # by name: a language, "code", ...
_INDENTS = (2, 4, 8, 12, 16)
_UNKNOWN = "\ufffd".encode()
_TIMED_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Group:
    """One tokenizer over one group of texts."""

    bytes: int
    tokens: int
    words: int  # stretches between white space
    bytes_per_token: float
    tokens_per_word: float
    parity: float | None  # tokens for each token of the English group, which says something of translations
    lossless: float  # share of texts that come back from their ids
    unknown: int  # of the tokens, those that say nothing but that something was there


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tokenizer: its vocabulary, what it does with each group of texts, with numbers and indentation, its speed."""

    vocab_size: int
    groups: dict[str, Group]
    numbers: dict[
        int, dict[str, int]
    ]  # digits of a number -> how it is cut, e.g. "2+2" -> how many are cut so
    number_consistency: float  # share of numbers that are cut as most of their length are
    indentation: dict[int, int]  # spaces at the beginning of a line of code -> tokens
    encode_mb_per_second: float  # of UTF-8, all texts as one batch, the median of three runs
    decode_mb_per_second: float


def compare(
    tokenizers: Mapping[str, Tokenizer], texts: Texts, english: str | None = None
) -> dict[str, Comparison]:
    """Each tokenizer over the same texts. `english`: the group that parity is against (Petrov et al. 2023,
    arXiv:2305.15425). Raises ValueError for a group without text and an `english` that is none."""
    if empty := [name for name, group in texts.items() if not "".join(group).strip()]:
        raise ValueError(f"the groups {', '.join(empty)} have no text")
    if not texts or english not in (None, *texts):
        raise ValueError(
            f"english={english!r} is not a group of texts; there are {', '.join(texts) or 'none'}"
        )
    return {name: _one(tokenizer, texts, english) for name, tokenizer in tokenizers.items()}


def _one(tokenizer: Tokenizer, texts: Texts, english: str | None) -> Comparison:
    reference = None if english is None else sum(map(len, tokenizer.encode_batch(texts[english])))
    numbers = {digits: number_shapes(tokenizer, digits) for digits in (1, 2, 3, 4)}
    common = sum(max(shapes.values()) for shapes in numbers.values())
    encode, decode = _speed(tokenizer, texts)
    return Comparison(
        tokenizer.vocab_size,
        {name: _group(tokenizer, group, reference) for name, group in texts.items()},
        numbers,
        common / sum(sum(shapes.values()) for shapes in numbers.values()),
        {
            n: len(tokenizer.encode("if x:\n" + " " * n + "y")) - len(tokenizer.encode("if x:\ny"))
            for n in _INDENTS
        },
        encode,
        decode,
    )


def _group(tokenizer: Tokenizer, texts: Sequence[str], reference: int | None) -> Group:
    rows = tokenizer.encode_batch(texts)
    size = sum(len(text.encode("utf-8")) for text in texts)
    words = sum(len(text.split()) for text in texts)
    tokens = sum(map(len, rows))
    same = sum(tokenizer.decode(ids) == text for ids, text in zip(rows, texts, strict=True))
    nothing = [i for ids in rows for i in ids if tokenizer.bytes_of(i).strip() == _UNKNOWN]
    return Group(
        size,
        tokens,
        words,
        size / max(tokens, 1),
        tokens / max(words, 1),
        None if reference is None else tokens / max(reference, 1),
        same / len(texts),
        max(len(nothing) - sum(text.count("\ufffd") for text in texts), 0),
    )


def number_shapes(tokenizer: Tokenizer, digits: int) -> dict[str, int]:
    """How the numbers of so many digits are cut, most common first: {"2+1": 900} says that all of 3 are."""
    first = 0 if digits == 1 else 10 ** (digits - 1)
    rows = tokenizer.encode_batch([str(number) for number in range(first, 10**digits)])
    lengths = {i: len(tokenizer.bytes_of(i).strip()) for ids in rows for i in ids}
    shapes = Counter("+".join(str(lengths[i]) for i in ids if lengths[i]) for ids in rows)
    return dict(sorted(shapes.items(), key=lambda item: (-item[1], item[0])))


def _speed(tokenizer: Tokenizer, texts: Texts) -> tuple[float, float]:
    """(encode, decode) in MB/s over the first megabytes of all texts."""
    batch, size = [], 0
    for text in (text for group in texts.values() for text in group):
        if size >= _TIMED_BYTES:
            break
        batch.append(text)
        size += len(text.encode("utf-8"))
    encode = [_seconds(lambda: tokenizer.encode_batch(batch)) for _ in range(3)]
    rows = tokenizer.encode_batch(batch)
    decode = [_seconds(lambda: [tokenizer.decode(ids) for ids in rows]) for _ in range(3)]
    return size / 1e6 / statistics.median(encode), size / 1e6 / statistics.median(decode)


def _seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return max(time.perf_counter() - start, 1e-9)


def table(results: Mapping[str, Comparison], english: str | None) -> list[Any]:
    """Two tables for `rich`: a row a tokenizer, and a row a group of texts."""
    from rich.table import Table

    whole = Table(title="Tokenizers over all texts")
    headers = (
        "tokenizer",
        "ids",
        "bytes/token",
        "tokens/word",
        "worst parity",
        "4-digit numbers",
        "same cut",
    )
    for header in (*headers, "indent 4/8/16", "encode MB/s", "decode MB/s", "unknown", "lossless"):
        whole.add_column(header, justify="left" if header == "tokenizer" else "right")
    for name, result in results.items():
        whole.add_row(name, *_row(result))
    groups = Table(title="Bytes a token" + (f", and tokens against {english}" if english else ""))
    groups.add_column("texts")
    for name in results:
        groups.add_column(name, justify="right")
    for group in next(iter(results.values())).groups:
        cells = [result.groups[group] for result in results.values()]
        parity = ["" if cell.parity is None else f"  {cell.parity:5.2f}x" for cell in cells]
        groups.add_row(group, *(f"{c.bytes_per_token:.2f}{p}" for c, p in zip(cells, parity, strict=True)))
    return [whole, groups]


def _row(result: Comparison) -> list[str]:
    groups = result.groups.values()
    size, tokens, words = (sum(getattr(g, key) for g in groups) for key in ("bytes", "tokens", "words"))
    parities = {name: group.parity for name, group in result.groups.items() if group.parity is not None}
    worst = max(parities, key=parities.__getitem__, default=None)
    indents = "/".join(str(result.indentation[n]) for n in (4, 8, 16))
    return [
        f"{result.vocab_size:,}",
        f"{size / max(tokens, 1):.3f}",
        f"{tokens / max(words, 1):.3f}",
        "" if worst is None else f"{parities[worst]:.2f}x {worst}",
        ", ".join(f"{shape} {n / 9000:.0%}" for shape, n in list(result.numbers[4].items())[:2]),
        f"{result.number_consistency:.0%}",
        indents,
        f"{result.encode_mb_per_second:.1f}",
        f"{result.decode_mb_per_second:.1f}",
        f"{sum(g.unknown for g in groups) / max(tokens, 1):.0%}",
        f"{statistics.mean(g.lossless for g in groups):.0%}",
    ]


def draw(results: Mapping[str, Comparison], english: str | None, path: Path) -> None:
    """A picture: a line a group of texts, a dot a tokenizer; bytes a token, and parity where there is English.

    A tokenizer has no dot where more than one token in a hundred is the unknown one.
    """
    import matplotlib.figure

    names = list(next(iter(results.values())).groups)
    first = next(iter(results.values())).groups
    names.sort(key=lambda name: first[name].parity or first[name].bytes_per_token, reverse=english is None)
    panels = ["bytes_per_token", "parity"] if english else ["bytes_per_token"]
    titles = {"bytes_per_token": "bytes a token", "parity": f"tokens, times those of {english}"}
    size = (6.5 * len(panels), max(2.5, 0.24 * len(names) + 1.6))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    for axes, panel in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for (tokenizer, result), mark in zip(results.items(), "os^Dv<>pP*X" * len(results)):
            # Where a tokenizer says "unknown" instead of the text, being short is no merit.
            groups = [result.groups[name] for name in names]
            values = [None if g.unknown > 0.01 * g.tokens else getattr(g, panel) for g in groups]
            axes.plot(values, range(len(names)), mark, markersize=5, alpha=0.8, label=tokenizer)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(titles[panel], fontsize=10)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        if panel == "parity":
            axes.axvline(1, color="0.6", linewidth=1)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(len(labels), 5), fontsize=9, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)

"""An n-gram language model: interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3), as KenLM has it, on
sorted arrays.

An n-gram of symbols is one uint64, a fixed number of bits each, so nothing collides. The vocabulary is closed: rare
words are <unk>, and for every context the probabilities of all symbols sum to 1, whatever was pruned.
"""

# M n-grams of one order, T symbols of a text, V symbols that can be predicted (all but <s>)

from __future__ import annotations

import dataclasses
import functools
import io
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from configs.files import atomic_write
from configs.typed import ConfigError
from data import storage
from data.words import words_and_marks

FORMAT = "crucible-ngrams-1"
UNKNOWN, START, END = 0, 1, 2  # <unk>, <s> (only ever context), </s>
_FIRST = 3  # the first symbol that stands for itself
_CHUNK = 1 << 22  # symbols counted at once
UNITS: dict[str, Callable[[str], Sequence]] = {
    "words": words_and_marks,
    "bytes": lambda text: text.encode("utf-8", "replace"),
}


@dataclasses.dataclass(frozen=True)
class NgramConfig:
    """How an n-gram model is made."""

    unit: str = "words"  # "words" or "bytes"
    order: int = 3
    vocabulary: int = 65_000  # symbols at most; the most frequent ones
    max_ngrams: int = 20_000_000  # of each order: the rarest go beyond it; 16 bytes each

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"unit={self.unit!r}: wanted {' or '.join(UNITS)}")
        if self.order < 1 or self.order * self.bits > 64:
            raise ValueError(
                f"order={self.order} with {self.vocabulary} symbols: {self.bits} bits each do not fit in 64; "
                f"wanted an order of 1 to {64 // self.bits}, or fewer symbols"
            )

    @property
    def bits(self) -> int:
        """Of one symbol."""
        symbols = 256 if self.unit == "bytes" else self.vocabulary
        return max(3, (symbols + _FIRST - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class NgramModel:
    """By order n = 1 ... N: n-grams with what their count gives, and contexts with what they leave to order n - 1."""

    unit: str
    symbols: tuple  # word (or byte) number i stands for symbol i + 3
    ngrams: tuple[np.ndarray, ...]  # uint64 [M], ascending
    shares: tuple[np.ndarray, ...]  # float32 [M]: (count - discount) / count of the context
    contexts: tuple[np.ndarray, ...]  # uint64, ascending
    left: tuple[np.ndarray, ...]  # float32: the weight of the shorter context
    bits: int
    percentiles: tuple[float, float] | None = None  # perplexities up to which 30 and 60 in 100 texts lie

    @property
    def order(self) -> int:
        return len(self.ngrams)

    @functools.cached_property
    def numbers(self) -> dict:
        return {symbol: i + _FIRST for i, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> np.ndarray:
        """int64 [T + 1]: the symbols and </s>."""
        units = UNITS[self.unit](text)
        numbers = self.numbers
        return np.array([*(numbers.get(unit, UNKNOWN) for unit in units), END], np.int64)

    def nats(self, texts: Sequence[str]) -> list[np.ndarray]:
        """-log p of every symbol of each text and of its end, given up to order - 1 before it: float64 [T + 1] each."""
        encoded = [self.encode(text) for text in texts]
        lengths = [len(symbols) for symbols in encoded]
        windows = np.concatenate(
            [np.zeros((0, self.order), np.int64), *(_windows(s, self.order) for s in encoded)]
        )
        return np.split(-np.log(self._probabilities(windows)), np.cumsum(lengths)[:-1])

    def probabilities(self, context: Sequence[int]) -> np.ndarray:
        """p of every symbol after the context (symbol numbers), float64 [V + 1]; that of <s> is 0."""
        every = np.arange(len(self.symbols) + _FIRST)
        padded = [START] * (self.order - 1) + list(context)
        before = np.array(padded[len(padded) - self.order + 1 :], np.int64)
        windows = np.concatenate([np.tile(before, (len(every), 1)), every[:, None]], axis=1)
        found = self._probabilities(windows)
        found[START] = 0
        return found

    def _probabilities(self, windows: np.ndarray) -> np.ndarray:
        """p of the last symbol of each window [n, order] given the others."""
        p = np.full(len(windows), 1 / (len(self.symbols) + _FIRST - 1))  # all but <s> alike
        for n in range(1, self.order + 1):
            context = _packed(windows[:, self.order - n : -1], self.bits)
            ngram = (context << np.uint64(self.bits)) | windows[:, -1].astype(np.uint64)
            seen = _lookup(self.contexts[n - 1], self.left[n - 1], context, 1.0)
            p = p * seen + _lookup(self.ngrams[n - 1], self.shares[n - 1], ngram, 0.0)
        return p


def train_ngrams(
    texts: Callable[[], Iterable[str]], config: NgramConfig, log: Callable[[str], None] = lambda line: None
) -> NgramModel:
    """A model of what `texts()` gives, which is gone through twice: for the vocabulary and for the counts.

    Memory is bounded by `max_ngrams`, not by the texts: when more are known, those with the smallest counts go.
    Raises ConfigError where there is no text.
    """
    symbols = _vocabulary(texts(), config)
    if not symbols:
        raise ConfigError("there is no text to train on: the files hold no words.")
    log(f"{len(symbols):,} symbols")
    empty = NgramModel(config.unit, symbols, (), (), (), (), config.bits)
    highest, pruned = _counts(texts(), empty, config, log)
    ngrams, shares, contexts, left = [], [], [], []
    for n, (keys, counts) in enumerate(_all_orders(*highest, config), start=1):
        share, weights = _discounted(keys, counts, config.bits, pruned and n == config.order)
        parts = keys, share.astype(np.float32), weights[0], weights[1].astype(np.float32)
        for each, part in zip((ngrams, shares, contexts, left), parts):
            each.append(part)
        log(f"order {n}: {len(keys):,} n-grams")
    return NgramModel(
        config.unit, symbols, tuple(ngrams), tuple(shares), tuple(contexts), tuple(left), config.bits
    )


def save_ngrams(model: NgramModel, path: Path) -> None:
    file = io.BytesIO()
    arrays = {
        f"{name}{n}": array
        for name in ("ngrams", "shares", "contexts", "left")
        for n, array in enumerate(getattr(model, name))
    }
    symbols = np.array(model.symbols, np.uint8 if model.unit == "bytes" else np.str_)
    facts = {"unit": model.unit, "bits": model.bits, "order": model.order, "symbols": symbols}
    np.savez_compressed(
        file, format=FORMAT, percentiles=np.array(model.percentiles or (), float), **facts, **arrays
    )
    atomic_write(path, file.getvalue())


def load_ngrams(path: str) -> NgramModel:
    """A model from its file, read once in a process. Raises ConfigError for another kind of file."""
    return _load(path, storage.state(path))


@functools.lru_cache(maxsize=4)
def _load(path: str, state: tuple[int, int]) -> NgramModel:
    try:
        with storage.open_bytes(path) as file:
            held = np.load(file, allow_pickle=False)
            if str(held["format"]) != FORMAT:
                raise ValueError(f"format {held['format']}")
            names = ("ngrams", "shares", "contexts", "left")
            arrays = {name: tuple(held[f"{name}{n}"] for n in range(int(held["order"]))) for name in names}
            percentiles = tuple(held["percentiles"].tolist()) or None
            symbols = tuple(held["symbols"].tolist())
            return NgramModel(
                str(held["unit"]), symbols, **arrays, bits=int(held["bits"]), percentiles=percentiles
            )
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no model of `python -m data.quality train-ngram`: {error}") from error


def _vocabulary(texts: Iterable[str], config: NgramConfig) -> tuple:
    counts: Counter = Counter()
    for text in texts:
        counts.update(UNITS[config.unit](text))
        if len(counts) > 16 * config.vocabulary + (1 << 20):  # the rare end of what was seen is forgotten
            counts = Counter(dict(counts.most_common(8 * config.vocabulary)))
    if config.unit == "bytes":
        return tuple(range(256)) if counts else ()
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return tuple(ranked[: config.vocabulary])


def _counts(
    texts: Iterable[str], empty: NgramModel, config: NgramConfig, log: Callable[[str], None]
) -> tuple[tuple[np.ndarray, np.ndarray], bool]:
    """((n-grams of the highest order, counts), whether any went for want of room)."""
    keys, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    waiting: list[np.ndarray] = []
    room = total = 0
    pruned = False

    def merge() -> None:
        nonlocal keys, counts, pruned
        new, more = np.unique(np.concatenate([np.zeros(0, np.uint64), *waiting]), return_counts=True)
        waiting.clear()
        keys, counts = _added(keys, counts, new, more)
        while len(keys) > config.max_ngrams:
            kept = counts > counts.min()
            keys, counts, pruned = keys[kept], counts[kept], True

    for text in texts:
        symbols = empty.encode(text)
        waiting.append(_packed(_windows(symbols, config.order), config.bits))
        room, total = room + len(symbols), total + len(symbols)
        if room >= _CHUNK:
            merge()
            room = 0
            log(f"{total:,} symbols counted, {len(keys):,} n-grams")
    merge()
    return (keys, counts), pruned


def _all_orders(
    keys: np.ndarray, counts: np.ndarray, config: NgramConfig
) -> list[tuple[np.ndarray, np.ndarray]]:
    """By order from 1: the n-grams and their counts; below the highest the number of different symbols before them,
    but for those at the start of a text, which nothing but <s> stands before and which count as often as they occur."""
    orders = [(keys, counts)]
    for n in range(config.order, 1, -1):
        mask = np.uint64((1 << (config.bits * (n - 1))) - 1)
        shorter = keys & mask
        first = keys >> np.uint64(config.bits * (n - 1))
        second = shorter >> np.uint64(config.bits * (n - 2))
        padded = (first == START) & (second == START) & (n > 2)
        keys, inverse = np.unique(shorter, return_inverse=True)
        counts = np.bincount(inverse, np.where(padded, counts, 1), len(keys)).astype(np.int64)
        orders.append((keys, counts))
    return orders[::-1]


def _discounted(
    keys: np.ndarray, counts: np.ndarray, bits: int, pruned: bool
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """(share of each n-gram in its context, (contexts, the weight that they leave))."""
    discounts = _discounts(counts) if not pruned else (0.5, 0.5, 0.5)
    discount = np.array([0.0, *discounts])[np.minimum(counts, 3)]
    contexts, inverse = np.unique(keys >> np.uint64(bits), return_inverse=True)
    totals = np.bincount(inverse, counts, len(contexts))
    left = np.bincount(inverse, discount, len(contexts)) / totals
    return (counts - discount) / totals[inverse], (contexts, left)


def _discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """What is taken from counts of 1, 2, and 3 or more: Chen and Goodman's estimates from how many counts there are of
    1 to 4; a half where these are too few to tell."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    if 0 in (n1, n2, n3, n4):
        return 0.5, 0.5, 0.5
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 < d < i for i, d in enumerate(found, start=1)) else (0.5, 0.5, 0.5)


def _added(
    keys: np.ndarray, counts: np.ndarray, new: np.ndarray, more: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    both, inverse = np.unique(np.concatenate([keys, new]), return_inverse=True)
    totals = np.bincount(inverse, np.concatenate([counts, more]), len(both))
    return both, totals.astype(np.int64)


def _windows(symbols: np.ndarray, order: int) -> np.ndarray:
    """The symbols up to each one, after order - 1 times <s>: int64 [T + 1, order]."""
    padded = np.concatenate([np.full(order - 1, START), symbols])
    return np.lib.stride_tricks.sliding_window_view(padded, order)


def _packed(windows: np.ndarray, bits: int) -> np.ndarray:
    """Each row as one number, uint64; the first symbol in the highest bits."""
    packed = np.zeros(len(windows), np.uint64)
    for column in windows.T:
        packed = (packed << np.uint64(bits)) | column.astype(np.uint64)
    return packed


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    """The value of each wanted key, float64."""
    if not len(keys):
        return np.full(len(wanted), missing)
    # Distinct ascending queries run through the table in order, which is much faster than a jump for each.
    distinct, inverse = np.unique(wanted, return_inverse=True)
    at = np.minimum(np.searchsorted(keys, distinct), len(keys) - 1)
    return np.where(keys[at] == distinct, values[at].astype(np.float64), missing)[inverse]

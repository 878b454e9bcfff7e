"""Which source each example of a run comes from: mixtures that change at a step, weights from sizes, and where
every source then stands.

A schedule is a closed form. Example g finds its phase by bisection and its source by walking down a binary tree of
shares; at each node the first n examples send floor(share * n + 1/2) to the left, in integers. So g -> (source, index
in the source) needs no state, no source is ever more than (1 + log2 sources) / 2 examples from its share, and a
source goes on where it stood when the weights change.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

from configs.typed import ConfigError
from data.spans import SpanCorruption


@dataclasses.dataclass(frozen=True)
class Phase:
    """Weights that hold from `start` on: an int is a step, a float below 1 a part of the run.

    To change the weights of a run under way, add a phase at a step to come: then every source goes on where it is.
    """

    weights: dict[str, float]  # dataset folder -> weight; they need not sum to one
    start: int | float = 0

    def __post_init__(self) -> None:
        if self.start < 0 or (isinstance(self.start, float) and self.start >= 1):
            raise ConfigError(
                f"a phase starts at {self.start!r}: wanted a step (an int, 0 or more) or a part of the run (a float "
                "below 1)."
            )


@dataclasses.dataclass(frozen=True)
class Balance:
    """Weights from the sizes of the sources.

    With a temperature T a source's share is in proportion to weight * tokens^(1/T): 1 is by size, larger is more
    even (Arivazhagan et al. 2019, arXiv:1907.05019). `max_epochs` then bounds how often a source is repeated over the
    whole run, earlier phases taking first; what it may not give is shared among the others in proportion (after
    UniMax, Chung et al. 2023, arXiv:2304.09151).
    """

    temperature: float | None = None  # None: the weights stand as given
    max_epochs: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("max_epochs", self.max_epochs)):
            if value is not None and not value > 0:
                raise ConfigError(f"balance.{name}={value} must be above 0, or None.")


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """The first epoch of a source from low to high; later epochs are shuffled as ever.

    Documents are put into `buckets` of equal number by their key. A document's place is its bucket's, moved by a
    hash of its own up to `blend` of the epoch: 0 shuffles within buckets only, 1 and more mixes all of them.
    """

    by: Literal["length", "score"] = "length"  # score: scores.npy of the dataset, see data/related.py
    buckets: int = 10
    blend: float = 0.0
    descending: bool = False

    def __post_init__(self) -> None:
        if self.buckets < 1 or not self.blend >= 0:
            raise ConfigError(
                f"curriculum: buckets={self.buckets} and blend={self.blend}; wanted at least 1 and at least 0."
            )


Packing = Literal["concat", "best_fit", "related"]


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Which rows a run is made of, and in which order."""

    mixture: dict[str, float] = field(default_factory=dict)  # dataset folder -> weight, from the first step
    phases: tuple[Phase, ...] = ()  # mixtures that take over later, e.g. for annealing
    balance: Balance = Balance()
    packing: Packing = (
        "concat"  # of token datasets: cut every seq_len, documents whole, or neighbours together
    )
    join_related: bool = True  # with "related", a group's documents in a row are one segment, not one each
    curriculum: Curriculum | None = None
    spans: SpanCorruption | None = (
        None  # of token datasets: hidden spans are learned in place of the next token
    )
    seq_len: int = 256  # tokens a row
    batch_size: int = 16  # rows a step over all devices; for preferences two rows are one pair
    seed: int = 0  # of the shuffle

    def __post_init__(self) -> None:
        for name, value, least in (("seq_len", self.seq_len, 2), ("batch_size", self.batch_size, 1)):
            if value < least:
                raise ValueError(f"{name}={value}; wanted at least {least}.")

    def whole_mixture(self) -> Mixture:
        return Mixture((Phase(self.mixture), *self.phases), self.balance)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Phases in the order of their starts, the first at 0, and how their weights are understood."""

    phases: tuple[Phase, ...]
    balance: Balance = Balance()


@dataclasses.dataclass(frozen=True)
class Size:
    """What one epoch of a source holds; an example is a row, or a pair of rows."""

    examples: int
    tokens: int
    documents: int = 0


def as_mixture(mixture: Mixture | Mapping[Any, float]) -> Mixture:
    if isinstance(mixture, Mixture):
        return mixture
    return Mixture((Phase({os.fspath(folder): weight for folder, weight in mixture.items()}),))


def sources_of(mixture: Mixture) -> list[str]:
    """Folders with a weight above 0, in the order in which they first appear. Raises ConfigError for bad weights."""
    for phase in mixture.phases:
        bad = [w for w in phase.weights.values() if not 0 <= w < float("inf")]
        if bad or not sum(phase.weights.values()) > 0:
            raise ConfigError(
                f"mixture weights must be finite, none negative, and not all zero: {phase.weights}"
            )
    return list(dict.fromkeys(f for phase in mixture.phases for f, w in phase.weights.items() if w > 0))


def make_schedule(
    mixture: Mixture, sizes: Mapping[str, Size], examples_per_step: int, steps: int | None = None
) -> Schedule:
    """Starts and shares as numbers. `sizes` are in the order of `sources_of`; `steps` is the length of the run.

    Raises ConfigError where phases are not in order, where the length of the run is needed and not given, and where
    all sources together hold less than the run takes at `max_epochs`.
    """
    starts = [_start_example(phase, examples_per_step, steps) for phase in mixture.phases]
    if not starts or starts[0] != 0 or any(b <= a for a, b in zip(starts, starts[1:])):
        raise ConfigError(
            f"phases start at {[p.start for p in mixture.phases]}: wanted 0 first, then each after the one before it."
        )
    shares, used = [], [0.0] * len(sizes)
    total = None if steps is None else steps * examples_per_step
    for k, phase in enumerate(mixture.phases):
        weights = _weights(phase, mixture.balance, sizes)
        if mixture.balance.max_epochs is not None:
            if total is None:
                raise ConfigError("balance.max_epochs needs the length of the run: give steps.")
            stop = starts[k + 1] if k + 1 < len(starts) else total
            n = max(min(stop, total) - starts[k], 0)
            left = [mixture.balance.max_epochs * s.examples - u for s, u in zip(sizes.values(), used)]
            weights = _capped(weights, left, n, k, mixture.balance.max_epochs)
            used = [u + n * w for u, w in zip(used, weights)]
        shares.append(tuple(weights))
    return Schedule(tuple(sizes), tuple(starts), tuple(shares))


def _start_example(phase: Phase, examples_per_step: int, steps: int | None) -> int:
    if isinstance(phase.start, int):
        return phase.start * examples_per_step
    if steps is None and phase.start > 0:
        raise ConfigError(
            f"a phase starts at {phase.start} of the run: give steps, or the start as a step (an int)."
        )
    return round(phase.start * (steps or 0)) * examples_per_step


def _weights(phase: Phase, balance: Balance, sizes: Mapping[str, Size]) -> list[float]:
    weights = [phase.weights.get(name, 0.0) for name in sizes]
    if balance.temperature is not None:
        power = 1 / balance.temperature
        weights = [w * size.tokens**power if w else 0.0 for w, size in zip(weights, sizes.values())]
    return [w / sum(weights) for w in weights]


def _capped(shares: list[float], left: list[float], n: int, phase: int, max_epochs: float) -> list[float]:
    """Shares of n examples none of which takes more than `left[i]`; the others grow in proportion."""
    if n == 0:
        return shares
    limits = [max(room, 0.0) / n for room in left]
    capped: set[int] = set()
    while True:
        free = sum(share for i, share in enumerate(shares) if i not in capped)
        rest = 1 - sum(limits[i] for i in capped)
        scaled = [limits[i] if i in capped else share * rest / free for i, share in enumerate(shares)]
        over = {i for i, share in enumerate(scaled) if share > limits[i] * (1 + 1e-12)} - capped
        if not over:
            return scaled
        capped |= over
        if not any(share > 0 for i, share in enumerate(shares) if i not in capped):
            held = sum(limits[i] for i, share in enumerate(shares) if share > 0)
            if held >= 1 - 1e-9:
                return [limits[i] / held if share > 0 else 0.0 for i, share in enumerate(shares)]
            raise ConfigError(
                f"phase {phase + 1} takes {n:,} examples and its sources hold {held * n:,.0f} at "
                f"balance.max_epochs={max_epochs:g}. Raise it to {max_epochs / max(held, 1e-9):.2f} or more, add "
                "data, or train for fewer steps."
            )


class Schedule:
    """Sources, the example at which each phase starts, and the share of each source in each phase.

    Attributes: `sources` names; `starts` [phases]; `shares` [phases][sources], each summing to one.
    """

    def __init__(self, sources: Sequence[str], starts: Sequence[int], shares: Sequence[Sequence[float]]):
        self.sources, self.starts, self.shares = tuple(sources), tuple(starts), tuple(map(tuple, shares))
        self._trees = [_tree([(i, w) for i, w in enumerate(phase) if w > 0]) for phase in self.shares]
        self._bases = [[0] * len(self.sources)]  # [phases][sources]: examples drawn before each phase
        for k in range(1, len(self.starts)):
            self._bases.append(self.counts(self.starts[k], k - 1))

    def place(self, example: int) -> tuple[int, int]:
        """(source, index within the source, counted through its epochs) of a global example."""
        k = bisect.bisect_right(self.starts, example) - 1
        node, n = self._trees[k], example - self.starts[k]
        while isinstance(node, tuple):
            share, left, right = node
            before, after = _sent_left(share, n), _sent_left(share, n + 1)
            node, n = (left, before) if after > before else (right, n - before)
        return node, self._bases[k][node] + n

    def counts(self, examples: int, phase: int | None = None) -> list[int]:
        """How many of the first `examples` come from each source."""
        k = bisect.bisect_right(self.starts, examples) - 1 if phase is None else phase
        counts = list(self._bases[k])
        todo = [(self._trees[k], examples - self.starts[k])]
        while todo:
            node, n = todo.pop()
            if isinstance(node, tuple):
                share, left, right = node
                todo += [(left, _sent_left(share, n)), (right, n - _sent_left(share, n))]
            else:
                counts[node] += n
        return counts

    def examples_within(self, limits: Sequence[int]) -> int:
        """The most examples of which no source gives more than its limit."""
        low, high = 0, sum(limits)
        while low < high:
            middle = (low + high + 1) // 2
            fits = all(count <= limit for count, limit in zip(self.counts(middle), limits))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


_ONE = 1 << 40  # shares are whole parts of this, so that counts are exact however long the run


def _sent_left(share: int, n: int) -> int:
    return (share * n + _ONE // 2) // _ONE


def _tree(weights: list[tuple[int, float]]) -> Any:
    """A source's number, or (share of the left in parts of `_ONE`, left, right)."""
    if len(weights) == 1:
        return weights[0][0]
    half = len(weights) // 2
    left = sum(w for _, w in weights[:half])
    share = round(_ONE * left / sum(w for _, w in weights))
    return min(max(share, 1), _ONE - 1), _tree(weights[:half]), _tree(weights[half:])

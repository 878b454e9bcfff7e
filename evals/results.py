"""What every measurement gives: rows of (name, metric, value, standard error, n), and the table of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One number. `stderr` is None where there is none to be had: a single item, or one compressed stream."""

    name: str
    metric: str
    value: float
    stderr: float | None
    n: int  # items (documents, problems) that it was measured on
    interval: tuple[float, float] | None = (
        None  # 95 %, of a proportion; holds at 0 and 1 too, where stderr is 0
    )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a value that is not finite is None."""
        fields = dataclasses.asdict(self)
        return fields | {key: _finite(fields[key]) for key in ("value", "stderr")}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Row:
        """The inverse, after JSON made a list of the interval."""
        interval = fields["interval"] and tuple(fields["interval"])
        return cls(**{**fields, "interval": interval})


@dataclasses.dataclass
class PartResult:
    """A measurement's rows, and each item that it was made of."""

    rows: list[Row]
    items: list[dict[str, Any]]  # JSON-able


def mean_row(name: str, metric: str, values: Sequence[float]) -> Row:
    """The mean and its standard error, s / sqrt(n); for 0 and 1 this is the binomial one, with n - 1."""
    numbers = np.asarray(values, np.float64)
    n = len(numbers)
    stderr = float(numbers.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return Row(name, metric, float(numbers.mean()), stderr, n)


def proportion_row(name: str, metric: str, successes: Sequence[bool]) -> Row:
    """The share of successes with the binomial standard error and Wilson's 95 % interval.

    Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    row, z = mean_row(name, metric, successes), 1.959964
    n, p = row.n, row.value
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return dataclasses.replace(row, interval=(max(0.0, middle - half), min(1.0, middle + half)))


def ratio_row(name: str, metric: str, numerators: Sequence[float], denominators: Sequence[float]) -> Row:
    """sum(numerators) / sum(denominators) with the standard error of a ratio over independent clusters.

    Cochran 1977, Sampling Techniques, 3rd ed., section 2.11, without the finite-population factor.
    """
    x, y = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    n, ratio = len(x), float(x.sum() / y.sum())
    stderr = None
    if n > 1:
        stderr = float(np.sqrt(n / (n - 1) * np.sum((x - ratio * y) ** 2)) / y.sum())
    return Row(name, metric, ratio, stderr, n)


def average_row(name: str, rows: Sequence[Row], weights: Sequence[float]) -> Row:
    """The weighted average of independent rows of one metric."""
    share = np.asarray(weights, np.float64) / np.sum(weights)
    value = float(np.dot(share, [row.value for row in rows]))
    errors = [row.stderr for row in rows]
    stderr = None if None in errors else float(np.sqrt(np.sum((share * np.asarray(errors, float)) ** 2)))
    return Row(name, rows[0].metric, value, stderr, sum(row.n for row in rows))


def table(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """A rich table of rows as `Row.to_dict` gives them."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for column, justify in (
        ("name", "left"),
        ("metric", "left"),
        ("value", "right"),
        ("95 %", "right"),
        ("n", "right"),
    ):
        shown.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        interval = "{:.3f} to {:.3f}".format(*row["interval"]) if row["interval"] else ""
        value = value_text(row["value"], row["stderr"])
        shown.add_row(row["name"], row["metric"], value, interval, f"{row['n']:,}")
    return shown


def value_text(value: float | None, stderr: float | None) -> str:
    """`0.512 +- 0.021`; the standard error has two digits, and the value as many decimals."""
    if value is None:
        return "not finite"
    if stderr is None:
        return f"{value:.4g}"
    if stderr == 0:
        return f"{value:.4g} +- 0"
    decimals = min(max(1 - math.floor(math.log10(stderr)), 0), 12)
    return f"{value:.{decimals}f} +- {stderr:.{decimals}f}"


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None

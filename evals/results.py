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

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a value that is not finite is None."""
        fields = dataclasses.asdict(self)
        return fields | {key: _finite(fields[key]) for key in ("value", "stderr")}


@dataclasses.dataclass
class PartResult:
    """A measurement's rows, and each item that it was made of."""

    rows: list[Row]
    items: list[dict[str, Any]]  # JSON-able


def mean_row(name: str, metric: str, values: Sequence[float]) -> Row:
    """The mean and its standard error, s / sqrt(n); for 0 and 1 this is the binomial one, with n - 1."""
    values = np.asarray(values, np.float64)
    n = len(values)
    stderr = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return Row(name, metric, float(values.mean()), stderr, n)


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
    for column, justify in (("name", "left"), ("metric", "left"), ("value", "right"), ("n", "right")):
        shown.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        shown.add_row(row["name"], row["metric"], value_text(row["value"], row["stderr"]), f"{row['n']:,}")
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

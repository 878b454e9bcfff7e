"""How good scores are: the ROC curve with its area, calibration, and thresholds by the share that they keep."""

# N scored texts; labels are bool, True for the positive set

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from configs.files import temporary_beside

KEEP_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # of the negatives (the web), of which DCLM keeps 0.1


def roc(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(share of negatives kept, share of positives kept, threshold), all float64 [K], by descending threshold; a
    text is kept whose score is at least the threshold. The first point keeps none."""
    order = np.argsort(-scores, kind="stable")
    ordered, right = scores[order], labels[order]
    last = np.concatenate([ordered[1:] != ordered[:-1], [True]]) if len(ordered) else np.zeros(0, bool)
    positives, negatives = np.cumsum(right)[last], np.cumsum(~right)[last]
    rates = (np.concatenate([[0], each]) / max(total, 1) for each, total in (
        (negatives, (~labels).sum()), (positives, labels.sum())))  # fmt: skip
    false, true = rates
    return false, true, np.concatenate([[np.inf], ordered[last]])


def area(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties half: the area under the ROC curve."""
    false, true, _ = roc(scores, labels)
    return float(np.trapezoid(true, false))


def calibration(scores: np.ndarray, labels: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """By score in `bins` equal parts of 0 to 1: texts, mean score and share of positives, where there are any."""
    which = np.minimum((scores * bins).astype(int), bins - 1)
    rows = []
    for number in np.unique(which).tolist():
        mine = which == number
        rows.append({
            "texts": int(mine.sum()),
            "mean_score": float(scores[mine].mean()),
            "positives": float(labels[mine].mean()),
        })  # fmt: skip
    return rows


def calibration_error(scores: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Mean distance of score and share of positives, weighted by texts (expected calibration error)."""
    rows = calibration(scores, labels, bins)
    return sum(row["texts"] * abs(row["mean_score"] - row["positives"]) for row in rows) / max(len(scores), 1)


def thresholds(scores: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """For each of KEEP_SHARES the score from which on about that share of the negatives stays, and what stays of the
    positives there; and the same at a score of a half."""
    negatives, positives = np.sort(scores[~labels]), scores[labels]
    wanted = [float(np.quantile(negatives, 1 - share)) for share in KEEP_SHARES] if len(negatives) else []
    return [
        {
            "min_score": value,
            "negatives_kept": float((negatives >= value).mean()) if len(negatives) else 0.0,
            "positives_kept": float((positives >= value).mean()) if len(positives) else 0.0,
        }
        for value in [*wanted, 0.5]
    ]


def picture(scores: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """The ROC curve, and the share of positives by score over how many texts have it, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    false, true, _ = roc(scores, labels)
    left.plot(false, true, color="#1f5fa8", linewidth=2)
    _diagonal(left)
    left.set(xlabel="negatives kept", ylabel="positives kept", xlim=(0, 1), ylim=(0, 1.02))
    left.set_title(f"ROC, area {area(scores, labels):.4f}")
    rows = calibration(scores, labels)
    counts = right.twinx()
    counts.hist(
        [scores[labels], scores[~labels]],
        bins=20,
        range=(0, 1),
        stacked=True,
        color=["#9cc3e6", "#e6c79c"],
        label=["positives", "negatives"],
        log=True,
    )
    counts.set_ylabel("held-out texts")
    counts.legend(loc="upper center", fontsize=8, frameon=False)
    right.set_zorder(counts.get_zorder() + 1)
    right.patch.set_visible(False)
    _diagonal(right)
    right.plot(
        [row["mean_score"] for row in rows],
        [row["positives"] for row in rows],
        marker="o",
        color="#1f5fa8",
        linewidth=2,
    )
    right.set(xlabel="score", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1.02))
    right.set_title(f"calibration, expected error {calibration_error(scores, labels):.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    temporary.replace(path)


def _diagonal(axes: Any) -> None:
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")

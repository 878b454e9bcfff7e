"""Trains a quality classifier: logistic regression on hashed words and pairs, the method of DCLM (Li et al. 2024,
arXiv:2406.11794, section 4.4) with a linear model, and scores that are probabilities (Platt 1999)."""

# N texts; labels are bool, True for the positive set

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.files import atomic_write, remove_leftovers
from configs.typed import ConfigError
from data.quality import curves
from data.quality.classifier import FORMAT, MODEL, Classifier
from data.quality.features import bucket_of, matrix
from data.words import words_and_marks

REPORT, PICTURE = "report.json", "report.png"
_TOLD = 15  # words for and against in the report
_TOLD_FROM = 2000  # texts that these words are looked for in
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained. The same texts and settings give the same model."""

    bits: int = 20  # 2^bits buckets
    max_words: int = 2000  # of a text
    l2: float = 1e-5  # times half the squared weights, beside the mean loss
    iterations: int = 200  # of L-BFGS, at most
    held_out: float = 0.2  # of the texts: a half for calibration, a half for the report

    def __post_init__(self):
        if not 8 <= self.bits <= 26:
            raise ValueError(f"bits={self.bits}: wanted 8 to 26")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: wanted more than 0 and less than 1")


def train_classifier(
    positive: Iterable[str],
    negative: Iterable[str],
    folder: Path,
    config: ClassifierConfig = ClassifierConfig(),
    log: Log | None = None,
) -> dict[str, Any]:
    """Writes model.npz, report.json and report.png into `folder`; returns the report, whose numbers are of texts that
    neither training nor calibration saw. Both sets weigh the same, whatever their sizes.

    Which part a text is in is a hash of it, so copies are in one part. Raises ConfigError where a part lacks one of
    the sets.
    """
    log = log or (lambda line: print(line, file=sys.stderr, flush=True))
    remove_leftovers(folder)
    sets = [(text, label) for texts, label in ((positive, True), (negative, False)) for text in texts]
    sets = [(text, label) for text, label in sets if text.strip()]
    parts: dict[str, list[tuple[str, bool]]] = {"train": [], "calibration": [], "test": []}
    for text, label in sets:
        parts[_part_of(text, config.held_out)].append((text, label))
    for name, members in parts.items():
        for label, what in ((True, "positive"), (False, "negative")):
            if not any(mine == label for _, mine in members):
                raise ConfigError(
                    f"no {what} text fell into the {name} part: there are {len(sets)} texts in all. Give more "
                    "texts (files of many documents: JSONL, Parquet, folders), or another held_out."
                )
    log(f"{len(sets):,} texts: " + ", ".join(f"{len(v):,} {k}" for k, v in parts.items()))
    model = _fit(*_split(parts["train"]), config, log)
    model = _calibrated(model, *_split(parts["calibration"]))
    _save(model, folder)
    texts, labels = _split(parts["test"])
    report = _report(model, texts, labels, config, parts)
    curves.picture(model.scores(texts), labels, folder / PICTURE)
    atomic_write(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _fit(texts: Sequence[str], labels: np.ndarray, config: ClassifierConfig, log: Log) -> Classifier:
    """The minimum of the weighted mean of log(1 + exp(-margin)) plus the penalty, which is unique."""
    from scipy.optimize import minimize
    from scipy.special import expit

    began = time.monotonic()
    rows = _matrix_with_progress(texts, config, log)
    used = np.unique(rows.indices)
    narrow = rows[:, used]
    signs = np.where(labels, 1.0, -1.0)
    weights = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    done = 0

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (narrow @ parameters[:-1].astype(np.float32) + parameters[-1])  # float64 copies all
        slope = -weights * signs * expit(-margins)
        value = float(weights @ np.logaddexp(0, -margins))
        penalty = 0.5 * config.l2 * float(parameters[:-1] @ parameters[:-1])
        gradient = np.append(narrow.T @ slope.astype(np.float32) + config.l2 * parameters[:-1], slope.sum())
        return value + penalty, gradient

    def tell(intermediate_result: Any) -> None:
        nonlocal done
        done += 1
        if done % 20 == 0:
            rate = done / (time.monotonic() - began)
            left = (config.iterations - done) / rate
            log(
                f"step {done}/{config.iterations}: loss {intermediate_result.fun:.5f}, at most {left:.0f} s left"
            )

    start = np.zeros(len(used) + 1)
    options = {"maxiter": config.iterations, "ftol": 1e-8, "gtol": 1e-6}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", callback=tell, options=options)
    full = np.zeros(1 << config.bits, np.float32)
    full[used] = found.x[:-1]
    log(f"fitted in {done} steps, {time.monotonic() - began:.1f} s: loss {found.fun:.5f}")
    return Classifier(full, float(found.x[-1]), 1.0, 0.0, config.bits, config.max_words)


def _matrix_with_progress(texts: Sequence[str], config: ClassifierConfig, log: Log) -> Any:
    from scipy.sparse import vstack

    began, parts = time.monotonic(), []
    for at in range(0, len(texts), 4096):
        parts.append(matrix(texts[at : at + 4096], config.bits, config.max_words))
        done, seconds = min(at + 4096, len(texts)), time.monotonic() - began
        left = seconds / done * (len(texts) - done)
        log(f"features: {done:,}/{len(texts):,} texts, {done / max(seconds, 1e-9):,.0f}/s, {left:.0f} s left")
    return vstack(parts, format="csr")


def _calibrated(model: Classifier, texts: Sequence[str], labels: np.ndarray) -> Classifier:
    """The model with slope and offset from texts it was not fitted to; targets are Platt's, so that scores stay
    inside 0 and 1 even where the sets are fully apart."""
    from scipy.optimize import minimize

    margins = model.margins(texts)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    targets = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    weights = np.where(labels, 0.5 / positives, 0.5 / negatives)

    def loss(parameters: np.ndarray) -> float:
        z = parameters[0] * margins + parameters[1]
        return float(weights @ (np.logaddexp(0, z) - targets * z))

    slope, offset = minimize(loss, np.array([1.0, 0.0]), method="Nelder-Mead", options={"maxiter": 2000}).x
    return dataclasses.replace(model, slope=float(slope), offset=float(offset))


def _report(
    model: Classifier, texts: Sequence[str], labels: np.ndarray, config: ClassifierConfig, parts: dict
) -> dict[str, Any]:
    began = time.perf_counter()
    scores = model.scores(texts)
    seconds = time.perf_counter() - began
    clipped = np.clip(scores, 1e-12, 1 - 1e-12)
    favour, against = _telling_words(model, [text for text, _ in parts["train"]][:: _stride(parts["train"])])
    return {
        "area_under_roc": curves.area(scores, labels),
        "accuracy_at_half": float(((scores >= 0.5) == labels).mean()),
        "log_loss_nats": float(-np.log(np.where(labels, clipped, 1 - clipped)).mean()),
        "brier": float(((scores - labels) ** 2).mean()),
        "calibration_error": curves.calibration_error(scores, labels),
        "calibration": curves.calibration(scores, labels),
        "thresholds": curves.thresholds(scores, labels),
        "texts": {
            name: {"positive": sum(label for _, label in members), "negative": sum(not x for _, x in members)}
            for name, members in parts.items()
        },
        "texts_per_second": round(len(texts) / max(seconds, 1e-9)),
        "words_for": favour,
        "words_against": against,
        "config": dataclasses.asdict(config),
    }


def _telling_words(model: Classifier, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of the texts with the highest and the lowest weight, of those in three texts at least."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in set(words_and_marks(text)[: model.max_words]):
            counts[word] = counts.get(word, 0) + 1
    often = sorted(word for word, count in counts.items() if count >= 3)
    often.sort(key=lambda word: float(model.weights[bucket_of(word, model.bits)]))
    return often[::-1][:_TOLD], often[:_TOLD]


def _stride(members: Sequence[Any]) -> int:
    return max(1, len(members) // _TOLD_FROM)


def _part_of(text: str, held_out: float) -> str:
    point = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") / 2**64
    if point >= held_out:
        return "train"
    return "calibration" if point < held_out / 2 else "test"


def _split(members: Sequence[tuple[str, bool]]) -> tuple[list[str], np.ndarray]:
    return [text for text, _ in members], np.array([label for _, label in members], bool)


def _save(model: Classifier, folder: Path) -> None:
    file = io.BytesIO()
    facts: dict[str, Any] = {"bias": model.bias, "slope": model.slope, "offset": model.offset}
    facts |= {"bits": model.bits, "max_words": model.max_words}
    np.savez_compressed(file, weights=model.weights, format=FORMAT, **facts)
    atomic_write(folder / MODEL, file.getvalue())

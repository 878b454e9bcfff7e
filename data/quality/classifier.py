"""The filter that keeps what a classifier of `python -m data.quality train` takes for one of its positive texts."""

# N texts

from __future__ import annotations

import dataclasses
import functools
import os
import zipfile
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from configs.typed import ConfigError
from data import storage
from data.documents import Document, DocumentType
from data.quality.features import features
from data.stage import Filter, Signals

FORMAT = "crucible-classifier-1"
MODEL = "model.npz"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Weights of hashed words and pairs; slope and offset turn a margin into a calibrated one."""

    weights: np.ndarray  # float32 [2^bits]
    bias: float
    slope: float
    offset: float
    bits: int
    max_words: int

    def margins(self, texts: Sequence[str]) -> np.ndarray:
        """Before calibration, float64 [N]."""
        found = (features(text, self.bits, self.max_words) for text in texts)
        return np.array([float(self.weights[buckets] @ values) + self.bias for buckets, values in found])

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """The probability that a text is of the positive set, where both sets are as frequent: float64 [N]."""
        return 1 / (1 + np.exp(-np.clip(self.slope * self.margins(texts) + self.offset, -500, 500)))


class ByClassifier(Filter):
    """A filter whose one signal is the score of the classifier in the folder `model`."""

    model: str
    measured_by: ClassVar[tuple[str, ...]] = ("model",)

    def files(self) -> tuple[str, ...]:
        return (model_file(self.model, type(self).__name__),)

    def signals(self, text: str) -> Signals:
        return {"score": float(load_classifier(*self.files()).scores([text])[0])}

    def signals_of(self, documents: Sequence[Document]) -> list[Signals]:
        scores = load_classifier(*self.files()).scores([document["text"] for document in documents])
        return [{"score": score} for score in scores.tolist()]


@dataclasses.dataclass(frozen=True)
class QualityClassifier(ByClassifier):
    """Keeps documents whose score is at least `min_score`; report.json beside the model says what share of either set
    a threshold keeps. (DCLM's 0.018112 belongs to its own, uncalibrated model.)"""

    model: str = ""  # the folder that training wrote
    min_score: float = 0.5
    applies_to: DocumentType = "prose"

    def reason(self, signals: Signals) -> str | None:
        return "quality: low score" if signals["score"] < self.min_score else None


def model_file(folder: str, stage: str) -> str:
    """The file of a model folder. Raises ConfigError where none is given or it is not there."""
    if not folder:
        raise ConfigError(
            f'{stage} has no model: give {{"kind": "{stage}", "model": FOLDER}} with a folder that '
            "`python -m data.quality train --positive FILES --negative FILES --out=FOLDER` wrote."
        )
    path = folder if folder.endswith(".npz") else os.path.join(folder, MODEL)
    storage.check_exists(path)
    return path


def load_classifier(path: str) -> Classifier:
    """A classifier from its file, read once in a process. Raises ConfigError for another kind of file."""
    return _load(path, storage.state(path))


@functools.lru_cache(maxsize=4)
def _load(path: str, state: tuple[int, int]) -> Classifier:
    try:
        with storage.open_bytes(path) as file:
            held = np.load(file, allow_pickle=False)
            if str(held["format"]) != FORMAT:
                raise ValueError(f"format {held['format']}")
            numbers = {name: float(held[name]) for name in ("bias", "slope", "offset")}
            sizes = {name: int(held[name]) for name in ("bits", "max_words")}
            return Classifier(weights=held["weights"], **numbers, **sizes)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no classifier of `python -m data.quality train`: {error}") from error

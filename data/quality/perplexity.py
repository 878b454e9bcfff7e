"""Filters by perplexity: under an n-gram model, in CCNet's thirds (Wenzek et al. 2020, arXiv:1911.00359, section 3.4),
or under a model of Crucible's own."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from configs.typed import ConfigError
from data import storage
from data.callables import named
from data.documents import Document, DocumentType
from data.quality.ngram_lm import UNKNOWN, NgramModel, load_ngrams
from data.stage import Filter, Signals

NGRAMS = "ngrams.npz"
HEAD, TAIL = 30, 60  # CCNet's percentiles of perplexity: below the first is head, above the second is tail
Third = Literal["head", "middle", "tail"]
_TOGETHER = 256  # texts looked up at once


@dataclasses.dataclass(frozen=True)
class NgramPerplexity(Filter):
    """Keeps documents of the wanted thirds. Head is a perplexity of at most `head`, tail one above `tail`: default
    the percentiles 30 and 60 that `train-ngram --calibrate` found in texts like those that are filtered."""

    model: str = ""  # the folder that training wrote
    keep: tuple[Third, ...] = ("head", "middle")
    head: float | None = None
    tail: float | None = None
    max_unknown: float = 1.0  # of the words
    applies_to: DocumentType = "prose"

    measured_by: ClassVar[tuple[str, ...]] = ("model",)

    def files(self) -> tuple[str, ...]:
        return (ngram_file(self.model),)

    def signals(self, text: str) -> Signals:
        return measure(load_ngrams(*self.files()), [text])[0]

    def signals_of(self, documents: Sequence[Document]) -> list[Signals]:
        model, found = load_ngrams(*self.files()), []
        for at in range(0, len(documents), _TOGETHER):
            found += measure(model, [document["text"] for document in documents[at : at + _TOGETHER]])
        return found

    def reason(self, signals: Signals) -> str | None:
        if signals["unknown"] > self.max_unknown:
            return "perplexity: too many unknown words"
        third = self.third(signals["perplexity"])
        return None if third in self.keep else f"perplexity: {third}"

    def third(self, perplexity: float) -> Third:
        percentiles = load_ngrams(*self.files()).percentiles if None in (self.head, self.tail) else (0.0, 0.0)
        if percentiles is None:
            raise ConfigError(
                f"NgramPerplexity: {self.model} knows no percentiles. Give head and tail, or train it with "
                "--calibrate TEXTS, of the kind that is to be filtered."
            )
        head = percentiles[0] if self.head is None else self.head
        tail = percentiles[1] if self.tail is None else self.tail
        return "head" if perplexity <= head else "tail" if perplexity > tail else "middle"


@dataclasses.dataclass(frozen=True)
class CruciblePerplexity(Filter):
    """Keeps documents whose bits per byte under a model lie between two bounds. `scorer` names a function
    "module:function" that takes the model's path and gives one from texts to nats per byte."""

    model: str = ""  # run, checkpoint or Hugging Face folder
    scorer: str = "evals.text_scorer:scorer"
    min_bits_per_byte: float = 0.0
    max_bits_per_byte: float = math.inf
    max_characters: int = 8000  # of a text that are scored
    batch: int = 64
    applies_to: DocumentType = "prose"

    measured_by: ClassVar[tuple[str, ...]] = ("model", "scorer", "max_characters")

    def files(self) -> tuple[str, ...]:
        if not self.model:
            raise ConfigError("CruciblePerplexity has no model: give model=FOLDER of a run or checkpoint.")
        storage.check_exists(self.model)
        return (self.model,)

    def signals(self, text: str) -> Signals:
        return self._measure([text])[0]

    def signals_of(self, documents: Sequence[Document]) -> list[Signals]:
        found = []
        for at in range(0, len(documents), self.batch):
            found += self._measure([document["text"] for document in documents[at : at + self.batch]])
        return found

    def reason(self, signals: Signals) -> str | None:
        if signals["bits_per_byte"] < self.min_bits_per_byte:
            return "perplexity: too likely"
        return "perplexity: too unlikely" if signals["bits_per_byte"] > self.max_bits_per_byte else None

    def _measure(self, texts: Sequence[str]) -> list[Signals]:
        nats = _scorer(self.scorer, self.model)([text[: self.max_characters] for text in texts])
        return [{"nats_per_byte": float(x), "bits_per_byte": float(x) / math.log(2)} for x in nats]


def measure(model: NgramModel, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Nats per word (or byte), the end of the text among them, its exponential, and the share of unknown words."""
    found = []
    for text, nats in zip(texts, model.nats(texts), strict=True):
        mean = float(nats.mean())
        unknown = float((model.encode(text)[:-1] == UNKNOWN).mean()) if len(nats) > 1 else 0.0
        found.append({"nats_per_word": mean, "perplexity": math.exp(mean), "unknown": unknown})
    return found


def percentiles(model: NgramModel, texts: Sequence[str]) -> tuple[float, float]:
    """The perplexities up to which HEAD and TAIL in a hundred of the texts lie."""
    found = [measure(model, texts[at : at + _TOGETHER]) for at in range(0, len(texts), _TOGETHER)]
    values = [signals["perplexity"] for part in found for signals in part]
    low, high = np.percentile(values, (HEAD, TAIL)).tolist()
    return low, high


def ngram_file(folder: str) -> str:
    """The file of a model folder. Raises ConfigError where none is given or it is not there."""
    if not folder:
        raise ConfigError(
            "NgramPerplexity has no model: give model=FOLDER that `python -m data.quality train-ngram TEXTS "
            "--out=FOLDER` wrote."
        )
    path = folder if folder.endswith(".npz") else os.path.join(folder, NGRAMS)
    storage.check_exists(path)
    return path


@functools.lru_cache(maxsize=2)
def _scorer(name: str, model: str) -> Callable[[Sequence[str]], Sequence[float]]:
    """Made once in a process: it holds a model."""
    return named(name)(model)

"""`python -m data.related`: which documents belong together, and rows that keep them so for long contexts.

Beside the shards of a token dataset may lie
    groups.npy   int64 [N], the group of each document (repository, domain, book): packing="related"
    order.npy    int64 [N], a permutation in which neighbours are related, e.g. a walk from each document to the
                 nearest one not yet visited (Shi et al. 2024, "In-Context Pretraining", arXiv:2310.10638)
    scores.npy   float32 [N], what a curriculum by score goes by
This command writes the first and the last from the metadata of the text that the tokens were made of.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np

import configs
from configs.files import atomic_write
from data.packing import ConcatAndSplit, Piece, shuffled
from data.shards import Dataset, DatasetError, open_dataset

DESCRIPTION = __doc__ or ""
GROUPS, ORDER, SCORES = "groups.npy", "order.npy", "scores.npy"


class RelatedRows(ConcatAndSplit):
    """Rows of T tokens cut from documents of which those of a group follow each other.

    Each epoch shuffles groups and rows, never the documents within a group. A document that follows one of its own
    group in a row is joined to its segment, so attention crosses from one to the other.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        seq_len: int,
        seed: int,
        shuffle: bool,
        groups: np.ndarray | None = None,
        order: np.ndarray | None = None,
        join: bool = True,
    ):
        """`groups`: int64 [N]; None: all are one group. `order`: a permutation, int64 [N]; None: as they are.
        `join`: one segment for a group; else one for each document."""
        super().__init__(lengths, seq_len, seed, shuffle)
        n = len(self.lengths)
        groups = np.zeros(n, np.int64) if groups is None else groups
        names, self._groups = np.unique(groups, return_inverse=True)
        self._count, self._join = len(names), join
        walk = np.arange(n) if order is None else np.asarray(order)
        self._walk = walk[np.argsort(self._groups[walk], kind="stable")]

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not self.shuffle:
            return self._walk, np.cumsum(self.lengths[self._walk]), np.arange(self.rows_per_epoch)
        places = np.empty(self._count, np.int64)
        places[shuffled(self._count, self.seed, epoch, 1)] = np.arange(self._count)
        order = self._walk[np.argsort(places[self._groups[self._walk]], kind="stable")]
        return order, np.cumsum(self.lengths[order]), shuffled(self.rows_per_epoch, self.seed, epoch, 2)

    def row(self, index: int) -> list[Piece]:
        pieces = super().row(index)
        if not self._join:
            return pieces
        groups = self._groups
        return pieces[:1] + [
            piece._replace(joined=bool(groups[before.document] == groups[piece.document]))
            for before, piece in zip(pieces, pieces[1:])
        ]


def read_groups(dataset: Dataset) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(groups, order) of a token dataset; one of them may be None. Raises DatasetError where both are."""
    groups, order = _read(dataset, GROUPS), _read(dataset, ORDER)
    if groups is None and order is None:
        raise DatasetError(
            f"{dataset.folder} does not say which of its documents are related: there is no {GROUPS} and no {ORDER}. "
            "Write the groups with python -m data.related, or an order with data.related.write_order."
        )
    return groups, order


def read_scores(dataset: Dataset) -> np.ndarray:
    """float [N]. Raises DatasetError where there are none."""
    scores = _read(dataset, SCORES)
    if scores is None:
        raise DatasetError(
            f"{dataset.folder}: there is no {SCORES} to order documents by. Write it with python -m data.related "
            '--config.score=FIELD, or set curriculum.by="length".'
        )
    return scores


def write_order(folder: str | os.PathLike, order: np.ndarray) -> Path:
    """Writes order.npy beside a dataset. Raises DatasetError for what is no permutation of its documents."""
    dataset = open_dataset(folder)
    order = np.asarray(order)
    if order.shape != (len(dataset),) or not np.array_equal(np.sort(order), np.arange(len(dataset))):
        raise DatasetError(
            f"{folder}: the order given has shape {order.shape}; wanted a permutation of range({len(dataset)})."
        )
    return _write(dataset, ORDER, order.astype(np.int64))


def write_groups(
    text_folder: str | os.PathLike, folder: str | os.PathLike, field: str, score: str = ""
) -> dict[str, int]:
    """Groups documents by `metadata[field]` of their text, those without one each alone; and their scores.

    Returns {"documents", "groups", "alone"} where groups are written and {"without_score"} where scores are.

    Raises DatasetError where the tokens were not made of
    that text, or no document has the field.
    """
    text, dataset = open_dataset(text_folder), open_dataset(folder)
    if dataset.manifest.get("input") != text.manifest["sha256"]:
        raise DatasetError(
            f"{folder} was not made of {text_folder}: name the text that it was tokenised from."
        )
    numbers: dict[str, int] = {}
    groups, scores = np.empty(len(text), np.int64), np.empty(len(text), np.float32)
    alone = without = 0
    for i, document in enumerate(text):
        metadata = document.get("metadata") or {}
        name = metadata.get(field)
        alone += name is None
        groups[i] = numbers.setdefault(f"={name}" if name is not None else f"alone {i}", len(numbers))
        value = metadata.get(score)
        number = isinstance(value, (int, float)) and np.isfinite(value)
        without += not number
        scores[i] = value if number else 0.0
    for name, missing in ((field, alone), (score, without)):
        if name and len(text) and missing == len(text):
            raise DatasetError(f"{text_folder}: no document has metadata[{name!r}].")
    if field:
        _write(dataset, GROUPS, groups)
    if score:
        _write(dataset, SCORES, scores)
    counts = {"documents": len(text), "groups": len(numbers), "alone": alone} if field else {}
    return counts | ({"without_score": without} if score else {})


def _read(dataset: Dataset, name: str) -> np.ndarray | None:
    path = dataset.folder / name
    if not path.is_file():
        return None
    values = np.load(path)
    if values.shape != (len(dataset),):
        raise DatasetError(
            f"{path} has shape {values.shape} for {len(dataset)} documents: the dataset was written again since. "
            "Write it again too."
        )
    return values


def _write(dataset: Dataset, name: str, values: np.ndarray) -> Path:
    import io

    buffer = io.BytesIO()
    np.save(buffer, values)
    return atomic_write(dataset.folder / name, buffer.getvalue())


@dataclasses.dataclass(frozen=True)
class RelatedConfig:
    """A text dataset, the token dataset made of it, and the names in its documents' metadata."""

    text: str = ""  # text dataset, e.g. runs/corpus/text/train
    tokens: str = ""  # token dataset, e.g. runs/corpus/tokens/train
    field: str = "group"  # what documents of a group share; empty: no groups are written
    score: str = ""  # a number; empty: no scores are written


def main(config: RelatedConfig, workdir: Path | None) -> int:
    if not config.text or not config.tokens:
        raise configs.ConfigError("give config.text and config.tokens: a text dataset and its tokens.")
    counts = write_groups(config.text, config.tokens, config.field, config.score)
    print(f"{config.tokens}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(configs.run(main, RelatedConfig, description=DESCRIPTION, workdir_required=False))

"""Rows of a dataset by their number, through all epochs: packed documents, preference pairs, labelled dialogues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from data.packing import PairOrder, Piece
from data.shards import Dataset, TokenRecord
from data.spans import SpanCorrupted

Batch = dict[str, np.ndarray]


class PackedRows:
    """Rows [seq_len] of packed documents."""

    rows_per_example = 1

    def __init__(self, dataset: Dataset | SpanCorrupted, packer: Any, seq_len: int, pad_id: int):
        self.packer, self._dataset, self._seq_len, self._pad_id = packer, dataset, seq_len, pad_id

    def __getitem__(self, index: int) -> Batch:
        pieces = self.packer.row(int(index))
        documents = [piece.document for piece in pieces]
        if isinstance(self._dataset, SpanCorrupted):
            records = self._dataset.read(documents, int(index) // self.packer.rows_per_epoch)
        else:
            records = self._dataset.read(documents)
        return make_row(pieces, records, self._seq_len, self._pad_id)


class PreferencePairs:
    """Two rows [2, seq_len] each, chosen and rejected, neither packed with anything."""

    rows_per_example = 2

    def __init__(self, dataset: Dataset, packer: PairOrder, seq_len: int, pad_id: int):
        self.packer, self._dataset, self._seq_len, self._pad_id = packer, dataset, seq_len, pad_id

    def __getitem__(self, index: int) -> Batch:
        rows = [self._row(record) for record in self._dataset[self.packer.pair(int(index))]]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _row(self, record: TokenRecord) -> Batch:
        return row_of(record, self._seq_len, self._pad_id)


class LabelledRows:
    """Rows [seq_len] of one dialogue each, with `labels` int32 []: 1 desired, 0 not."""

    rows_per_example = 1

    def __init__(self, dataset: Dataset, packer: PairOrder, seq_len: int, pad_id: int):
        self.packer, self._dataset, self._seq_len, self._pad_id = packer, dataset, seq_len, pad_id

    def __getitem__(self, index: int) -> Batch:
        record, label = self._dataset[self.packer.pair(int(index))]
        return row_of(record, self._seq_len, self._pad_id) | {"labels": np.asarray(label, np.int32)}


class SteppedRows:
    """Rows [seq_len] of one dialogue each; the tokens that count end a step, and `step_labels` has their labels."""

    rows_per_example = 1

    def __init__(self, dataset: Dataset, packer: PairOrder, seq_len: int, pad_id: int):
        self.packer, self._dataset, self._seq_len, self._pad_id = packer, dataset, seq_len, pad_id

    def __getitem__(self, index: int) -> Batch:
        record, labels = self._dataset[self.packer.pair(int(index))]
        row = row_of(record, self._seq_len, self._pad_id)
        ends = np.flatnonzero(record.mask)
        within = ends < self._seq_len
        # a label stands at its step's own last token, where other rows count the token before a target
        weights, at_ends = np.zeros(self._seq_len, np.float32), np.zeros(self._seq_len, np.float32)
        weights[ends[within]], at_ends[ends[within]] = 1, labels[within]
        return row | {"loss_weights": weights, "step_labels": at_ends}


class Mixed:
    """Example g is that of the source and index which `place` gives it; beyond `filled` there are empty rows."""

    def __init__(
        self,
        sources: list[Any],
        place: Callable[[int], tuple[int, int]],
        length: int,
        filled: int,
        empty: Batch,
    ):
        self._sources, self._place, self._length = sources, place, length
        self._filled, self._empty = filled, empty

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, example: int) -> Batch:
        if example >= self._filled:
            return self._empty
        source, index = self._place(int(example))
        return self._sources[source][index]


def empty_example(kind: str, seq_len: int, pad_id: int) -> Batch:
    """An example of kind `kind` that has no weight."""
    row = make_row([], [], seq_len, pad_id)
    if kind == "preference":
        return {key: np.stack([value, value]) for key, value in row.items()}
    if kind == "steps":
        return row | {"step_labels": np.zeros(seq_len, np.float32)}
    return row | {"labels": np.asarray(0, np.int32)} if kind == "labelled" else row


def row_of(record: TokenRecord, seq_len: int, pad_id: int) -> Batch:
    """One document alone in a row, cut off where it is longer."""
    return make_row([Piece(0, 0, min(len(record.tokens), seq_len))], [record], seq_len, pad_id)


def make_row(pieces: list[Piece], records: list[TokenRecord], seq_len: int, pad_id: int) -> Batch:
    """One row, every array [seq_len], of pieces of documents. `records[i]` is the document of `pieces[i]`."""
    tokens = np.full(seq_len, pad_id, np.int32)
    targets = np.full(seq_len, pad_id, np.int32)
    loss_weights = np.zeros(seq_len, np.float32)
    segment_ids = np.zeros(seq_len, np.int32)
    positions = np.zeros(seq_len, np.int32)
    at = segment = begun = 0
    for piece, record in zip(pieces, records, strict=True):
        n = piece.stop - piece.start
        if not (piece.joined and at):
            segment, begun = segment + 1, at
        else:  # the last token of the document before is followed by this one's first
            targets[at - 1] = record.tokens[piece.start]
            loss_weights[at - 1] = 1 if record.mask is None else record.mask[piece.start]
        tokens[at : at + n] = record.tokens[piece.start : piece.stop]
        segment_ids[at : at + n] = segment
        positions[at : at + n] = np.arange(at - begun, at - begun + n)
        # The token after a cut is still a target: it is the document's next token, though it is in another
        # row.
        following = slice(piece.start + 1, piece.stop + 1)
        m = len(record.tokens[following])
        targets[at : at + m] = record.tokens[following]
        loss_weights[at : at + m] = 1 if record.mask is None else record.mask[following]
        at += n
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": loss_weights,
        "segment_ids": segment_ids,
        "positions": positions,
    }


def stack(rows: list[Batch]) -> Batch:
    """[n, T] of rows [T], [2n, T] of pairs [2, T]."""
    join = np.concatenate if rows[0]["tokens"].ndim == 2 else np.stack
    return {key: join([row[key] for row in rows]) for key in rows[0]}

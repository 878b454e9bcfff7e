"""Deterministic batches from token datasets through Grain: packed, mixed by weight, sharded by host, resumed
exactly.

Example g of a run is a pure function of (datasets, seq_len, seed, g). A step takes the next `batch_size`
examples and host p of P takes the p-th block of them, so the global batch does not depend on the number of
hosts, and the position is one number: how many examples came before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from data.packing import ConcatAndSplit, FirstFit, PairOrder, Piece, TooLong
from data.shards import Dataset, DatasetError, TokenRecord, open_dataset

Batch = dict[str, np.ndarray]
BatchKind = Literal["lm", "preference"]


def make_batches(
    mixture: Mapping[str | os.PathLike, float],
    batch_size: int,
    seq_len: int,
    seed: int,
    *,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    kind: BatchKind = "lm",
    shuffle: bool = True,
    num_epochs: int | None = None,
    too_long: TooLong = "drop",
    pad_id: int = 0,
    num_threads: int = 2,
    prefetch: int = 16,
) -> BatchIterator:
    """An iterator of this host's part of each global batch.

    A batch is a dict of [batch_size / process_count, seq_len] arrays:
        tokens int32; targets int32, the next token of the same document (`pad_id` where there is none);
        loss_weights float32, 1 where a target counts, 0 on padding, on a document's last token and where its
        mask says so; segment_ids int32, 1, 2, ... for the documents of a row, 0 on padding; positions int32,
        from 0 in each segment. In kind "preference" rows 2i and 2i + 1 are the chosen and the rejected answer
        of one pair.

    Args:
        mixture: dataset folder to weight; rows are drawn in proportion. Weights need not sum to one.
        batch_size: rows of a global batch; for preferences even, also per host.
        start: rows of this run that were consumed before (`iterator.position`); finding it costs nothing.
        num_epochs: None runs for ever. A number ends there, the last batch filled up with empty rows of
            weight 0; a mixture ends when its first dataset does.
        too_long: dialogues of more than `seq_len` tokens are left out or cut off; `iterator.report` counts
            them.

    Raises DatasetError for folders that do not fit, ValueError for sizes that do not divide.
    """
    import grain

    rows_per_example = 2 if kind == "preference" else 1
    _check_sizes(batch_size, seq_len, start, process_index, process_count, rows_per_example)
    sources, weights, report = [], [], {}
    for i, (folder, weight) in enumerate(_positive(mixture).items()):
        source = _open_source(
            open_dataset(folder), kind, seq_len, seed + 7919 * i, shuffle, num_epochs, too_long, pad_id
        )
        sources.append(grain.MapDataset.source(source))
        weights.append(weight)
        packer = source.packer
        report[str(folder)] = {"rows_per_epoch": packer.rows_per_epoch * rows_per_example, "weight": weight}
        report[str(folder)] |= {"dropped": packer.dropped, "truncated": getattr(packer, "truncated", 0)}
    rows = sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, weights)
    per_step = batch_size // rows_per_example
    if num_epochs is not None:
        rows = grain.MapDataset.source(
            _Filled(rows, -(-len(rows) // per_step) * per_step, seq_len, kind, pad_id)
        )
    rows = rows[start // rows_per_example :]
    batches = rows.batch(per_step // process_count, batch_fn=_stack)
    batches = batches[process_index::process_count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    return BatchIterator(batches.to_iter_dataset(options), batch_size, start, report)


class BatchIterator(Iterator[Batch]):
    """Batches and where they are.

    Attributes:
        position: rows of the global run consumed so far; give it back as `start`, on any number of hosts.
        report: for each folder {"rows_per_epoch", "dropped", "truncated", "weight"}.
        dataset: the `grain.IterDataset` that they come from.
    """

    def __init__(self, dataset: Any, batch_size: int, start: int, report: dict[str, dict[str, Any]]):
        self.dataset, self.position, self.report = dataset, start, report
        self._batches, self._batch_size = iter(dataset), batch_size

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.position += self._batch_size
        return batch


def _check_sizes(
    batch_size: int, seq_len: int, start: int, process_index: int, process_count: int, rows_per_example: int
) -> None:
    if seq_len < 2 or batch_size < 1:
        raise ValueError(f"batch_size={batch_size} and seq_len={seq_len}: wanted at least 1 and 2")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} of process_count={process_count}")
    if batch_size % (process_count * rows_per_example):
        what = f"{process_count} hosts" + (" of whole pairs" if rows_per_example == 2 else "")
        raise ValueError(
            f"batch_size={batch_size} can't be shared by {what}: use a multiple of "
            f"{process_count * rows_per_example}"
        )
    if start < 0 or start % rows_per_example:
        raise ValueError(
            f"start={start} is no position: wanted a multiple of {rows_per_example}, not negative"
        )


def _positive(mixture: Mapping[str | os.PathLike, float]) -> dict[str | os.PathLike, float]:
    """Weights that sum to one, zeros left out."""
    bad = {str(k): w for k, w in mixture.items() if not 0 <= w < float("inf")}
    total = sum(mixture.values())
    if bad or not total > 0:
        raise ValueError(f"mixture weights must be finite, none negative, and not all zero: {dict(mixture)}")
    return {folder: weight / total for folder, weight in mixture.items() if weight > 0}


def _open_source(
    dataset: Dataset,
    kind: str,
    seq_len: int,
    seed: int,
    shuffle: bool,
    num_epochs: int | None,
    too_long: TooLong,
    pad_id: int,
) -> _PackedRows | _PreferencePairs:
    wanted = {"lm": ("tokens", "chat"), "preference": ("preference",)}
    if kind not in wanted:
        raise ValueError(f"kind={kind!r}; known are {', '.join(wanted)}")
    if dataset.kind not in wanted[kind]:
        raise DatasetError(
            f"{dataset.folder} is a dataset of kind {dataset.kind!r}; batches of kind {kind!r} are made of "
            f"{' or '.join(wanted[kind])}."
            + (" Run tokenize_dataset on it first." if dataset.kind == "text" else "")
        )
    if kind == "preference":
        source = _PreferencePairs(dataset, seq_len, seed, shuffle, num_epochs, too_long, pad_id)
    else:
        source = _PackedRows(dataset, seq_len, seed, shuffle, num_epochs, too_long, pad_id)
    if source.packer.rows_per_epoch == 0:
        raise DatasetError(
            f"{dataset.folder}: no row can be made of its {len(dataset)} records "
            f"({source.packer.dropped} are longer than seq_len={seq_len}). Raise seq_len or set "
            "too_long='truncate'."
        )
    return source


class _PackedRows:
    """Random access to packed rows, through all epochs."""

    def __init__(
        self,
        dataset: Dataset,
        seq_len: int,
        seed: int,
        shuffle: bool,
        num_epochs: int | None,
        too_long: TooLong,
        pad_id: int,
    ):
        self._dataset, self._seq_len, self._pad_id = dataset, seq_len, pad_id
        self.packer = (
            ConcatAndSplit(dataset.lengths, seq_len, seed, shuffle)
            if dataset.kind == "tokens"
            else FirstFit(dataset.lengths, seq_len, seed, shuffle, too_long)
        )
        self._length = _endless if num_epochs is None else self.packer.rows_per_epoch * num_epochs

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        pieces = self.packer.row(int(index))
        records = self._dataset.read([piece.document for piece in pieces])
        return make_row(pieces, records, self._seq_len, self._pad_id)


class _PreferencePairs:
    """Random access to pairs: two rows each, chosen and rejected, neither packed with anything."""

    def __init__(
        self,
        dataset: Dataset,
        seq_len: int,
        seed: int,
        shuffle: bool,
        num_epochs: int | None,
        too_long: TooLong,
        pad_id: int,
    ):
        self._dataset, self._seq_len, self._pad_id, self._seed, self._shuffle = (
            dataset,
            seq_len,
            pad_id,
            seed,
            shuffle,
        )
        self.packer = PairOrder(dataset.lengths, seq_len, seed, shuffle, too_long)
        self._length = _endless if num_epochs is None else self.packer.rows_per_epoch * num_epochs

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        pair = self._dataset[self.packer.pair(int(index))]
        rows = [
            make_row([Piece(0, 0, min(len(r.tokens), self._seq_len))], [r], self._seq_len, self._pad_id)
            for r in pair
        ]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class _Filled:
    """`rows` followed by empty rows up to `length`."""

    def __init__(self, rows: Any, length: int, seq_len: int, kind: str, pad_id: int):
        self._rows, self._length = rows, length
        empty = make_row([], [], seq_len, pad_id)
        self._empty = {k: np.stack([v, v]) for k, v in empty.items()} if kind == "preference" else empty

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return self._rows[int(index)] if index < len(self._rows) else self._empty


def make_row(pieces: list[Piece], records: list[TokenRecord], seq_len: int, pad_id: int) -> Batch:
    """One row, every array [seq_len], of pieces of documents. `records[i]` is the document of `pieces[i]`."""
    tokens = np.full(seq_len, pad_id, np.int32)
    targets = np.full(seq_len, pad_id, np.int32)
    loss_weights = np.zeros(seq_len, np.float32)
    segment_ids = np.zeros(seq_len, np.int32)
    positions = np.zeros(seq_len, np.int32)
    at = 0
    for segment, (piece, record) in enumerate(zip(pieces, records, strict=True), start=1):
        n = piece.stop - piece.start
        tokens[at : at + n] = record.tokens[piece.start : piece.stop]
        segment_ids[at : at + n] = segment
        positions[at : at + n] = np.arange(n)
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


def _stack(rows: list[Batch]) -> Batch:
    """[n, T] of rows [T], [2n, T] of pairs [2, T]."""
    join = np.concatenate if rows[0]["tokens"].ndim == 2 else np.stack
    return {key: join([row[key] for row in rows]) for key in rows[0]}


_endless = 1 << 48  # rows; a mixture multiplies it, and the product must stay an index

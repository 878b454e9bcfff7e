"""Deterministic batches from token datasets through Grain: packed, mixed by weight, sharded by host, resumed
exactly.

Example g of a run is a pure function of (datasets, mixture, reading, seq_len, seed, g). A step takes the next
`batch_size` rows and host p of P takes the p-th block of them, so the global batch does not depend on the
number of hosts, and the position is one number: how many rows came before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from configs.typed import ConfigError
from data.best_fit import BestFit
from data.curriculum import curriculum_orders
from data.mixture import (
    BatchSpec,
    Curriculum,
    Mixture,
    Packing,
    Schedule,
    Size,
    as_mixture,
    make_schedule,
    sources_of,
)
from data.packing import ConcatAndSplit, FirstFit, Orders, PairOrder, TooLong
from data.related import RelatedRows, read_groups, read_scores
from data.rows import (
    Batch,
    LabelledRows,
    Mixed,
    PackedRows,
    PreferencePairs,
    SteppedRows,
    empty_example,
    stack,
)
from data.shards import Dataset, DatasetError, open_dataset
from data.spans import SpanCorrupted, SpanCorruption

BatchKind = Literal["lm", "preference", "labelled", "steps"]
Packer = ConcatAndSplit | FirstFit | BestFit


@dataclasses.dataclass(frozen=True)
class Reading:
    """How datasets become rows, and how they are read.

    packing: of token datasets. "concat" cuts the concatenated documents every `seq_len`; "best_fit" keeps
        documents whole that fit a row; "related" concatenates documents of a group (data/related.py). Dialogues
        are never cut: first fit, or best fit when that is asked for.
    join_related: in "related", a group's documents in a row are one segment; else one each.
    num_epochs: None runs for ever. A number ends there, the last batch filled up with empty rows of weight 0; a
        mixture ends when its first dataset does.
    too_long: dialogues of more than `seq_len` tokens are left out or cut off; `iterator.report` counts them.
    """

    kind: BatchKind = "lm"
    packing: Packing = "concat"
    join_related: bool = True
    curriculum: Curriculum | None = None
    spans: SpanCorruption | None = None  # of kind "lm", with packing "concat" or "best_fit" of whole texts
    shuffle: bool = True
    num_epochs: int | None = None
    too_long: TooLong = "drop"
    pad_id: int = 0
    num_threads: int = 2
    prefetch: int = 16  # batches


def make_batches(
    mixture: Mixture | Mapping[Any, float],
    batch_size: int,
    seq_len: int,
    seed: int,
    reading: Reading = Reading(),
    *,
    steps: int | None = None,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """An iterator of this host's part of each global batch.

    A batch is a dict of [batch_size / process_count, seq_len] arrays:
        tokens int32; targets int32, the next token of the same segment (`pad_id` where there is none);
        loss_weights float32, 1 where a target counts, 0 on padding, on a segment's last token and where its
        mask says so; segment_ids int32, 1, 2, ... for the documents of a row, 0 on padding; positions int32,
        from 0 in each segment. In kind "preference" rows 2i and 2i + 1 are the chosen and the rejected answer
        of one pair; in kind "labelled" `labels` int32 [batch_size / process_count] is 1 where a row is desired; in
        kind "steps" `step_labels` float32 are the labels of the tokens that count, the last of each step.

    Args:
        mixture: dataset folder to weight, or such mixtures in phases; rows are drawn in proportion. Weights
            need not sum to one.
        batch_size: rows of a global batch; for preferences even, also per host.
        steps: length of the run, for phases that start at a part of it and for a bound on epochs.
        start: rows of this run that were consumed before (`iterator.position`); finding it costs nothing.

    Raises DatasetError for folders that do not fit, ValueError for sizes that do not divide.
    """
    import grain

    rows_per_example = 2 if reading.kind == "preference" else 1
    _check_sizes(batch_size, seq_len, start, process_index, process_count, rows_per_example)
    per_step = batch_size // rows_per_example
    opened = open_mixture(mixture, per_step, seq_len, seed, reading, steps)
    examples = length = _endless
    if reading.num_epochs is not None:
        limits = [size.examples * reading.num_epochs for size in opened.sizes.values()]
        examples = opened.schedule.examples_within(limits)
        length = -(-examples // per_step) * per_step
    empty = empty_example(reading.kind, seq_len, reading.pad_id)
    place = opened.schedule.place
    mixed: Any = Mixed(list(opened.sources.values()), place, length, examples, empty)
    rows = grain.MapDataset.source(mixed)  # takes whatever has __len__ and __getitem__
    rows = rows[start // rows_per_example :]
    stacked: Any = stack  # its argument is a list, where grain says Sequence
    batches = rows.batch(per_step // process_count, batch_fn=stacked)
    batches = batches[process_index::process_count]
    options = grain.ReadOptions(
        num_threads=reading.num_threads, prefetch_buffer_size=reading.prefetch if reading.num_threads else 0
    )
    return BatchIterator(batches.to_iter_dataset(options), batch_size, start, opened)


def make_run_batches(spec: BatchSpec, steps: int, kind: BatchKind, **position: int) -> BatchIterator:
    """The batches of a run of `steps`, as its config says; `position` is start, process_index, process_count."""
    mixture, reading = spec.whole_mixture(), reading_of(spec, kind)
    return make_batches(mixture, spec.batch_size, spec.seq_len, spec.seed, reading, steps=steps, **position)


def reading_of(spec: BatchSpec, kind: BatchKind) -> Reading:
    return Reading(kind, spec.packing, spec.join_related, spec.curriculum, spec.spans)


class BatchIterator(Iterator[Batch]):
    """Batches and where they are.

    Attributes:
        position: rows of the global run consumed so far; give it back as `start`, on any number of hosts.
        opened: the sources, what an epoch of each holds, and the schedule of their mixture.
        dataset: the `grain.IterDataset` that they come from.
    """

    def __init__(self, dataset: Any, batch_size: int, start: int, opened: OpenMixture):
        self.dataset, self.position, self.opened = dataset, start, opened
        self._batches, self._batch_size = iter(dataset), batch_size

    @property
    def report(self) -> dict[str, dict[str, Any]]:
        """For each folder {"rows_per_epoch", "weight" (at the start), "dropped", "truncated"}."""
        return self.opened.report()

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.position += self._batch_size
        return batch


@dataclasses.dataclass(frozen=True)
class OpenMixture:
    """The sources of a mixture by folder, what an epoch of each holds, and when each has its turn."""

    sources: dict[str, PackedRows | PreferencePairs | LabelledRows | SteppedRows]
    sizes: dict[str, Size]
    schedule: Schedule

    def report(self) -> dict[str, dict[str, Any]]:
        return {
            folder: {
                "rows_per_epoch": source.packer.rows_per_epoch * source.rows_per_example,
                "weight": self.schedule.shares[0][i],
                "dropped": source.packer.dropped,
                "truncated": source.packer.truncated,
            }
            for i, (folder, source) in enumerate(self.sources.items())
        }


def open_mixture(
    mixture: Mixture | Mapping[Any, float],
    examples_per_step: int,
    seq_len: int,
    seed: int,
    reading: Reading = Reading(),
    steps: int | None = None,
) -> OpenMixture:
    """Opens the datasets, packs them and lays out the schedule; see `make_batches`."""
    mixture = as_mixture(mixture)
    sources, sizes = {}, {}
    for i, folder in enumerate(sources_of(mixture)):
        dataset = open_dataset(folder)
        sources[folder] = source = _open_source(dataset, reading, seq_len, seed + 7919 * i)
        tokens = _tokens_per_epoch(dataset, seq_len, reading.too_long)
        sizes[folder] = Size(source.packer.rows_per_epoch, tokens, len(dataset))
    return OpenMixture(sources, sizes, make_schedule(mixture, sizes, examples_per_step, steps))


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


_MADE_OF = {
    "lm": ("tokens", "chat"),
    "preference": ("preference",),
    "labelled": ("labelled",),
    "steps": ("steps",),
}


def _open_source(
    dataset: Dataset, reading: Reading, seq_len: int, seed: int
) -> PackedRows | PreferencePairs | LabelledRows | SteppedRows:
    if reading.kind not in _MADE_OF:
        raise ValueError(f"kind={reading.kind!r}; known are {', '.join(_MADE_OF)}")
    if dataset.kind not in _MADE_OF[reading.kind]:
        raise DatasetError(
            f"{dataset.folder} is a dataset of kind {dataset.kind!r}; batches of kind {reading.kind!r} are made of "
            f"{' or '.join(_MADE_OF[reading.kind])}."
            + (" Run tokenize_dataset on it first." if dataset.kind == "text" else "")
        )
    if reading.spans is not None and dataset.kind == "tokens":
        source = _open_corrupted(dataset, reading, reading.spans, seq_len, seed)
    elif reading.kind == "lm":
        if (dataset.kind, reading.packing) not in _PACKERS:
            raise ValueError(f"packing={reading.packing!r}; known are concat, best_fit, related")
        packer = _PACKERS[dataset.kind, reading.packing](dataset, reading, seq_len, seed)
        source = PackedRows(dataset, packer, seq_len, reading.pad_id)
    else:
        if reading.curriculum is not None:
            raise ConfigError(f"a curriculum orders documents and dialogues; kind={reading.kind!r} has none.")
        lengths = _lengths(dataset).reshape(len(dataset), -1)
        order = PairOrder(lengths, seq_len, seed, reading.shuffle, reading.too_long)
        rows = {"preference": PreferencePairs, "labelled": LabelledRows, "steps": SteppedRows}[reading.kind]
        source = rows(dataset, order, seq_len, reading.pad_id)
    if source.packer.rows_per_epoch == 0:
        raise DatasetError(f"{dataset.folder}: {_no_rows(dataset, source.packer.dropped, seq_len)}")
    return source


def _open_corrupted(
    dataset: Dataset, reading: Reading, spans: SpanCorruption, seq_len: int, seed: int
) -> PackedRows:
    if reading.packing == "related" or reading.curriculum is not None:
        raise ConfigError(
            'spans are hidden in texts by themselves: use packing="concat" or "best_fit", no curriculum.'
        )
    if spans.sentinel_ids is not None:
        spans.check(seq_len)
    corrupted = SpanCorrupted(dataset, spans, seq_len, seed)
    packer = _PACKERS["chat", reading.packing](corrupted, reading, seq_len, seed)
    return PackedRows(corrupted, packer, seq_len, reading.pad_id)


def _no_rows(dataset: Dataset, dropped: int, seq_len: int) -> str:
    if not dropped:
        return (
            f"no row can be made of its {len(dataset)} records: they hold no tokens. Write it from more data."
        )
    needed = int(_lengths(dataset).reshape(len(dataset), -1).max(axis=1).min())
    return (
        f"no row can be made of its {len(dataset)} records ({dropped} are longer than seq_len={seq_len}; the "
        f"shortest needs {needed}). Raise seq_len (a run's config.data.seq_len)."
    )


def _concat(dataset: Dataset, reading: Reading, seq_len: int, seed: int) -> Packer:
    orders = _orders(dataset, reading, seed)
    return ConcatAndSplit(_lengths(dataset), seq_len, seed, reading.shuffle, orders)


def _best_fit(dataset: Dataset | SpanCorrupted, reading: Reading, seq_len: int, seed: int) -> Packer:
    _refuse_curriculum(reading)
    too_long = "cut" if dataset.kind == "tokens" else reading.too_long
    return BestFit(_lengths(dataset), seq_len, seed, reading.shuffle, too_long)


def _related(dataset: Dataset, reading: Reading, seq_len: int, seed: int) -> Packer:
    _refuse_curriculum(reading)
    groups, order = read_groups(dataset)
    return RelatedRows(_lengths(dataset), seq_len, seed, reading.shuffle, groups, order, reading.join_related)


def _first_fit(dataset: Dataset | SpanCorrupted, reading: Reading, seq_len: int, seed: int) -> Packer:
    orders = _orders(dataset, reading, seed)
    return FirstFit(_lengths(dataset), seq_len, seed, reading.shuffle, reading.too_long, orders)


_PACKERS = {
    ("tokens", "concat"): _concat,
    ("tokens", "best_fit"): _best_fit,
    ("tokens", "related"): _related,
    ("chat", "concat"): _first_fit,
    ("chat", "best_fit"): _best_fit,
    ("chat", "related"): _first_fit,
}


def _refuse_curriculum(reading: Reading) -> None:
    if reading.curriculum is not None:
        raise ConfigError(
            f'packing="{reading.packing}" puts documents in an order of its own: use packing="concat" with a '
            "curriculum."
        )


def _lengths(dataset: Dataset | SpanCorrupted) -> np.ndarray:
    assert dataset.lengths is not None
    return dataset.lengths


def _orders(dataset: Dataset | SpanCorrupted, reading: Reading, seed: int) -> Orders | None:
    if reading.curriculum is None:
        return None
    assert isinstance(dataset, Dataset)  # hidden spans have no curriculum
    keys = _lengths(dataset) if reading.curriculum.by == "length" else read_scores(dataset)
    return curriculum_orders(keys, reading.curriculum, seed)


def _tokens_per_epoch(dataset: Dataset, seq_len: int, too_long: TooLong) -> int:
    lengths = _lengths(dataset)
    if dataset.kind == "tokens":
        return int(lengths.sum())
    longest = lengths if lengths.ndim == 1 else lengths.max(axis=1)
    kept = lengths[longest <= seq_len] if too_long == "drop" else lengths
    return int(kept.clip(max=seq_len).sum())


_endless = 1 << 48  # examples; grain multiplies lengths, and the product must stay an index

"""Who runs: a queue in order of arrival, rows of the batch, and pages for each; all on the host.

Invariants: an sequence holds pages only while it has a row; free + held pages are all; whoever came first runs first,
and when pages run out the one that came last goes back to the queue, to be computed again from its tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import time

import numpy as np

from serve.engine_config import EngineSizes, bucket_of
from serve.pages import PagePool
from serve.programs import Rows
from serve.request import MAX_STOP_TOKENS, Sequence
from serve.sampling import RowSampling


@dataclasses.dataclass
class PrefillBatch:
    sequences: list[Sequence]
    counts: list[int]  # tokens of each to compute now
    rows: Rows
    tokens: np.ndarray  # [R, C] int32
    count: np.ndarray  # [R] int32; 0 for rows that only pad


@dataclasses.dataclass
class DecodeBatch:
    sequences: list[Sequence]
    rows: Rows
    token: np.ndarray  # [R] int32, the last token of each, not in the cache yet
    budget: np.ndarray  # [R] int32, tokens to make at most; 0 for rows that only pad
    steps: int


class Scheduler:
    """Holds every sequence that is not finished, either waiting or active (with a row)."""

    def __init__(self, config: EngineSizes):
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.active: list[Sequence] = []  # in order of arrival
        self.preemptions = 0
        self._free_rows = list(range(config.max_rows - 1, -1, -1))
        self._table = _RowTable(config)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or cancelled."""
        if sequence.row < 0:
            self.waiting.remove(sequence)
        else:
            self._release(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Send the youngest active sequence back to the head of the queue; what was cached is forgotten."""
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def preempt_all(self) -> None:
        for sequence in reversed(self.active.copy()):
            self.preempt(sequence)

    def admit(self) -> None:
        """Give rows and pages to those who wait, in order; each active row is left a page to grow into."""
        while self.waiting and self._free_rows:
            sequence = self.waiting[0]
            needed = self._pages_for(sequence.length)
            if self.active and needed + len(self.active) > self.pool.free:
                return
            self.waiting.popleft()
            sequence.row = self._free_rows.pop()
            self._table.set(sequence)
            self._grow(sequence, needed)
            self.active.append(sequence)
            sequence.admitted_at = sequence.admitted_at or time.monotonic()

    def next_prefill(self) -> PrefillBatch | None:
        """The next chunk of the rows that have tokens to catch up with; the first in order sets the chunk's size."""
        behind = self.catching_up()
        if not behind:
            return None
        C = chunk_of(behind[0].length - behind[0].cached, self.config.chunk_buckets)
        sequences = behind[: self.config.prefill_rows(C)[-1]]
        R = bucket_of(len(sequences), self.config.row_buckets)
        counts = [min(sequence.length - sequence.cached, C) for sequence in sequences]
        tokens_RC, count_R = np.zeros((R, C), np.int32), np.zeros(R, np.int32)
        for row, sequence, count in zip(tokens_RC, sequences, counts):
            row[:count] = sequence.slice(sequence.cached, sequence.cached + count)
        count_R[: len(counts)] = counts
        longest = max(sequence.cached + count for sequence, count in zip(sequences, counts, strict=True))
        return PrefillBatch(sequences, counts, self._rows(sequences, R, longest), tokens_RC, count_R)

    def catching_up(self) -> list[Sequence]:
        """Active sequences with tokens of the prompt, or after a preemption of the output, still to compute."""
        return [sequence for sequence in self.active if not self._decodes(sequence)]

    def next_decode(self, steps: int) -> DecodeBatch | None:
        """All rows that have only their last token to compute, each with pages for at least one step."""
        for sequence in self.active.copy():
            if sequence.row >= 0 and self._decodes(sequence):
                self._ensure_page(sequence)
        sequences = [sequence for sequence in self.active if self._decodes(sequence)]
        if not sequences:
            return None
        budgets = [self._budget(sequence, steps) for sequence in sequences]
        R = bucket_of(len(sequences), self.config.row_buckets)
        token_R, budget_R = np.zeros(R, np.int32), np.zeros(R, np.int32)
        token_R[: len(sequences)] = [sequence.tokens[-1] for sequence in sequences]
        budget_R[: len(sequences)] = budgets
        longest = max(sequence.cached + budget for sequence, budget in zip(sequences, budgets, strict=True))
        return DecodeBatch(sequences, self._rows(sequences, R, longest), token_R, budget_R, max(budgets))

    def _decodes(self, sequence: Sequence) -> bool:
        return bool(sequence.tokens) and sequence.cached == sequence.length - 1

    def _ensure_page(self, sequence: Sequence) -> None:
        """A place for one more token, taken from the youngest if need be; that may be the sequence itself."""
        while len(sequence.pages) * self.config.page_size < sequence.cached + 1:
            if self.pool.free:
                self._grow(sequence, 1)
                continue
            youngest = self.active[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return

    def _budget(self, sequence: Sequence, steps: int) -> int:
        """Steps that this row can take now: within max_tokens, and with the pages that are free."""
        wanted = min(steps, sequence.limit - len(sequence.tokens))
        missing = self._pages_for(sequence.cached + wanted) - len(sequence.pages)
        self._grow(sequence, min(max(missing, 0), self.pool.free))
        return min(wanted, len(sequence.pages) * self.config.page_size - sequence.cached)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.config.page_size)

    def _grow(self, sequence: Sequence, count: int) -> None:
        if count:
            pages = self.pool.take(count)
            self._table.page_table[sequence.row, len(sequence.pages) : len(sequence.pages) + count] = pages
            sequence.pages += pages

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.pages)
        self._free_rows.append(sequence.row)
        self.active.remove(sequence)
        sequence.row, sequence.pages, sequence.cached = -1, [], 0

    def _rows(self, sequences: list[Sequence], R: int, longest: int) -> Rows:
        P = bucket_of(self._pages_for(longest), self.config.page_buckets)
        return self._table.take(
            [sequence.row for sequence in sequences], [sequence.cached for sequence in sequences], R, P
        )


def chunk_of(tokens: int, buckets: tuple[int, ...]) -> int:
    """The chunk for so many tokens: the smallest bucket that holds them, or a smaller one when more than half of
    that would be padding."""
    fitting = bucket_of(min(tokens, buckets[-1]), buckets)
    full = [bucket for bucket in buckets if bucket <= tokens]
    return full[-1] if full and fitting > 2 * tokens else fitting


class _RowTable:
    """What the programs must know of each row, kept as arrays so that a batch is a few gathers."""

    def __init__(self, config: EngineSizes):
        rows = config.max_rows + 1  # the last one pads: greedy, never active
        self._padding = config.max_rows
        self._no_page = config.num_pages  # the page that stays zero
        self.page_table = np.full((rows, config.page_buckets[-1]), self._no_page, np.int32)
        self._stop_ids = np.full((rows, MAX_STOP_TOKENS), -1, np.int32)
        self._sampling = RowSampling(
            temperature=np.zeros(rows, np.float32),
            top_k=np.zeros(rows, np.int32),
            top_p=np.ones(rows, np.float32),
            min_p=np.zeros(rows, np.float32),
            seed=np.zeros((rows, 2), np.uint32),
            alternatives=np.zeros(rows, np.int32),
        )

    def set(self, sequence: Sequence) -> None:
        row, sampling, table = sequence.row, sequence.request.sampling, self._sampling
        self.page_table[row] = self._no_page
        self._stop_ids[row] = -1
        self._stop_ids[row, : len(sequence.stop_ids)] = sequence.stop_ids
        table.temperature[row], table.top_p[row], table.min_p[row] = (
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
        )
        table.top_k[row] = min(sampling.top_k, np.iinfo(np.int32).max)
        table.seed[row] = sequence.seed >> 32, sequence.seed & 0xFFFFFFFF
        table.alternatives[row] = sampling.logprobs or 0

    def take(self, rows: list[int], lengths: list[int], R: int, P: int) -> Rows:
        index = np.full(R, self._padding)
        index[: len(rows)] = rows
        length = np.zeros(R, np.int32)
        length[: len(rows)] = lengths
        sampling = RowSampling(*(getattr(self._sampling, f)[index] for f in RowSampling.__dataclass_fields__))
        return Rows(
            self.page_table[index, :P], length, index.astype(np.int32), self._stop_ids[index], sampling
        )

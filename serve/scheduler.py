"""Who runs: a queue in order of arrival, rows of the batch, and pages for each; all on the host.

Invariants: an answer holds pages only while it has a row; free + held pages are all; whoever came first runs first,
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
from serve.request import MAX_STOP_TOKENS, Answer
from serve.sampling import RowSampling


@dataclasses.dataclass
class PrefillBatch:
    answers: list[Answer]
    counts: list[int]  # tokens of each to compute now
    rows: Rows
    tokens: np.ndarray  # [R, C] int32
    count: np.ndarray  # [R] int32; 0 for rows that only pad


@dataclasses.dataclass
class DecodeBatch:
    answers: list[Answer]
    rows: Rows
    token: np.ndarray  # [R] int32, the last token of each, not in the cache yet
    budget: np.ndarray  # [R] int32, tokens to make at most; 0 for rows that only pad
    steps: int


class Scheduler:
    """Holds every answer that is not finished, either waiting or active (with a row)."""

    def __init__(self, config: EngineSizes):
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.waiting: collections.deque[Answer] = collections.deque()
        self.active: list[Answer] = []  # in order of arrival
        self.preemptions = 0
        self._free_rows = list(range(config.max_rows - 1, -1, -1))
        self._table = _RowTable(config)

    def add(self, answer: Answer) -> None:
        self.waiting.append(answer)

    def remove(self, answer: Answer) -> None:
        """Take an answer out, finished or cancelled."""
        if answer.row < 0:
            self.waiting.remove(answer)
        else:
            self._release(answer)

    def preempt(self, answer: Answer) -> None:
        """Send the youngest active answer back to the head of the queue; what was cached is forgotten."""
        self._release(answer)
        self.waiting.appendleft(answer)
        self.preemptions += 1

    def preempt_all(self) -> None:
        for answer in reversed(self.active.copy()):
            self.preempt(answer)

    def admit(self) -> None:
        """Give rows and pages to those who wait, in order; each active row is left a page to grow into."""
        while self.waiting and self._free_rows:
            answer = self.waiting[0]
            needed = self._pages_for(answer.length)
            if self.active and needed + len(self.active) > self.pool.free:
                return
            self.waiting.popleft()
            answer.row = self._free_rows.pop()
            self._table.set(answer)
            self._grow(answer, needed)
            self.active.append(answer)
            answer.admitted_at = answer.admitted_at or time.monotonic()

    def next_prefill(self) -> PrefillBatch | None:
        """The next chunk of the rows that have tokens to catch up with; the first in order sets the chunk's size."""
        behind = self.catching_up()
        if not behind:
            return None
        C = chunk_of(behind[0].length - behind[0].cached, self.config.chunk_buckets)
        answers = behind[: self.config.prefill_rows(C)[-1]]
        R = bucket_of(len(answers), self.config.row_buckets)
        counts = [min(answer.length - answer.cached, C) for answer in answers]
        tokens_RC, count_R = np.zeros((R, C), np.int32), np.zeros(R, np.int32)
        for row, answer, count in zip(tokens_RC, answers, counts):
            row[:count] = answer.slice(answer.cached, answer.cached + count)
        count_R[: len(counts)] = counts
        longest = max(answer.cached + count for answer, count in zip(answers, counts, strict=True))
        return PrefillBatch(answers, counts, self._rows(answers, R, longest), tokens_RC, count_R)

    def catching_up(self) -> list[Answer]:
        """Active answers with tokens of the prompt, or after a preemption of the answer, still to compute."""
        return [answer for answer in self.active if not self._decodes(answer)]

    def next_decode(self, steps: int) -> DecodeBatch | None:
        """All rows that have only their last token to compute, each with pages for at least one step."""
        for answer in self.active.copy():
            if answer.row >= 0 and self._decodes(answer):
                self._ensure_page(answer)
        answers = [answer for answer in self.active if self._decodes(answer)]
        if not answers:
            return None
        budgets = [self._budget(answer, steps) for answer in answers]
        R = bucket_of(len(answers), self.config.row_buckets)
        token_R, budget_R = np.zeros(R, np.int32), np.zeros(R, np.int32)
        token_R[: len(answers)] = [answer.tokens[-1] for answer in answers]
        budget_R[: len(answers)] = budgets
        longest = max(answer.cached + budget for answer, budget in zip(answers, budgets, strict=True))
        return DecodeBatch(answers, self._rows(answers, R, longest), token_R, budget_R, max(budgets))

    def _decodes(self, answer: Answer) -> bool:
        return bool(answer.tokens) and answer.cached == answer.length - 1

    def _ensure_page(self, answer: Answer) -> None:
        """A place for one more token, taken from the youngest if need be; that may be the answer itself."""
        while len(answer.pages) * self.config.page_size < answer.cached + 1:
            if self.pool.free:
                self._grow(answer, 1)
                continue
            youngest = self.active[-1]
            self.preempt(youngest)
            if youngest is answer:
                return

    def _budget(self, answer: Answer, steps: int) -> int:
        """Steps that this row can take now: within max_tokens, and with the pages that are free."""
        wanted = min(steps, answer.limit - len(answer.tokens))
        missing = self._pages_for(answer.cached + wanted) - len(answer.pages)
        self._grow(answer, min(max(missing, 0), self.pool.free))
        return min(wanted, len(answer.pages) * self.config.page_size - answer.cached)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.config.page_size)

    def _grow(self, answer: Answer, count: int) -> None:
        if count:
            pages = self.pool.take(count)
            self._table.page_table[answer.row, len(answer.pages) : len(answer.pages) + count] = pages
            answer.pages += pages

    def _release(self, answer: Answer) -> None:
        self.pool.give_back(answer.pages)
        self._free_rows.append(answer.row)
        self.active.remove(answer)
        answer.row, answer.pages, answer.cached = -1, [], 0

    def _rows(self, answers: list[Answer], R: int, longest: int) -> Rows:
        P = bucket_of(self._pages_for(longest), self.config.page_buckets)
        return self._table.take(
            [answer.row for answer in answers], [answer.cached for answer in answers], R, P
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

    def set(self, answer: Answer) -> None:
        row, sampling, table = answer.row, answer.request.sampling, self._sampling
        self.page_table[row] = self._no_page
        self._stop_ids[row] = -1
        self._stop_ids[row, : len(answer.stop_ids)] = answer.stop_ids
        table.temperature[row], table.top_p[row], table.min_p[row] = (
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
        )
        table.top_k[row] = min(sampling.top_k, np.iinfo(np.int32).max)
        table.seed[row] = answer.seed >> 32, answer.seed & 0xFFFFFFFF
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

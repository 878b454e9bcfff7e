"""Who runs: a queue in order of arrival, rows of the batch, and pages for each; all on the host.

Invariants: a sequence holds pages only while it has a row; free + cached + held pages are all; queue and batch are in
order of arrival. When pages run out, the sequence that came last goes back to the queue, to be computed again from its
tokens.
"""

from __future__ import annotations

import bisect
import time

from serve.blocks import BlockPool, block_hash
from serve.engine_config import EngineSizes, bucket_of
from serve.plan import (
    DecodeBatch,
    PrefillBatch,
    RowTable,
    VerifyBatch,
    chunk_of,
    decode_batch,
    prefill_batch,
    verify_batch,
)
from serve.sequence import Sequence


class Scheduler:
    """Holds every sequence that is not finished, either waiting or active (with a row)."""

    def __init__(self, config: EngineSizes, vocab_size: int):
        self.config = config
        self.pool = BlockPool(config.num_pages)
        self.waiting: list[Sequence] = []
        self.active: list[Sequence] = []
        self.preemptions = 0
        self.prefix_queries, self.prefix_hits = 0, 0  # tokens of prompts
        self._free_rows = list(range(config.max_rows - 1, -1, -1))
        self._table = RowTable(config, vocab_size)
        self._owners: dict[bytes, Sequence] = {}  # hash of a prompt's block -> who computes it now

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_number)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or cancelled."""
        if sequence.row < 0:
            self.waiting.remove(sequence)
        else:
            self._release(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Send an active sequence back to the queue; of its pages it finds again what the prefix cache keeps."""
        self._release(sequence)
        self.add(sequence)
        self.preemptions += 1

    def preempt_all(self) -> None:
        for sequence in reversed(self.active.copy()):
            self.preempt(sequence)

    def forget_all(self) -> None:
        """Preempt every sequence and empty the prefix cache: other parameters make other keys and values."""
        self.preempt_all()
        self.pool.forget_all()

    def admit(self) -> None:
        """Give rows and pages to those who wait, in order; each active row is left a page to grow into.

        A sequence waits while another computes the next block of its prompt, and shares that block afterwards.
        """
        for sequence in self.waiting.copy():
            if not self._free_rows:
                return
            shared = self._share(sequence)
            following = sequence.hashes[len(shared)] if len(shared) < self._full_blocks(sequence) else None
            if following in self._owners:
                self.pool.give_back(shared)
                continue
            needed = self._pages_for(sequence.length) - len(shared)
            if self.active and needed + len(self.active) > self.pool.available:
                self.pool.give_back(shared)
                return
            self._start(sequence, shared, needed)

    def _start(self, sequence: Sequence, shared: list[int], needed: int) -> None:
        self.waiting.remove(sequence)
        sequence.row = self._free_rows.pop()
        self._table.set(sequence)
        sequence.computed = len(shared) * self.config.page_size
        sequence.registered = len(shared)
        self._hold(sequence, shared)
        self._grow(sequence, needed)
        bisect.insort(self.active, sequence, key=_number)
        for hash in sequence.hashes[len(shared) : self._full_blocks(sequence)]:
            self._owners.setdefault(hash, sequence)
        if sequence.admitted_at is None:
            sequence.admitted_at = time.monotonic()
            sequence.prefix_hits = sequence.computed
            if self.config.prefix_cache:
                self.prefix_queries += len(sequence.request.prompt)
                self.prefix_hits += sequence.computed

    def advance(self, sequence: Sequence, count: int) -> None:
        """`count` more tokens are computed, and nothing was wrong with them: others may share their full blocks."""
        # What was computed after a stop string is no part of the sequence.
        sequence.computed = min(sequence.computed + count, sequence.length)
        if not self.config.prefix_cache or sequence.row < 0:
            return
        self._hash(sequence, sequence.computed // self.config.page_size)
        for i in range(sequence.registered, sequence.computed // self.config.page_size):
            hash = sequence.hashes[i]
            self.pool.register(sequence.pages[i], hash)
            self._disown(sequence, hash)
        sequence.registered = max(sequence.registered, sequence.computed // self.config.page_size)

    def own_pages(self, sequence: Sequence) -> list[int]:
        """Its pages that no other sequence can have."""
        return [page for page in sequence.pages if not self.pool.is_registered(page)]

    def next_prefill(self, most_tokens: int | None = None) -> PrefillBatch | None:
        """The next chunk of the rows that have tokens to catch up with; the first in order sets the chunk's size.

        `most_tokens`: of all rows together, padding included; at least the smallest chunk of one row is computed.
        """
        behind = self.catching_up()
        if not behind:
            return None
        buckets = self.config.chunk_buckets
        if most_tokens is not None:
            buckets = tuple(size for size in buckets if size <= most_tokens) or buckets[:1]
        C = chunk_of(behind[0].length - behind[0].computed, buckets)
        rows = self.config.prefill_rows(C)
        if most_tokens is not None:
            rows = tuple(R for R in rows if R * C <= most_tokens) or rows[:1]
        # The program that scores prompts has larger logits, so that others do not share it.
        alike = [one for one in behind if one.wants_prompt_scores == behind[0].wants_prompt_scores]
        sequences = alike[: rows[-1]]
        return prefill_batch(self._table, sequences, bucket_of(len(sequences), rows), C)

    def next_alone(self, sequences: list[Sequence]) -> PrefillBatch:
        """The smallest chunk of the one with the fewest tokens, whose last may be a sampled one: for the time when
        no larger program is compiled."""
        one = min(sequences, key=lambda sequence: len(sequence.tokens))
        return prefill_batch(self._table, [one], self.config.row_buckets[0], self.config.chunk_buckets[0])

    def catching_up(self) -> list[Sequence]:
        """Active sequences with tokens of the prompt, or after a preemption of the output, still to compute."""
        return [sequence for sequence in self.active if not sequence.decodes]

    def decoding(self) -> list[Sequence]:
        """Active sequences with only their last token to compute, each with a page for it."""
        for sequence in self.active.copy():
            if sequence.row >= 0 and sequence.decodes:
                self._ensure_page(sequence)
        return [sequence for sequence in self.active if sequence.decodes]

    def next_decode(self, sequences: list[Sequence], steps: int) -> DecodeBatch:
        """Up to `steps` tokens for each of `decoding`; fewer where the host must make a mask before."""
        steps = min(steps, *(sequence.free_steps for sequence in sequences))
        budgets = [self._budget(sequence, steps) for sequence in sequences]
        return decode_batch(
            self._table, sequences, bucket_of(len(sequences), self.config.row_buckets), budgets
        )

    def next_verify(self, sequences: list[Sequence], drafts: list[list[int]]) -> VerifyBatch:
        """One token for each of `decoding`, and as many of its draft as its limit and the free pages allow."""
        cut = [
            draft[: self._budget(sequence, len(draft) + 1) - 1]
            for sequence, draft in zip(sequences, drafts, strict=True)
        ]
        R = bucket_of(len(sequences), self.config.row_buckets)
        return verify_batch(self._table, sequences, R, self.config.draft_tokens + 1, cut)

    def _ensure_page(self, sequence: Sequence) -> None:
        """A place for one more token, taken from the youngest if need be; that may be the sequence itself."""
        while len(sequence.pages) * self.config.page_size < sequence.computed + 1:
            if self.pool.available:
                self._grow(sequence, 1)
                continue
            youngest = self.active[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return

    def _budget(self, sequence: Sequence, steps: int) -> int:
        """Steps that this row can take now: within max_tokens, and with the pages that are free."""
        wanted = min(steps, sequence.limit - len(sequence.tokens))
        missing = self._pages_for(sequence.computed + wanted) - len(sequence.pages)
        self._grow(sequence, min(max(missing, 0), self.pool.available))
        return min(wanted, len(sequence.pages) * self.config.page_size - sequence.computed)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.config.page_size)

    def _full_blocks(self, sequence: Sequence) -> int:
        """Blocks that can be shared: full ones, without the last token, whose logits are wanted."""
        return (sequence.length - 1) // self.config.page_size if self.config.prefix_cache else 0

    def _share(self, sequence: Sequence) -> list[int]:
        """Pages of the cache for the start of the sequence, held from now on."""
        blocks = self._full_blocks(sequence)
        self._hash(sequence, blocks)
        # A prompt that is to be scored is computed whole.
        return [] if sequence.wants_prompt_scores else self.pool.share(sequence.hashes[:blocks])

    def _hash(self, sequence: Sequence, blocks: int) -> None:
        Z = self.config.page_size
        for i in range(len(sequence.hashes), blocks):
            before = sequence.hashes[-1] if sequence.hashes else sequence.cache_root
            sequence.hashes.append(block_hash(before, sequence.slice(i * Z, (i + 1) * Z)))

    def _disown(self, sequence: Sequence, hash: bytes) -> None:
        if self._owners.get(hash) is sequence:
            del self._owners[hash]

    def _grow(self, sequence: Sequence, count: int) -> None:
        if count:
            self._hold(sequence, self.pool.take(count))

    def _hold(self, sequence: Sequence, pages: list[int]) -> None:
        start = len(sequence.pages)
        self._table.page_table[sequence.row, start : start + len(pages)] = pages
        sequence.pages += pages

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.pages)
        for hash in sequence.hashes:
            self._disown(sequence, hash)
        self._free_rows.append(sequence.row)
        self.active.remove(sequence)
        sequence.row, sequence.pages, sequence.computed, sequence.registered = -1, [], 0, 0


def _number(sequence: Sequence) -> int:
    return sequence.number

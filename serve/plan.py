"""What one step computes, as arrays of fixed shapes: chunks of prompts, drafts to verify, and plain decoding."""

# R rows, C tokens of a chunk, P pages a row, H tokens of history, W words of a packed mask, V vocabulary

from __future__ import annotations

import dataclasses

import numpy as np

from serve.engine_config import EngineSizes, bucket_of
from serve.logits import RowEdits, all_allowed, ends_of_bad_words, forbid
from serve.programs import Rows
from serve.request import MAX_STOP_TOKENS
from serve.sampling import RowSampling
from serve.sequence import Sequence


@dataclasses.dataclass
class PrefillBatch:
    sequences: list[Sequence]
    counts: list[int]  # tokens of each to compute now
    rows: Rows
    tokens: np.ndarray  # [R, C] int32
    count: np.ndarray  # [R] int32; 0 for rows that only pad
    targets: (
        np.ndarray | None
    )  # [R, C] int32, the token after each; None: no prompt's log-probabilities are wanted

    @property
    def shape(self) -> tuple[str, int, int, int]:
        """That of its program, see `EngineSizes.shapes`."""
        kind = "prefill" if self.targets is None else "score"
        return kind, *self.tokens.shape, self.rows.page_table.shape[1]


@dataclasses.dataclass
class DecodeBatch:
    sequences: list[Sequence]
    rows: Rows
    token: np.ndarray  # [R] int32, the last token of each, not in the cache yet
    budget: np.ndarray  # [R] int32, tokens to make at most; 0 for rows that only pad
    steps: int

    @property
    def shape(self) -> tuple[str, int, int, int]:
        return "decode", len(self.token), 1, self.rows.page_table.shape[1]


@dataclasses.dataclass
class VerifyBatch:
    sequences: list[Sequence]
    drafts: list[list[int]]  # of each
    rows: Rows
    tokens: np.ndarray  # [R, C] int32: the last token of each, and its draft
    count: np.ndarray  # [R] int32; 0 for rows that only pad

    @property
    def shape(self) -> tuple[str, int, int, int]:
        return "verify", *self.tokens.shape, self.rows.page_table.shape[1]


class RowTable:
    """What the programs must know of each row, kept as arrays so that a batch is a few gathers."""

    def __init__(self, config: EngineSizes, vocab_size: int):
        rows = config.max_rows + 1  # the last one pads: greedy, never active
        self._config, self._vocab_size = config, vocab_size
        self._padding = config.max_rows
        self._no_page = config.num_pages  # the page that stays zero
        self.page_table = np.full((rows, config.page_buckets[-1]), self._no_page, np.int32)
        self._stop_ids = np.full((rows, MAX_STOP_TOKENS), -1, np.int32)
        self._adapter = np.full(rows, -1, np.int32)
        self._edits = RowEdits.none(rows)
        self._sampling = RowSampling(
            temperature=np.zeros(rows, np.float32),
            top_k=np.zeros(rows, np.int32),
            top_p=np.ones(rows, np.float32),
            min_p=np.zeros(rows, np.float32),
            typical_p=np.ones(rows, np.float32),
            seed=np.zeros((rows, 2), np.uint32),
            alternatives=np.zeros(rows, np.int32),
        )

    def set(self, sequence: Sequence) -> None:
        row, sampling, table = sequence.row, sequence.request.sampling, self._sampling
        self.page_table[row] = self._no_page
        self._stop_ids[row] = -1
        self._stop_ids[row, : len(sequence.stop_ids)] = sequence.stop_ids
        self._adapter[row] = sequence.adapter
        self._edits.set(row, sampling, len(sequence.request.prompt))
        for name in ("temperature", "top_p", "min_p", "typical_p"):
            getattr(table, name)[row] = getattr(sampling, name)
        table.top_k[row] = min(sampling.top_k, np.iinfo(np.int32).max)
        table.seed[row] = sequence.seed >> 32, sequence.seed & 0xFFFFFFFF
        table.alternatives[row] = max(sampling.logprobs or 0, sampling.prompt_logprobs or 0)

    def take(
        self, sequences: list[Sequence], R: int, longest: int, drafts: list[list[int]], places: int
    ) -> Rows:
        """The rows of these sequences, with pages for `longest` tokens.

        Args:
          drafts: tokens of each that are computed beside its own.
          places: places of each row with masks, 0: one mask a row.
        """
        Z = self._config.page_size
        P = bucket_of(-(-longest // Z), self._config.page_buckets)
        index = np.full(R, self._padding)
        index[: len(sequences)] = [sequence.row for sequence in sequences]
        length = np.zeros(R, np.int32)
        length[: len(sequences)] = [sequence.computed for sequence in sequences]
        pick = lambda table, kind: kind(*(getattr(table, name)[index] for name in kind.__dataclass_fields__))
        history_RH = np.zeros((R, P * Z), np.int32)
        if np.any(self._edits.edited[index]):
            for row, sequence, draft in zip(history_RH, sequences, drafts, strict=False):
                tokens = [*sequence.slice(0, sequence.length), *draft][: P * Z]
                row[: len(tokens)] = tokens
        return Rows(
            self.page_table[index, :P],
            length,
            index.astype(np.int32),
            self._stop_ids[index],
            pick(self._sampling, RowSampling),
            pick(self._edits, RowEdits),
            history_RH,
            self._masks(sequences, R, drafts, places),
            self._adapter[index],
        )

    def _masks(self, sequences: list[Sequence], R: int, drafts: list[list[int]], places: int) -> np.ndarray:
        """uint32 [R, W], or [R, places, W]."""
        shape = (R, places) if places else (R,)
        masks = all_allowed(*shape, vocab_size=self._vocab_size)
        for i, (sequence, draft) in enumerate(zip(sequences, drafts, strict=True)):
            if not sequence.constrained:
                continue
            for j in range(len(draft) + 1 if places else 1):
                masks[(i, j) if places else i] = allowed(sequence, draft[:j], self._vocab_size)
        return masks


def allowed(sequence: Sequence, after: list[int], vocab_size: int) -> np.ndarray:
    """The packed mask of the tokens that may come after the sequence and `after`."""
    if sequence.matcher is None:
        mask_W = all_allowed(vocab_size=vocab_size)
    else:
        mask_W = sequence.matcher.mask(after)
    words = sequence.request.sampling.bad_words_ids
    forbid(mask_W, ends_of_bad_words(words, [*sequence.tokens, *after]))
    return mask_W


def prefill_batch(table: RowTable, sequences: list[Sequence], R: int, C: int) -> PrefillBatch:
    """The next chunk, of at most C tokens, of each sequence."""
    counts = [min(sequence.length - sequence.computed, C) for sequence in sequences]
    tokens_RC, count_R = np.zeros((R, C), np.int32), np.zeros(R, np.int32)
    for row, sequence, count in zip(tokens_RC, sequences, counts, strict=False):
        row[:count] = sequence.slice(sequence.computed, sequence.computed + count)
    count_R[: len(counts)] = counts
    longest = max(sequence.computed + count for sequence, count in zip(sequences, counts, strict=True))
    targets_RC = None
    if any(sequence.wants_prompt_scores for sequence in sequences):
        targets_RC = np.zeros((R, C), np.int32)
        for row, sequence, count in zip(targets_RC, sequences, counts, strict=False):
            after = sequence.slice(sequence.computed + 1, sequence.computed + count + 1)
            row[: len(after)] = after
    rows = table.take(sequences, R, longest, [[]] * len(sequences), 0)
    return PrefillBatch(sequences, counts, rows, tokens_RC, count_R, targets_RC)


def decode_batch(table: RowTable, sequences: list[Sequence], R: int, budgets: list[int]) -> DecodeBatch:
    token_R, budget_R = np.zeros(R, np.int32), np.zeros(R, np.int32)
    token_R[: len(sequences)] = [sequence.tokens[-1] for sequence in sequences]
    budget_R[: len(sequences)] = budgets
    longest = max(sequence.computed + budget for sequence, budget in zip(sequences, budgets, strict=True))
    rows = table.take(sequences, R, longest, [[]] * len(sequences), 0)
    return DecodeBatch(sequences, rows, token_R, budget_R, max(budgets))


def verify_batch(
    table: RowTable, sequences: list[Sequence], R: int, C: int, drafts: list[list[int]]
) -> VerifyBatch:
    tokens_RC, count_R = np.zeros((R, C), np.int32), np.zeros(R, np.int32)
    for i, (sequence, draft) in enumerate(zip(sequences, drafts, strict=True)):
        tokens_RC[i, : len(draft) + 1] = sequence.tokens[-1], *draft
        count_R[i] = len(draft) + 1
    longest = max(
        sequence.computed + len(draft) + 1 for sequence, draft in zip(sequences, drafts, strict=True)
    )
    return VerifyBatch(sequences, drafts, table.take(sequences, R, longest, drafts, C), tokens_RC, count_R)


def chunk_of(tokens: int, buckets: tuple[int, ...]) -> int:
    """The chunk for so many tokens: the smallest bucket that holds them, or a smaller one when more than half of
    that would be padding."""
    fitting = bucket_of(min(tokens, buckets[-1]), buckets)
    full = [bucket for bucket in buckets if bucket <= tokens]
    return full[-1] if full and fitting > 2 * tokens else fitting

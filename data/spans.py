"""Span corruption: texts with spans hidden, followed by what was hidden, for a decoder that learns to fill in.

A text of n tokens becomes <mode> text with each span replaced by a sentinel, then each sentinel with its span; the loss
counts the second half. Raffel et al. 2019 (T5), arXiv:1910.10683, section 3.1.4; Tay et al. 2022 (UL2),
arXiv:2205.05131. Which tokens are hidden is a function of the seed, the text's number and the epoch alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from configs.typed import ConfigError, check_at_least
from data.packing import hashes, shuffled
from data.shards import Dataset, TokenRecord
from data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way of hiding spans."""

    rate: float = 0.15  # share of tokens that are hidden
    mean_length: float = 3.0  # tokens of a span; 0: one span at the end, a prefix language model
    weight: float = 1.0  # texts are shared among denoisers in proportion
    mode: str = ""  # a token before the text that tells the model the denoiser; "": none

    def __post_init__(self):
        if not 0 < self.rate < 1 or not self.mean_length >= 0 or not self.weight > 0:
            raise ConfigError(
                f"denoiser: rate={self.rate}, mean_length={self.mean_length}, weight={self.weight}; wanted a share "
                "between 0 and 1, at least 0, and more than 0."
            )

    def counts(self, tokens: int) -> tuple[int, int]:
        """(hidden tokens, spans) of a text of at least two tokens."""
        hidden = min(max(round(tokens * self.rate), 1), tokens - 1)
        spans = 1 if not self.mean_length else max(round(hidden / self.mean_length), 1)
        return hidden, min(spans, hidden, tokens - hidden)

    def length(self, tokens: int) -> int:
        """Tokens of the record that a text becomes."""
        return tokens + 2 * self.counts(tokens)[1] + bool(self.mode)


# UL2's seven denoisers: regular, sequential, and extreme ones
UL2 = (
    Denoiser(0.15, 3, mode="[R]"),
    Denoiser(0.15, 8, mode="[R]"),
    Denoiser(0.25, 0, 3.0, mode="[S]"),
    Denoiser(0.5, 3, mode="[X]"),
    Denoiser(0.5, 8, mode="[X]"),
    Denoiser(0.15, 64, mode="[X]"),
    Denoiser(0.5, 64, mode="[X]"),
)


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """Spans of token datasets that are hidden; dialogues stay as they are."""

    denoisers: tuple[Denoiser, ...] = (Denoiser(),)
    sentinel: str = "<extra_id_{}>"  # the tokens that stand for the first span ({} is 0), the second, ...
    sentinel_ids: tuple[int, ...] | None = None  # None: those of the tokenizer
    mode_ids: tuple[int, ...] | None = None  # of the denoisers; None: those of the tokenizer

    def __post_init__(self):
        check_at_least(1, denoisers=len(self.denoisers))
        if "{}" not in self.sentinel:
            raise ConfigError(
                f"spans.sentinel={self.sentinel!r} has no place for the number: wanted {{}} in it."
            )

    def with_tokenizer(self, tokenizer: Tokenizer) -> SpanCorruption:
        """With the ids that are not given. Raises ConfigError for tokens that the tokenizer has not."""
        sentinels, modes = self.sentinel_ids, self.mode_ids
        if sentinels is None:
            found = []
            while (id := tokenizer.id_of(self.sentinel.replace("{}", str(len(found))))) is not None:
                found.append(id)
            if not found:
                raise ConfigError(
                    f"config.data.spans.sentinel={self.sentinel!r}: the tokenizer has no token "
                    f"{self.sentinel.replace('{}', '0')!r}. Name its own, give sentinel_ids, or train a tokenizer with "
                    "such special tokens."
                )
            sentinels = tuple(found)
        if modes is None:
            modes = tuple(_mode_id(tokenizer, denoiser.mode) for denoiser in self.denoisers)
        return dataclasses.replace(self, sentinel_ids=sentinels, mode_ids=modes)

    def longest_text(self, seq_len: int) -> int:
        """The greatest number of tokens that fits into a row with every denoiser."""
        longest = seq_len
        while longest > 2 and max(denoiser.length(longest) for denoiser in self.denoisers) > seq_len:
            longest -= 1
        return longest

    def check(self, seq_len: int) -> None:
        """Raises ConfigError if a row of `seq_len` may have more spans than there are sentinels."""
        longest, have = self.longest_text(seq_len), len(self.sentinel_ids or ())
        most = max(denoiser.counts(longest)[1] for denoiser in self.denoisers)
        if have < most:
            raise ConfigError(
                f"config.data.spans hides up to {most} spans in a row of {seq_len} tokens, and there are {have} "
                "sentinel tokens. Lower the rate or seq_len, raise mean_length, or take a tokenizer with more."
            )


class SpanCorrupted:
    """A token dataset as dialogues are: records of texts with hidden spans, in parts that fit into a row.

    Attributes: `folder`, `kind` ("chat", because records have masks and are not cut), and `lengths`.
    """

    kind = "chat"

    def __init__(self, dataset: Dataset, spans: SpanCorruption, seq_len: int, seed: int):
        self.folder, self._dataset, self._spans, self._seed = dataset.folder, dataset, spans, seed
        assert dataset.lengths is not None
        most = spans.longest_text(seq_len)
        weights = np.cumsum([denoiser.weight for denoiser in spans.denoisers])
        self._document, self._start, self._stop = _parts(dataset.lengths, most)
        draws = hashes(len(self._document), seed) / 2.0**64
        self._denoiser = np.searchsorted(weights, draws * weights[-1], side="right").clip(
            max=len(weights) - 1
        )
        sizes = self._stop - self._start
        self.lengths = np.zeros(len(sizes), np.int64)
        for size, which in {*zip(sizes.tolist(), self._denoiser.tolist(), strict=True)}:
            same = (sizes == size) & (self._denoiser == which)
            self.lengths[same] = spans.denoisers[which].length(size)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, indices: Sequence[int], epoch: int = 0) -> list[TokenRecord]:
        records = self._dataset.read([int(self._document[i]) for i in indices])
        return [self._corrupted(int(i), epoch, record) for i, record in zip(indices, records, strict=True)]

    def _corrupted(self, i: int, epoch: int, record: TokenRecord) -> TokenRecord:
        text = record.tokens[self._start[i] : self._stop[i]]
        denoiser, spans = self._spans.denoisers[self._denoiser[i]], self._spans
        if spans.sentinel_ids is None or spans.mode_ids is None:
            raise ConfigError("config.data.spans has no ids of sentinels: give sentinel_ids and mode_ids.")
        mode = [spans.mode_ids[self._denoiser[i]]] if denoiser.mode else []
        return corrupt(text, denoiser, np.array(spans.sentinel_ids, np.int32), mode, (self._seed, epoch, i))


def corrupt(
    text: np.ndarray, denoiser: Denoiser, sentinels: np.ndarray, mode: Sequence[int], seeds: tuple[int, ...]
) -> TokenRecord:
    """The record of a text, int32 [n] with n of at least 2: length `denoiser.length(n)`."""
    hidden, spans = denoiser.counts(len(text))
    if denoiser.mean_length:
        # one part more than there are spans: what follows the last one, perhaps nothing
        shown_lengths = _random_parts(len(text) - hidden + 1, spans + 1, *seeds, 0)[:-1]
        hidden_lengths = _random_parts(hidden, spans, *seeds, 1)
    else:
        shown_lengths, hidden_lengths = np.array([len(text) - hidden]), np.array([hidden])
    shown, filled, at = [np.array(mode, np.int32)], [], 0
    for sentinel, before, length in zip(sentinels[:spans], shown_lengths, hidden_lengths, strict=True):
        shown += [text[at : at + before], sentinel[None]]
        filled += [sentinel[None], text[at + before : at + before + length]]
        at += before + length
    shown.append(text[at:])
    tokens = np.concatenate([*shown, *filled]).astype(np.int32)
    return TokenRecord(tokens, np.arange(len(tokens)) >= sum(map(len, shown)))


def _parts(lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, stop) of parts of nearly equal length, at most `most`; texts of one token have none."""
    lengths = np.where(lengths >= 2, lengths, 0)
    counts = -(-lengths // most)
    document = np.repeat(np.arange(len(lengths)), counts)
    place = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    n, parts = lengths[document], counts[document]
    return document, place * n // parts, (place + 1) * n // parts


def _random_parts(total: int, parts: int, *seeds: int) -> np.ndarray:
    """`total` cut into `parts` of at least one, each way as likely as any other."""
    cuts = np.sort(shuffled(total - 1, *seeds)[: parts - 1]) + 1 if parts > 1 else np.zeros(0, np.int64)
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _mode_id(tokenizer: Tokenizer, mode: str) -> int:
    if not mode:
        return -1
    id = tokenizer.id_of(mode)
    if id is None:
        raise ConfigError(
            f'config.data.spans: the mode {mode!r} is no token of the tokenizer. Name its own, or "".'
        )
    return id

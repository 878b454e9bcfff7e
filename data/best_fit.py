"""Best-fit-decreasing packing: documents whole where they fit into a row, little padding.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830. Documents longer than a row are cut
into whole rows and a rest first. Pieces of one length are placed together and rows are told apart by the room left in
them alone, so the time is that of counting lengths, and the plan is four arrays.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

from data.packing import Piece, Waste, shuffled


class BestFit:
    """Rows of whole documents, best fit. The rows stay; each epoch shuffles their order.

    Attributes:
        rows_per_epoch: how many rows there are.
        dropped, truncated: documents of more than T tokens that were left out, or cut off.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        seq_len: int,
        seed: int,
        shuffle: bool,
        too_long: Literal["cut", "drop", "truncate"] = "cut",
    ):
        """`lengths`: int64 [N]. `too_long`: a document of more than T tokens is cut into several pieces, left
        out, or cut off."""
        self.seq_len, self.seed, self.shuffle = seq_len, seed, shuffle
        lengths = np.asarray(lengths, np.int64)
        long = lengths > seq_len
        self.dropped = int(long.sum()) if too_long == "drop" else 0
        self.truncated = int(long.sum()) if too_long == "truncate" else 0
        if too_long == "drop":
            lengths = np.where(long, 0, lengths)
        elif too_long == "truncate":
            lengths = np.minimum(lengths, seq_len)
        self._cut = int(long.sum()) - self.dropped
        self._filled = int((lengths > 0).sum())
        documents, starts, sizes = _pieces(lengths, seq_len, seed, shuffle)
        rows = _place(sizes, seq_len)
        self.rows_per_epoch = int(rows.max(initial=-1)) + 1
        order = np.argsort(rows, kind="stable")
        self._documents, self._starts, self._sizes = documents[order], starts[order], sizes[order]
        self._ends = np.cumsum(np.bincount(rows, minlength=self.rows_per_epoch))
        self.tokens = int(lengths.sum())
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: shuffled(self.rows_per_epoch, seed, epoch, 2)
        )

    def row(self, index: int) -> list[Piece]:
        """The pieces of row `index`, counted through all epochs."""
        epoch, row = divmod(index, self.rows_per_epoch)
        if self.shuffle:
            row = int(self._order(epoch)[row])
        within = slice(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))
        rows = zip(
            self._documents[within].tolist(), self._starts[within].tolist(), self._sizes[within].tolist()
        )
        return [Piece(document, start, start + size) for document, start, size in rows]

    def waste(self) -> Waste:
        places = self.rows_per_epoch * self.seq_len
        return Waste(1 - self.tokens / places if places else 0.0, self._cut / max(self._filled, 1), 0.0)


def _pieces(
    lengths: np.ndarray, seq_len: int, seed: int, shuffle: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, size) of each piece, the longest first; among equals in shuffled order."""
    small = np.int32 if len(lengths) < 2**31 and lengths.max(initial=0) < 2**31 else np.int64
    order = shuffled(len(lengths), seed, 1) if shuffle else np.arange(len(lengths))
    order = order.astype(small)[lengths[order] > 0]
    counts = -(-lengths[order] // seq_len)
    documents = np.repeat(order, counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    starts = ((np.arange(len(documents)) - firsts) * seq_len).astype(small)
    sizes = np.minimum(lengths[documents] - starts, seq_len).astype(np.int32)
    longest_first = np.argsort(-sizes, kind="stable")
    return documents[longest_first], starts[longest_first], sizes[longest_first]


def _place(sizes: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each piece, int64 [n]; `sizes` falls.

    A row with the least room that is enough takes pieces of one length until no more fit, since after each it is
    still the best fit; so all rows with the same room are filled at once.
    """
    placed = np.empty(len(sizes), np.int64)
    rooms: dict[int, list[np.ndarray]] = {}  # room left -> rows that have it, oldest first
    open_rooms = 0  # bit r is set where rooms[r] is not empty
    rows = 0
    lengths, firsts = np.unique(-sizes, return_index=True)
    stops = np.append(firsts[1:], len(sizes))
    for length, at, stop in zip((-lengths).tolist(), firsts.tolist(), stops.tolist()):
        while at < stop:
            fitting = open_rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                chosen = _joined(rooms.pop(room))
                open_rooms ^= 1 << room
            else:
                room = seq_len
                chosen = rows + np.arange(-(-(stop - at) // (seq_len // length)))
                rows += len(chosen)
            each = room // length
            used = min(len(chosen), -(-(stop - at) // each))
            taken = min(used * each, stop - at)
            placed[at : at + taken] = np.repeat(chosen[:used], each)[:taken] if each > 1 else chosen[:used]
            at += taken
            in_last = taken - (used - 1) * each
            for left, group in (
                (room, chosen[used:]),
                (room - each * length, chosen[: used - 1]),
                (room - in_last * length, chosen[used - 1 : used]),
            ):
                if len(group) and left:
                    rooms.setdefault(left, []).append(group)
                    open_rooms |= 1 << left
    return placed


def _joined(groups: list[np.ndarray]) -> np.ndarray:
    return groups[0] if len(groups) == 1 else np.concatenate(groups)

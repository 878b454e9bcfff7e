"""How a byte-latent model would cut documents into patches, counted without the model.

Pagnoni et al. 2024, arXiv:2412.09871, section 2. A rule takes a document's bytes, uint8 [n], and says for each whether
a patch ends with it, bool [n]. Every document begins anew. But for BPE, the first byte of a document is a patch of its
own, and the rules are those of `model.blocks.patches`, which sees the special tokens before a document too.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from data.shards import Dataset
from data.tokenizer.interface import Tokenizer

Rule = Callable[[np.ndarray], np.ndarray]
BLT_THRESHOLD = 1.335442066192627  # nats, of the released models
_WORD = np.zeros(256, bool)  # ASCII letters and digits, and the bytes that continue a character
_WORD[[*range(ord("0"), ord("9") + 1), *range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1)]] = True
_WORD[0x80:0xC0] = True


def static_rule(length: int) -> Rule:
    """Patches of `length` bytes. Raises ValueError below 1."""
    if length < 1:
        raise ValueError(f"length={length}: a patch has at least one byte")
    return lambda document: np.arange(len(document)) % length == 0


def space_rule() -> Rule:
    """A patch ends with the first byte after a word."""

    def ends(document: np.ndarray) -> np.ndarray:
        between = ~_WORD[document]
        return _first_ends(between & ~np.concatenate([[True], between[:-1]])[: len(document)])

    return ends


def entropy_rule(
    entropies: Callable[[np.ndarray], np.ndarray], threshold: float = BLT_THRESHOLD, rule: str = "above"
) -> Rule:
    """A patch ends where the next byte is uncertain.

    Args:
        entropies: a document's bytes to nats [n]: number i is the entropy of byte i + 1, given the bytes up to i.
        rule: "above" the threshold, or a "rise" over the entropy before by more than that.

    Raises ValueError for another rule, and for entropies of another length than the document's.
    """
    if rule not in ("above", "rise"):
        raise ValueError(f"rule={rule!r} is not one of above, rise")

    def ends(document: np.ndarray) -> np.ndarray:
        nats = np.asarray(entropies(document), np.float32)
        if nats.shape != document.shape:
            raise ValueError(f"{document.shape[0]} bytes, but entropies of the shape {nats.shape}")
        before = np.concatenate([[0], nats[:-1]])[: len(nats)] if rule == "rise" else 0
        return _first_ends(nats - before > threshold)

    return ends


def bpe_rule(tokenizer: Tokenizer) -> Rule:
    """A patch is a token of `tokenizer`, which has to give every text back unchanged, or ValueError is raised."""

    def ends(document: np.ndarray) -> np.ndarray:
        text = document.tobytes()
        pieces = [tokenizer.bytes_of(i) for i in tokenizer.encode(text.decode("utf-8"))]
        if b"".join(pieces) != text:
            raise ValueError(
                f"{type(tokenizer).__name__} changes the text, so its tokens are no patches of it"
            )
        marks = np.zeros(len(document), bool)
        marks[np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - 1] = True
        return marks

    return ends


@dataclasses.dataclass(frozen=True)
class PatchStatistics:
    """Patches of some documents."""

    documents: int
    bytes: int
    patches: int
    histogram: dict[int, int]  # bytes of a patch -> patches, shortest first

    @property
    def bytes_per_patch(self) -> float:
        return self.bytes / max(self.patches, 1)

    @property
    def one_byte_share(self) -> float:
        """Of all patches, those of a single byte."""
        return self.histogram.get(1, 0) / max(self.patches, 1)


def patch_statistics(
    documents: Iterable[str | bytes | np.ndarray], rule: Rule, longest: int | None = None
) -> PatchStatistics:
    """Counts the patches of documents; `longest`: longer patches are cut into some of this length and a rest."""
    histogram: Counter[int] = Counter()
    count = size = 0
    for document in documents:
        lengths = patch_lengths(_bytes(document), rule, longest)
        histogram.update(lengths.tolist())
        count, size = count + 1, size + int(lengths.sum())
    return PatchStatistics(count, size, histogram.total(), dict(sorted(histogram.items())))


def patch_lengths(document: np.ndarray, rule: Rule, longest: int | None = None) -> np.ndarray:
    """Bytes of each patch of a document, int64; what is left after the last end is a patch too."""
    ends = np.flatnonzero(rule(document))
    if len(document) and (not len(ends) or ends[-1] != len(document) - 1):
        ends = np.append(ends, len(document) - 1)
    lengths = np.diff(ends, prepend=-1)
    if longest is None:
        return lengths
    whole, rest = np.divmod(lengths, longest)
    cut = [piece for n, r in zip(whole.tolist(), rest.tolist()) for piece in [longest] * n + [r] * (r > 0)]
    return np.asarray(cut, np.int64)


def byte_documents(dataset: Dataset, offset: int) -> Iterator[np.ndarray]:
    """The bytes of every document of a token dataset that a ByteTokenizer of this `offset` wrote."""
    for record in dataset:
        yield (record.tokens[record.tokens >= offset] - offset).astype(np.uint8)


def _bytes(document: str | bytes | np.ndarray) -> np.ndarray:
    if isinstance(document, str):
        document = document.encode("utf-8")
    return np.frombuffer(document, np.uint8) if isinstance(document, bytes) else document


def _first_ends(ends: np.ndarray) -> np.ndarray:
    ends[:1] = True
    return ends

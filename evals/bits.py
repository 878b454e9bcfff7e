"""Bits per byte of held-out text, which compares models whatever their tokenizers, beside what compressors
need.

A model that predicts text is a compressor of it (Delétang et al. 2023, arXiv:2309.10668): -log2 p of a
document is the bits that arithmetic coding takes. As for the compressors, the ends of documents are not
coded.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import lzma
import math
from collections.abc import Callable, Sequence

from data import Tokenizer
from evals.results import PartResult, Row, ratio_row
from evals.scoring import Progress, Scorer, Span, windows

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda data: gzip.compress(data, 9, mtime=0),
    "bzip2 -9": lambda data: bz2.compress(data, 9),
    "xz -9": lambda data: lzma.compress(data, preset=9),
}
_SHOWN = 200  # characters of a document that its item keeps


@dataclasses.dataclass(frozen=True)
class TextScore:
    """One document under the model."""

    nats: float
    tokens: int  # that were predicted: all of the document's
    bytes: int  # of its UTF-8
    lossless: bool  # whether the tokens decode to exactly this text

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.bytes)


def score_texts(
    scorer: Scorer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    overlap: float = 0.5,
    progress: Progress | None = None,
) -> list[TextScore]:
    """Each document alone, after bos (or the first end token); in a vocabulary with neither, its first token
    is charged as one of vocab_size equally likely.

    A document longer than the scorer's context is cut into windows of that length: each repeats `overlap` of
    the context, and every token is scored exactly once. No text may be empty.
    """
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else list(tokenizer.eos_ids[:1])
    stride = max(1, scorer.context - int(overlap * scorer.context))
    encoded = tokenizer.encode_batch(texts)
    spans: list[Span] = []
    owners: list[int] = []
    for i, ids in enumerate(encoded):
        sequence = [*start, *ids]
        for first, begin, stop in windows(len(sequence), scorer.context, stride):
            spans.append(Span(sequence[first:stop], begin - first))
            owners.append(i)
    nats = [0.0 if start else math.log(tokenizer.vocab_size)] * len(texts)
    for i, scored in zip(owners, scorer.score(spans, progress), strict=True):
        nats[i] -= float(scored.logprobs.sum(dtype="float64"))
    return [
        TextScore(x, len(ids), len(text.encode()), tokenizer.decode(ids) == text)
        for x, ids, text in zip(nats, encoded, texts, strict=True)
    ]


def bits_per_byte(
    name: str,
    scorer: Scorer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    overlap: float = 0.5,
    progress: Progress | None = None,
) -> PartResult:
    """Rows "bits per byte" of the model and of each compressor, an item a document.

    The compressors' rows take all documents as one stream, which is the strict comparison: a compressor sees
    the earlier documents and the model does not. Rows "... each document alone" give it the model's terms.
    """
    scores = score_texts(scorer, tokenizer, texts, overlap=overlap, progress=progress)
    sizes = [score.bytes for score in scores]
    rows = [
        ratio_row(name, "bits per byte", [s.nats / math.log(2) for s in scores], sizes),
        ratio_row(name, "bytes per token", sizes, [max(s.tokens, 1) for s in scores]),
        *compressor_rows(name, texts),
    ]
    if changed := [s for s in scores if not s.lossless]:
        # The model was scored on other text than the one whose bytes are counted: say so beside the number.
        rows.insert(1, Row(name, "documents changed by the tokenizer", len(changed), None, len(scores)))
    items = [
        {
            "text": text[:_SHOWN],
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "bits_per_byte": score.bits_per_byte,
            **dataclasses.asdict(score),
        }
        for text, score in zip(texts, scores, strict=True)
    ]
    return PartResult(rows, items)


def compressor_rows(name: str, texts: Sequence[str]) -> list[Row]:
    """Bits per byte of each compressor: all documents as one stream, then each document alone."""
    documents = [text.encode() for text in texts]
    stream, sizes = b"".join(documents), [len(document) for document in documents]
    rows = []
    for label, compress in COMPRESSORS.items():
        rows.append(Row(name, f"{label} bits per byte", 8 * len(compress(stream)) / len(stream), None, 1))
    for label, compress in COMPRESSORS.items() if len(documents) > 1 else ():
        bits = [8 * len(compress(document)) for document in documents]
        rows.append(ratio_row(name, f"{label} bits per byte, each document alone", bits, sizes))
    return rows

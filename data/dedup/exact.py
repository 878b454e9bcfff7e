"""Documents that are the same: by their text, or by the address that they are from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from data.dedup.corpus import Keep, best_of_components, decisions, digest, feature_table, fixed, gather
from data.documents import Document, DocumentType
from data.stage import Corpus, Decision, Global
from data.urls import split_url


@dataclasses.dataclass(frozen=True)
class ExactDedup(Global):
    """Documents whose text is equal but for white space, or whose address (`metadata["url"]`) is the same but for
    scheme, "www.", a closing slash and the fragment. Documents without an address are never duplicates by it."""

    applies_to: DocumentType = "any"
    by: Literal["text", "url"] = "text"
    keep: Keep = "first"  # "first": the smallest id; "longest"; "best": the highest score
    score: str = ""  # where the score lies in the metadata, e.g. "tags.Quality.score"

    def features(self, documents: Sequence[tuple[int, Document]]) -> Any:
        names = [_NAMES[self.by](document) for _, document in documents]
        keys = np.frombuffer(b"".join(map(digest, names)), "<u8").reshape(-1, 2)
        return feature_table(documents, self.keep, self.score, fixed(keys))

    def resolve(self, corpus: Corpus) -> Iterator[tuple[str, list[Decision]]]:
        rows, keys = gather(corpus)
        _, same = np.unique(keys, axis=0, return_inverse=True) if len(keys) else (None, np.zeros(0, np.int64))
        stays = best_of_components(same.reshape(-1).astype(np.int64), rows.order)
        yield from decisions(corpus, rows, stays, "exact" if self.by == "text" else "url")


def _text(document: Document) -> str:
    return " ".join(document["text"].split())


def _url(document: Document) -> str:
    url = str(document["metadata"].get("url") or "")
    if not url:
        return "no address: " + document["id"]
    if (parts := split_url(url)) is None:
        return url.strip()
    host = parts.netloc.lower().removeprefix("www.")
    return f"{host}{parts.path.rstrip('/')}?{parts.query}"


_NAMES = {"text": _text, "url": _url}

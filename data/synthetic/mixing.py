"""Real text and a bounded share of synthetic text in one dataset. Real text stays (accumulate): models that are trained
on synthetic text in its place collapse (Gerstgrasser et al. 2024, arXiv:2404.01413)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.documents import Document
from data.shards import open_dataset, write_dataset
from data.synthetic.config import SyntheticConfig


def write_mixture(config: SyntheticConfig, made: Sequence[Document], folder: Path) -> dict[str, Any]:
    """Writes the real documents and as many of the made ones, by a hash of their ids, as `max_share` of all bytes lets
    in; returns what came of it."""
    real = open_dataset(config.real)
    gone = {d["metadata"]["synthetic"]["seed_id"] for d in made} if config.mix == "replace" else set()
    real_bytes = sum(_size(d) for d in real if d["id"] not in gone)
    room = config.max_share / (1 - config.max_share) * real_bytes
    taken, used = set(), 0
    for document in sorted(made, key=lambda d: hashlib.sha256(d["id"].encode()).hexdigest()):
        if used + _size(document) <= room:
            taken.add(document["id"])
            used += _size(document)
    facts = {
        "mix": config.mix,
        "max_share": config.max_share,
        "real_bytes": real_bytes,
        "real_documents_replaced": sum(d["id"] in gone for d in real) if gone else 0,
        "synthetic_bytes": used,
        "synthetic_documents": len(taken),
        "synthetic_documents_left_out": len(made) - len(taken),
        "synthetic_share": used / max(used + real_bytes, 1),
    }

    def records() -> Iterator[Document]:
        yield from (d for d in real if d["id"] not in gone)
        yield from (d for d in made if d["id"] in taken)

    sources = [*real.manifest.get("sources", []), {"name": "synthetic", "documents": len(taken)}]
    write_dataset(folder, records(), "text", {"sources": sources, "mixture": facts})
    return facts


def _size(document: Document) -> int:
    return len(document["text"].encode("utf-8", "replace"))

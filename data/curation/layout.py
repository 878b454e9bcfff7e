"""Where a curation run keeps what, and how a shard's result is marked as done.

stages/00-sources/documents.parquet/SHARD.parquet   what the sources gave
stages/NN-Name/documents.parquet/SHARD.parquet      new texts, of stages that change them
stages/NN-Name/verdicts/SHARD.parquet               rows that went, of stages that change none
stages/NN-Name/features/SHARD.parquet               of Global stages: what was compared ...
stages/NN-Name/decisions/SHARD.parquet              ... and what was decided
stages/NN-Name/done/SHARD.json                      key and counts; written last
tags/Name-HASH/SHARD.parquet                        signals of a filter, whatever its number and thresholds
dropped/NN-Name.parquet/SHARD.parquet               every document that a stage dropped, with its reason
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from configs.files import atomic_write

SOURCES = "00-sources"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The paths of one workdir."""

    workdir: Path

    def documents(self, stage: str, shard: str) -> Path:
        return self.workdir / "stages" / stage / "documents.parquet" / f"{shard}.parquet"

    def verdicts(self, stage: str, shard: str) -> Path:
        return self.workdir / "stages" / stage / "verdicts" / f"{shard}.parquet"

    def features(self, stage: str, shard: str) -> Path:
        return self.workdir / "stages" / stage / "features" / f"{shard}.parquet"

    def decisions(self, stage: str, shard: str) -> Path:
        return self.workdir / "stages" / stage / "decisions" / f"{shard}.parquet"

    def done(self, stage: str, shard: str, what: str = "done") -> Path:
        return self.workdir / "stages" / stage / what / f"{shard}.json"

    def tags(self, tagger: str, shard: str) -> Path:
        return self.workdir / "tags" / tagger / f"{shard}.parquet"

    def dropped(self, stage: str, shard: str) -> Path:
        return self.workdir / "dropped" / f"{stage}.parquet" / f"{shard}.parquet"


def mark_done(path: Path, key: str, **facts: Any) -> None:
    """Says that everything with this key is written."""
    atomic_write(path, json.dumps({"key": key, **facts}) + "\n")


def facts_of(path: Path, key: str) -> dict[str, Any] | None:
    """What `mark_done` noted, None unless it was for the same key."""
    try:
        facts = json.loads(path.read_text())
        return facts if facts["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

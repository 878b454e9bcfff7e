"""What a curation stage is: a frozen dataclass of one of three kinds.

    Filter     measures each document (its signals) and decides by thresholds whether it stays; changes no text
    Transform  gives each document a new text (or drops it)
    Global     looks at all documents at once (deduplication): features of each shard, then one decision

Signals are kept, so a threshold can change without measuring again. A stage sees the documents of the type it
`applies_to`; others pass by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from configs.typed import ConfigError
from data.callables import named
from data.documents import Document, DocumentType, read_documents, read_parquet, type_of

Signals = Mapping[str, Any]  # name to number, bool or string; None where there is nothing to measure
Verdict = tuple[str, str | None]  # (text, why the document goes or None)


class Stage:
    """What all three kinds share."""

    applies_to: DocumentType = "any"
    version: ClassVar[int] = 1  # raised when the result changes for the same config

    def files(self) -> tuple[str, ...]:
        """Files beside the documents that the result depends on: models, lists, benchmarks."""
        return ()

    def notes(self) -> tuple[str, ...]:
        """Lines for the log: what the stage found in its files, and what it will not do."""
        return ()

    def wants(self, document: Document) -> bool:
        return self.applies_to in ("any", type_of(document))


class Filter(Stage):
    """Measures, then decides."""

    measured_by: ClassVar[
        tuple[str, ...]
    ] = ()  # the fields that change the signals; all others are thresholds

    def signals(self, text: str) -> Signals:
        """What is measured of one text."""
        raise NotImplementedError

    def signals_of(self, documents: Sequence[Document]) -> list[Signals]:
        """The signals of many documents; a filter that needs more than the text, or a batch, says so here."""
        return [self.signals(document["text"]) for document in documents]

    def reason(self, signals: Signals) -> str | None:
        """Why a document with these signals goes ("filter: which rule"), None where it stays."""
        raise NotImplementedError

    def apply(self, text: str) -> Verdict:
        return text, self.reason(self.signals(text))


class Transform(Stage):
    """Gives a document a new text."""

    def apply(self, text: str) -> Verdict:
        """(new text, None), or (text, why it goes)."""
        raise NotImplementedError

    def edit(self, document: Document) -> tuple[Document, str | None]:
        """The document with its new text, and metadata where the stage has something to say; or why it goes."""
        text, reason = self.apply(document["text"])
        return {**document, "text": text}, reason


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one row: it goes with a `reason`, or `cut` pieces go from its text.

    `cut`: (start, stop) in characters, ascending, not overlapping. What is left blank goes, as `reason_if_blank`.
    """

    row: int
    reason: str | None = None
    cut: tuple[tuple[int, int], ...] = ()


class Global(Stage):
    """Decides over all documents."""

    cuts: ClassVar[bool] = False  # whether its decisions cut text, and not only drop documents

    def features(self, documents: Sequence[tuple[int, Document]]) -> Any:
        """An Arrow table of what is compared, from (row, document) pairs of one shard."""
        raise NotImplementedError

    def outputs(self) -> tuple[str, ...]:
        """Files outside of the workdir that `resolve` writes: it runs again where one of them is gone."""
        return ()

    def resolve(self, corpus: Corpus) -> Iterator[tuple[str, list[Decision]]]:
        """(shard, its decisions) for each shard with any; the same whatever the number of workers."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Named(Stage):
    """A stage of your own: `stage` names a class, or a function that makes one, "package.module:Name"; `options` go to
    it. It is hashed by its fields and `version`, so raise that when its code changes."""

    stage: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def made(self) -> Stage:
        """Raises ConfigError for what is no stage."""
        try:
            made = named(self.stage)(**self.options)
        except TypeError as error:
            raise ConfigError(f"{self.stage!r}: {error}") from error
        if not isinstance(made, (Filter, Transform, Global)) or not dataclasses.is_dataclass(made):
            raise ConfigError(
                f"{self.stage!r} gives {type(made).__name__}: wanted a dataclass that is a Filter, Transform or Global "
                "of data.stage"
            )
        return made


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All shards, as a Global stage sees them.

    Attributes:
        shards: their names, ascending; rows of a shard are numbered from 0, those that went before leave gaps.
        scratch: an empty folder for what does not fit in memory; removed afterwards.
        map: `map(function, items, megabytes)` yields results in order, by several processes where there are some and
            the work, given as about how much text is read, is worth it; the function is one of a module.
        log: takes a line of progress.
    """

    shards: tuple[str, ...]
    features_path: Callable[[str], Path]
    documents_path: Callable[[str], Path]
    scratch: Path
    map: Callable[[Callable[[Any], Any], Iterable[Any], float], Iterator[Any]]
    log: Callable[[str], None]

    def features(self, shard: str) -> Any:
        """The Arrow table that `features` made of this shard."""
        return read_parquet(self.features_path(shard))

    def documents(self, shard: str, rows: Iterable[int]) -> list[Document]:
        """The documents of these rows of a shard."""
        return read_documents(self.documents_path(shard), rows)


def cut_text(text: str, pieces: Sequence[tuple[int, int]]) -> str:
    """The text without the pieces [start, stop), which ascend and do not overlap."""
    kept, at = [], 0
    for start, stop in pieces:
        kept.append(text[at:start])
        at = stop
    return "".join([*kept, text[at:]])

"""What goes in and what is done to it: the config of a curation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from data.curation.workers import Workers
from data.decontaminate import Decontaminate, DecontaminateSpans
from data.dedup import BloomDedup, ExactDedup, LineDedup, MinHashDedup, SemanticDedup, SubstringDedup
from data.extract import Extract
from data.filters import (
    C4Lines,
    C4Paragraphs,
    CodeQuality,
    DclmLines,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Language,
    LanguageParagraphs,
    Mathematics,
    Normalise,
)
from data.privacy import Privacy
from data.quality import (
    CruciblePerplexity,
    EducationalScore,
    HarmClassifier,
    NgramPerplexity,
    QualityClassifier,
    UrlList,
    WordList,
)
from data.sources import PythonStdlib, Source
from data.stage import Named, Stage

CurationStage = (
    Normalise
    | Extract
    | Language
    | LanguageParagraphs
    | Privacy
    | GopherQuality
    | GopherRepetition
    | C4Lines
    | C4Paragraphs
    | FineWebQuality
    | DclmLines
    | CodeQuality
    | Mathematics
    | ExactDedup
    | LineDedup
    | BloomDedup
    | MinHashDedup
    | SubstringDedup
    | SemanticDedup
    | QualityClassifier
    | NgramPerplexity
    | CruciblePerplexity
    | UrlList
    | WordList
    | HarmClassifier
    | EducationalScore
    | Decontaminate
    | DecontaminateSpans
    | Named
)

DEFAULT_STAGES = (
    Normalise(),
    GopherQuality(max_words=10_000_000),  # the paper's 100,000 are for web pages: a book has more
    GopherRepetition(),
    CodeQuality(),
    ExactDedup(),
    MinHashDedup(),
)


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """What goes in and what is done to it."""

    sources: tuple[Source, ...] = (PythonStdlib(),)
    stages: tuple[CurationStage, ...] = DEFAULT_STAGES
    validation_fraction: float = 0.02  # of documents, by a hash of their id (or group)
    test_fraction: float = 0.02
    tag_dropped: bool = True  # filters also measure what a filter before them dropped: thresholds may loosen
    tags_in_metadata: tuple[str, ...] = ()  # filters whose signals go with each document, e.g. ("Language",)
    limit: int | None = None  # documents of each source, of its first files: to try a config; None: all
    shard_megabytes: int = 16  # of text in a shard, the piece of work that is resumed
    workers: Workers = dataclasses.field(default_factory=Workers)

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty: name at least one")
        if (
            min(self.validation_fraction, self.test_fraction) < 0
            or self.validation_fraction + self.test_fraction >= 1
        ):
            raise ValueError(
                "validation_fraction and test_fraction must not be negative, and leave some to train on"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: wanted 1 or more, or None for all")
        stages = [stage.made() if isinstance(stage, Named) else stage for stage in self.stages]
        known = {type(stage).__name__ for stage in stages}
        if missing := sorted(set(self.tags_in_metadata) - known):
            raise ValueError(
                f"tags_in_metadata: no stage is a {missing[0]}; there are {', '.join(sorted(known))}"
            )

    def numbered_stages(self) -> Iterator[tuple[int, Stage]]:
        """The stages from 1 on; before them, as 0, the extraction of web pages where the config has none.

        A page that no stage extracts would go into the tokens with its tags.
        """
        stages = [stage.made() if isinstance(stage, Named) else stage for stage in self.stages]
        extracts = any(isinstance(stage, Extract) for stage in stages)
        if not extracts and any(source.has_pages() for source in self.sources):
            yield 0, Extract()
        yield from enumerate(stages, start=1)

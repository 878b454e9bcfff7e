"""Harm: pages of listed addresses, texts with listed words, and texts that a classifier takes for harmful.

No list comes with the project: what harms differs by use and by language, so files are given, one entry a line
(UTF-8; empty lines and lines that start with # are passed over). Known ones: UT1's blacklists for addresses,
LDNOOBW for words.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import urllib.parse
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from configs.typed import ConfigError
from data import storage
from data.documents import Document, DocumentType
from data.quality.classifier import ByClassifier
from data.stage import Filter, Signals
from data.words import UNSPACED, words_and_marks

_UNSPACED = re.compile(f"[{UNSPACED}]")


@dataclasses.dataclass(frozen=True)
class UrlList(Filter):
    """Drops documents whose address (`metadata["url"]`) is listed. Documents without one stay, unless `require_url`.

    domains: "evil.org" is that host and all below it (www.evil.org), never notevil.org; an entry may also name a
    path, "good.org/bad/", and is then all whose path starts with it at a boundary. substrings: anywhere in the address.
    """

    domains: tuple[str, ...] = ()  # files
    substrings: tuple[str, ...] = ()  # files
    require_url: bool = False
    applies_to: DocumentType = "any"

    measured_by: ClassVar[tuple[str, ...]] = ("domains", "substrings")

    def files(self) -> tuple[str, ...]:
        return _given(self, (*self.domains, *self.substrings), "domains=(FILE,) or substrings=(FILE,)")

    def signals_of(self, documents: Sequence[Document]) -> list[Signals]:
        self.files()
        return [self.look_up(str(document["metadata"].get("url") or "")) for document in documents]

    def look_up(self, url: str) -> Signals:
        """What is listed of an address: {"url", "listed"}, "" where nothing is."""
        lists = [_domains(path, storage.state(path)) for path in self.domains]
        for name in names_of(url):
            if any(name in entries for entries in lists):
                return {"url": url, "listed": name}
        small = url.lower()
        for path in self.substrings:
            for entry in _entries(path, storage.state(path)):
                if entry in small:
                    return {"url": url, "listed": entry}
        return {"url": url, "listed": ""}

    def reason(self, signals: Signals) -> str | None:
        if not signals["url"]:
            return "url: none" if self.require_url else None
        return "url: listed" if signals["listed"] else None


@dataclasses.dataclass(frozen=True)
class WordList(Filter):
    """Drops documents with more than `max_per_thousand` listed words or phrases for each thousand words; 0, C4's rule,
    is any at all.

    Whole words, whatever their case. An entry of a script without spaces (Chinese, Japanese, Thai) counts anywhere.
    """

    words: tuple[str, ...] = ()  # files
    max_per_thousand: float = 0.0
    applies_to: DocumentType = "prose"

    measured_by: ClassVar[tuple[str, ...]] = ("words",)

    def files(self) -> tuple[str, ...]:
        return _given(self, self.words, "words=(FILE,)")

    def signals(self, text: str) -> Signals:
        lists = _word_lists(tuple((path, storage.state(path)) for path in self.files()))
        words = words_and_marks(text)
        found = sum(1 for word in words if word in lists.single)
        if lists.longest > 1 or lists.first:
            found += _phrases(words, lists)
        found += sum(text.count(entry) for entry in lists.anywhere)
        return {"listed": found, "words": len(words), "per_thousand": 1000 * found / max(len(words), 1)}

    def reason(self, signals: Signals) -> str | None:
        return "words: listed" if signals["per_thousand"] > self.max_per_thousand else None


@dataclasses.dataclass(frozen=True)
class HarmClassifier(ByClassifier):
    """Drops what a classifier, trained with harmful texts as its positive set, gives more than `max_score`."""

    model: str = ""  # a folder of `python -m data.quality train`
    max_score: float = 0.5
    applies_to: DocumentType = "prose"

    def reason(self, signals: Signals) -> str | None:
        return "harm: high score" if signals["score"] > self.max_score else None


class _Lists(NamedTuple):
    single: frozenset[str]  # words
    phrases: frozenset[tuple[str, ...]]
    first: frozenset[str]  # the words that phrases begin with
    longest: int  # words of a phrase
    anywhere: tuple[str, ...]  # in scripts without spaces


def names_of(url: str) -> list[str]:
    """What an address is listed under: its host and all that this is below, alone and with each leading part of its
    path: "http://a.b.org/x/y" under a.b.org/x/y, a.b.org/x, a.b.org, b.org/x/y ..."""
    try:
        parts = urllib.parse.urlsplit(url if "//" in url else f"//{url}")
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        return []
    labels = host.split(".")
    hosts = [".".join(labels[i:]) for i in range(len(labels))] if not _is_number(host) else [host]
    folders = [part for part in parts.path.split("/") if part]
    paths = ["/".join(["", *folders[:n]]) for n in range(len(folders), -1, -1)]
    return [name + path for name in hosts for path in paths if name]


def _is_number(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


def _phrases(words: list[str], lists: _Lists) -> int:
    found = 0
    for i, word in enumerate(words):
        if word in lists.first:
            found += sum(tuple(words[i : i + n]) in lists.phrases for n in range(2, lists.longest + 1))
    return found


def _given(stage: Filter, paths: tuple[str, ...], mend: str) -> tuple[str, ...]:
    name = type(stage).__name__
    if not paths:
        raise ConfigError(
            f"{name} has no list, and none comes with the project: give {mend}, an entry a line."
        )
    for path in paths:
        storage.check_exists(path)
    return paths


@functools.lru_cache(maxsize=64)
def _entries(path: str, state: tuple[int, int]) -> tuple[str, ...]:
    """Raises ConfigError for a file without entries."""
    lines = (line.decode("utf-8", "replace").strip().lower() for line in storage.lines(path))
    found = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not found:
        raise ConfigError(f"{path}: the list is empty; wanted an entry a line.")
    return found


@functools.lru_cache(maxsize=64)
def _domains(path: str, state: tuple[int, int]) -> frozenset[str]:
    """Entries as `names_of` writes them, whether given as a host or as an address."""
    return frozenset(name[0] for entry in _entries(path, state) if (name := names_of(entry.lstrip("*."))))


@functools.lru_cache(maxsize=8)
def _word_lists(files: tuple[tuple[str, tuple[int, int]], ...]) -> _Lists:
    entries = [entry for path, state in files for entry in _entries(path, state)]
    spaced = [tuple(words_and_marks(entry)) for entry in entries if not _UNSPACED.search(entry)]
    phrases = frozenset(words for words in spaced if len(words) > 1)
    return _Lists(
        frozenset(words[0] for words in spaced if len(words) == 1),
        phrases,
        frozenset(words[0] for words in phrases),
        max(map(len, phrases), default=1),
        tuple(entry for entry in entries if _UNSPACED.search(entry)),
    )

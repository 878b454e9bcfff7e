"""Folders of files of all kinds, each read by the source for its suffix."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from configs.typed import ConfigError
from data import storage
from data.documents import Rejected
from data.sources.base import Items, SourceBase
from data.sources.code import LANGUAGES
from data.sources.files import Csv, Jsonl, Parquet, TextFile
from data.sources.pdf import Pdf
from data.sources.warc import Warc, is_archive

_PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".log", "")
_HTML = (".html", ".htm", ".xhtml")
_ROWS = (".jsonl", ".ndjson", ".json")
_TABLES = {".csv": ",", ".tsv": "\t"}


@dataclasses.dataclass(frozen=True)
class Folder(SourceBase):
    """Every file of a folder that matches `glob`, each read by its suffix: JSONL, CSV and Parquet row by row, web
    archives record by record, others whole. A file that is hidden or of another kind is counted with its reason.
    """

    path: str
    glob: str = "**/*"
    licence: str = "unknown"
    name: str = ""
    text_field: str = "text"  # of JSONL, CSV and Parquet files

    def files(self) -> list[str]:
        storage.check_exists(self.path)
        found = storage.find(self.path, self.glob)
        if all(isinstance(self.reader(path), str) for path in found):
            endings = Counter(storage.suffix(path) or "no suffix" for path in found)
            there = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5)) or "none"
            known = " ".join(
                (*_PROSE[:-1], *_HTML, *_ROWS, *_TABLES, ".parquet", ".pdf", ".warc", *LANGUAGES)
            )
            raise ConfigError(
                f"{self.path}: no file matches {self.glob} with a suffix among {known} (.gz, .zst, .bz2, .xz); "
                f"there are: {there}"
            )
        return found

    def has_pages(self) -> bool:
        return any(is_archive(path) or storage.suffix(path) in _HTML for path in self.files())

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        source = self.label()
        for path in self.files() if paths is None else paths:
            name, reader = f"{source}/{self._within(path)}", self.reader(path)
            if isinstance(reader, str):
                yield Rejected(f"{name}/0", reader, source)
                continue
            try:
                for item in reader.documents():
                    rejected = isinstance(item, Rejected)
                    yield item._replace(source=source) if rejected else {**item, "source": source}
            except ConfigError as error:  # of one file among many, such as a table without texts
                yield Rejected(f"{name}/0", f"unreadable: {error}", source)

    def reader(self, path: str) -> SourceBase | str:
        """The source that reads this file, or why none does."""
        within, ending = self._within(path), storage.suffix(path)
        common: dict[str, Any] = {"path": path, "licence": self.licence}
        common["name"] = f"{self.label()}/{within}"
        if any(part.startswith(".") for part in within.split("/")):
            return "type: hidden"
        if is_archive(path):
            return Warc(**common)
        if ending in _ROWS:
            return Jsonl(**common, text_field=self.text_field)
        if ending in _TABLES:
            return Csv(**common, text_field=self.text_field, delimiter=_TABLES[ending])
        if ending == ".parquet":
            return Parquet(**common, text_field=self.text_field)
        if ending == ".pdf":
            return Pdf(**common)
        if ending in _HTML:
            return TextFile(**common, type="html")
        if ending in LANGUAGES:
            return TextFile(**common, type="code")
        return TextFile(**common) if ending in _PROSE else f"type: {ending} is not read"

    def _within(self, path: str) -> str:
        return os.path.relpath(path, self.path).replace(os.sep, "/")

"""Text, JSONL, CSV and Parquet files."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

from configs.typed import ConfigError
from data import row_files, storage
from data.documents import Document, Rejected, content_key, make_document
from data.extract.encoding import decode_file
from data.row_files import UNREADABLE, RowError
from data.sources.base import Items, SourceBase


@dataclasses.dataclass(frozen=True)
class TextFile(SourceBase):
    """One text file, also .gz, .zst, .bz2 or .xz; a document ends at each line that equals `separator`."""

    path: str
    separator: str | None = None  # None: the whole file is one document
    encoding: str | None = None  # None: what it declares or seems to be
    type: str = "prose"  # prose, code or html
    licence: str = "unknown"
    name: str = ""  # default: the file's name

    def files(self) -> list[str]:
        storage.check_exists(self.path)
        return [self.path]

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        name = self.label()
        metadata = {"type": self.type, "path": self.path}
        try:
            with storage.open_bytes(self.files()[0]) as file:
                raw = file.read()
            text = decode_file(raw) if self.encoding is None else raw.decode(self.encoding)
        except storage.unreadable() as error:
            yield Rejected(f"{name}/0", f"unreadable: {error}", name)
            return
        parts = [text] if self.separator is None else _split_at(text, self.separator)
        for part in parts:
            key = "0" if self.separator is None else content_key(part)
            yield make_document(f"{name}/{key}", part, name, self.licence, metadata)


@dataclasses.dataclass(frozen=True)
class Jsonl(SourceBase):
    """One JSON object a line, or one JSON array of them; also .gz, .zst, .bz2 or .xz."""

    path: str
    text_field: str = "text"
    id_field: str | None = None  # None: a hash of the text
    metadata_fields: tuple[str, ...] = ()  # taken over into the metadata where they are there, e.g. ("url",)
    type: str = "prose"
    licence: str = "unknown"
    name: str = ""

    def files(self) -> list[str]:
        storage.check_exists(self.path)
        return [self.path]

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        name = self.label()
        try:
            for i, row in json_rows(self.files()[0]):
                yield self._document(row, name, i)
        except storage.unreadable() as error:
            yield Rejected(f"{name}/end", f"unreadable from here on: {error}", name)

    def _document(self, row: Any, name: str, i: int) -> Document | Rejected:
        if isinstance(row, BadLine):
            return Rejected(f"{name}/{i}", f"bad line: {row.why}", name)
        try:
            text = row[self.text_field]
            key = None if self.id_field is None else row[self.id_field]
        except (KeyError, TypeError) as error:
            return Rejected(f"{name}/{i}", f"bad line: {type(error).__name__}: {error}", name)
        if not isinstance(text, str):
            reason = f"bad line: {self.text_field} is {type(text).__name__}, not text"
            return Rejected(f"{name}/{i}", reason, name)
        metadata = {"type": self.type, "path": self.path}
        metadata |= {field: row[field] for field in self.metadata_fields if field in row}
        key = content_key(text) if key is None else key
        return make_document(f"{name}/{key}", text, name, self.licence, metadata)


@dataclasses.dataclass(frozen=True)
class Parquet(SourceBase):
    """The rows of a Parquet file."""

    path: str
    text_field: str = "text"
    id_field: str | None = None  # None: a hash of the text
    metadata_fields: tuple[str, ...] = ()  # columns taken over into the metadata
    type: str = "prose"
    licence: str = "unknown"
    name: str = ""

    def files(self) -> list[str]:
        storage.check_exists(self.path)
        return [self.path]

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        import pyarrow as pa
        import pyarrow.parquet as pq

        name, path = self.label(), self.files()[0]
        try:
            columns = pq.read_schema(storage.open_raw(path)).names
        except (OSError, pa.ArrowInvalid) as error:
            yield Rejected(f"{name}/0", f"unreadable: {error}", name)
            return
        wanted = _wanted(self)
        if missing := [field for field in wanted if field not in columns]:
            raise ConfigError(f"{path} has no column {missing[0]!r}; it has {', '.join(columns)}")
        for i, row in enumerate(row_files.parquet_rows(path, wanted)):
            if isinstance(row.value, RowError):
                yield Rejected(f"{name}/end", f"unreadable from here on: {row.value}", name)
            else:
                yield _row_document(self, row.value, name, i)


@dataclasses.dataclass(frozen=True)
class Csv(SourceBase):
    """The rows of a table of text; its first line names the columns; also .gz, .zst, .bz2 or .xz."""

    path: str
    delimiter: str = ","  # a tab in .tsv files
    text_field: str = "text"
    id_field: str | None = None  # None: a hash of the text
    metadata_fields: tuple[str, ...] = ()  # columns taken over into the metadata
    type: str = "prose"
    licence: str = "unknown"
    name: str = ""

    def files(self) -> list[str]:
        storage.check_exists(self.path)
        return [self.path]

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        name, path = self.label(), self.files()[0]
        try:
            with storage.open_bytes(path) as file:
                lines = io.StringIO(decode_file(file.read()), newline="")
            csv.field_size_limit(1 << 30)
            rows = csv.DictReader(lines, delimiter=self.delimiter, strict=True)
            columns = rows.fieldnames or []
            if missing := [field for field in _wanted(self) if field not in columns]:
                raise ConfigError(f"{path} has no column {missing[0]!r}; it has {', '.join(columns)}")
            for i, row in enumerate(rows):
                yield _row_document(self, row, name, i)
        except (*storage.unreadable(), csv.Error) as error:
            if isinstance(error, ConfigError):
                raise
            yield Rejected(f"{name}/end", f"unreadable from here on: {error}", name)


def _wanted(source: Csv | Parquet) -> list[str]:
    """The columns that a source reads."""
    return list(dict.fromkeys((source.text_field, *filter(None, [source.id_field]), *source.metadata_fields)))


def _row_document(source: Csv | Parquet, row: dict[str, Any], name: str, i: int) -> Document | Rejected:
    text = row[source.text_field]
    if not isinstance(text, str):
        return Rejected(f"{name}/{i}", f"bad row: {source.text_field} is {type(text).__name__}", name)
    taken = {field: row[field] for field in source.metadata_fields}
    key = content_key(text) if source.id_field is None else row[source.id_field]
    metadata = {"type": source.type, "path": source.path, **taken}
    return make_document(f"{name}/{key}", text, name, source.licence, metadata)


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line that is no JSON, and why."""

    why: str


def json_rows(path: str) -> Iterator[tuple[int, Any]]:
    """(number of the line from 0, JSON value or BadLine) of a JSONL file or of one with a JSON array.

    Empty lines are passed over. Raises ValueError where the file itself is damaged.
    """
    for row in row_files.json_rows(path):
        number = int(row.where.split()[-1]) - 1
        if not isinstance(row.value, RowError):
            yield number, row.value
        elif row.value.reason == UNREADABLE:
            raise ValueError(str(row.value).removeprefix(f"{UNREADABLE}: "))
        else:
            yield number, BadLine(str(row.value))


def _split_at(text: str, separator: str) -> list[str]:
    parts: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if line.rstrip("\r\n") == separator:
            parts.append([])
        else:
            parts[-1].append(line)
    return [joined for part in parts if (joined := "".join(part))]

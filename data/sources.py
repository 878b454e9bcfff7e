"""Where documents come from: text, JSONL, Parquet, a folder of files, and the Python standard library itself.

A source is a small frozen dataclass with `documents()`. It yields a Document, or a Rejected where something
can't be
read: one bad file or line never stops a run.
"""

from __future__ import annotations

import ast
import dataclasses
import gzip
import io
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from configs.typed import ConfigError
from data.shards import hash_of

_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".json", ".parquet", ".py")


class Document(TypedDict):
    """One text. `metadata["type"]` is "prose" or "code" and decides which filters look at it; documents of
    one `metadata["group"]` (default: the id) fall into the same split."""

    id: str
    text: str
    source: str
    licence: str
    metadata: dict[str, Any]


class Rejected(NamedTuple):
    """Something that is no document, and why."""

    id: str
    reason: str
    source: str


@dataclasses.dataclass(frozen=True)
class TextFile:
    """One UTF-8 text file, also .gz or .zst; a document ends at each line that equals `separator`."""

    path: str
    separator: str | None = None  # None: the whole file is one document
    encoding: str = "utf-8"
    type: str = "prose"  # prose or code
    licence: str = "unknown"
    name: str = ""  # default: the file's name

    def files(self) -> list[Path]:
        return [_existing(self.path)]

    def documents(self) -> Iterator[Document | Rejected]:
        name, path = self.name or Path(self.path).name, _existing(self.path)
        metadata = {"type": self.type, "path": self.path}
        try:
            with _open(path) as file:
                text = file.read().decode(self.encoding)
        except (OSError, ValueError, EOFError) as error:
            yield Rejected(f"{name}/0", f"unreadable: {error}", name)
            return
        parts = [text] if self.separator is None else _split_at(text, self.separator)
        for i, part in enumerate(parts):
            yield _document(f"{name}/{i}", part, name, self.licence, metadata)


@dataclasses.dataclass(frozen=True)
class Jsonl:
    """One JSON object a line, also .gz or .zst."""

    path: str
    text_field: str = "text"
    id_field: str | None = None  # None: the number of the line
    type: str = "prose"
    licence: str = "unknown"
    name: str = ""

    def files(self) -> list[Path]:
        return [_existing(self.path)]

    def documents(self) -> Iterator[Document | Rejected]:
        name = self.name or Path(self.path).name
        try:
            with _open(_existing(self.path)) as file:
                for i, line in enumerate(file):
                    if line.strip():
                        yield self._document(line, name, i)
        except (OSError, ValueError, EOFError) as error:
            yield Rejected(f"{name}/end", f"unreadable from here on: {error}", name)

    def _document(self, line: bytes, name: str, i: int) -> Document | Rejected:
        try:
            row = json.loads(line)
            text = row[self.text_field]
            key = i if self.id_field is None else row[self.id_field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return Rejected(f"{name}/{i}", f"bad line: {type(error).__name__}: {error}", name)
        if not isinstance(text, str):
            return Rejected(
                f"{name}/{i}", f"bad line: {self.text_field} is {type(text).__name__}, not text", name
            )
        return _document(f"{name}/{key}", text, name, self.licence, {"type": self.type, "path": self.path})


@dataclasses.dataclass(frozen=True)
class Parquet:
    """The rows of a Parquet file."""

    path: str
    text_field: str = "text"
    type: str = "prose"
    licence: str = "unknown"
    name: str = ""

    def files(self) -> list[Path]:
        return [_existing(self.path)]

    def documents(self) -> Iterator[Document | Rejected]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        name, path = self.name or Path(self.path).name, _existing(self.path)
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            yield Rejected(f"{name}/0", f"unreadable: {error}", name)
            return
        if self.text_field not in file.schema_arrow.names:
            raise ConfigError(
                f"{path} has no column {self.text_field!r}; it has {', '.join(file.schema_arrow.names)}"
            )
        row = 0
        for batch in file.iter_batches(columns=[self.text_field], batch_size=1024):
            for value in batch.column(0).to_pylist():
                if isinstance(value, str):
                    metadata = {"type": self.type, "path": self.path}
                    yield _document(f"{name}/{row}", value, name, self.licence, metadata)
                else:
                    yield Rejected(
                        f"{name}/{row}", f"bad row: {self.text_field} is {type(value).__name__}", name
                    )
                row += 1


@dataclasses.dataclass(frozen=True)
class Folder:
    """Every file of a folder that matches `glob`, each read by its suffix: .jsonl and .parquet row by row,
    others whole.
    """

    path: str
    glob: str = "**/*"
    licence: str = "unknown"
    name: str = ""
    text_field: str = "text"  # of .jsonl and .parquet files

    def files(self) -> list[Path]:
        folder = _existing(self.path)
        found = sorted(p for p in folder.glob(self.glob) if p.is_file() and _suffix(p) in _SUFFIXES)
        if not found:
            raise ConfigError(
                f"{folder}: no file matches {self.glob} with a suffix among {' '.join(_SUFFIXES)} (.gz, .zst)"
            )
        return found

    def documents(self) -> Iterator[Document | Rejected]:
        source = self.name or Path(self.path).name
        for path in self.files():
            common = {"path": str(path), "licence": self.licence}
            common["name"] = f"{source}/{path.relative_to(self.path).as_posix()}"
            kind = "code" if _suffix(path) == ".py" else "prose"
            if _suffix(path) in (".jsonl", ".json"):
                reader = Jsonl(**common, text_field=self.text_field)
            elif _suffix(path) == ".parquet":
                reader = Parquet(**common, text_field=self.text_field)
            else:
                reader = TextFile(**common, type=kind)
            for item in reader.documents():
                yield (
                    item._replace(source=source) if isinstance(item, Rejected) else item | {"source": source}
                )


@dataclasses.dataclass(frozen=True)
class PythonStdlib:
    """Prose and code that lie on every Python machine: the running interpreter's library.

    Its sources (without tests and site-packages) are code; the docstrings of each module, and the language
    reference in `pydoc_data.topics`, are prose. A module's code and docstrings are one group, so that a split
    never has a docstring on one side and its source on the other.
    """

    code: bool = True
    docstrings: bool = True
    topics: bool = True
    max_bytes: int | None = None  # of source files, taken in the order of a hash of their names

    def files(self) -> list[Path]:
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {
            "test",
            "tests",
            "idle_test",
            "site-packages",
            "dist-packages",
            "lib2to3",
            "__pycache__",
            "ensurepip",
        }
        found = [p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts)]
        found = [p for p in found if p.relative_to(root).as_posix() != "pydoc_data/topics.py" and p.is_file()]
        found.sort(key=lambda p: hash_of(p.relative_to(root).as_posix()))
        if self.max_bytes is None:
            return found
        kept, size = [], 0
        for path in found:
            size += path.stat().st_size
            if size > self.max_bytes:
                break
            kept.append(path)
        return kept

    def documents(self) -> Iterator[Document | Rejected]:
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in self.files():
            yield from self._module(path, path.relative_to(root).as_posix())
        if self.topics:
            from pydoc_data.topics import topics

            for topic, text in sorted(topics.items()):
                yield _stdlib_document(f"topics/{topic}", text, "prose", f"topics/{topic}")

    def _module(self, path: Path, name: str) -> Iterator[Document | Rejected]:
        try:
            with tokenize.open(path) as file:  # honours the coding line
                text = file.read()
        except (OSError, SyntaxError, ValueError) as error:
            yield Rejected(f"python_stdlib/{name}", f"unreadable: {error}", "python_stdlib")
            return
        if self.code:
            yield _stdlib_document(name, text, "code", name)
        if self.docstrings:
            try:
                prose = _docstrings(text, name)
            except (SyntaxError, ValueError, RecursionError) as error:
                yield Rejected(
                    f"python_stdlib/{name}#docstrings", f"does not parse: {error}", "python_stdlib"
                )
                return
            if prose:
                yield _stdlib_document(f"{name}#docstrings", prose, "prose", name)


Source = TextFile | Jsonl | Parquet | Folder | PythonStdlib


def source_state(source: Source) -> list[Any]:
    """What a re-run must find unchanged to reuse the documents: files with their sizes and times."""
    files = [(str(p), s.st_size, s.st_mtime_ns) for p in source.files() for s in [p.stat()]]
    return [sys.version if isinstance(source, PythonStdlib) else "", files]


def _stdlib_document(name: str, text: str, kind: str, group: str) -> Document:
    metadata = {"type": kind, "path": name, "group": group}
    return _document(f"python_stdlib/{name}", text, "python_stdlib", "PSF-2.0", metadata)


def _docstrings(text: str, name: str) -> str:
    """The docstrings of a module, its classes and functions, each under its qualified name."""
    parts: list[str] = []

    def visit(node: ast.AST, qualified: str) -> None:
        if doc := ast.get_docstring(node):
            parts.append(f"{qualified}\n\n{doc}")
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                visit(child, f"{qualified}.{child.name}")

    visit(ast.parse(text), name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return "\n\n".join(parts)


def _document(name: str, text: str, source: str, licence: str, metadata: dict[str, Any]) -> Document:
    return {"id": name, "text": text, "source": source, "licence": licence, "metadata": metadata}


def _existing(path: str) -> Path:
    if not os.path.exists(path):
        raise ConfigError(f"the source {path!r} does not exist (from {os.getcwd()})")
    return Path(path)


def _suffix(path: Path) -> str:
    """The suffix under .gz or .zst."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.open(path, "rb"))
    return open(path, "rb")


def _split_at(text: str, separator: str) -> list[str]:
    parts: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if line.rstrip("\r\n") == separator:
            parts.append([])
        else:
            parts[-1].append(line)
    return [joined for part in parts if (joined := "".join(part))]

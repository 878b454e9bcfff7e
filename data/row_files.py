"""Rows of JSON arrays, JSONL and Parquet files, each with the line or row that an error can name."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configs.typed import ConfigError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
_COMPRESSED = (".gz", ".zst")


class RowError(ValueError):
    """What is wrong with a row. `reason` has no words of the row, so that rows can be counted by it."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Row(NamedTuple):
    """One row, or the RowError in its place; `where` is "line 12" or "row 12", counted from 1."""

    where: str
    value: Any
    done: float  # part of the file that has been read


def read_rows(path: str | os.PathLike) -> Iterator[Row]:
    """The rows of a file by its suffix, also under .gz or .zst. A bad line is a row whose value is a RowError.

    Raises ConfigError for a file that is missing or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist (from {os.getcwd()}).")
    kind = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind not in SUFFIXES:
        raise ConfigError(f"{path}: wanted one of {', '.join(SUFFIXES)}, or a JSON one with .gz or .zst.")
    if kind == ".json" and _first_character(path) == "[":
        return _array_rows(path)
    return _line_rows(path)


def files_of(paths: tuple[str, ...]) -> list[Path]:
    """Files as given, and in folders those with a known suffix, sorted. Raises ConfigError for none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and _has_known_suffix(p)]
            if not inside:
                raise ConfigError(f"{path}: no file in it ends in {', '.join(SUFFIXES)} (.gz, .zst).")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ConfigError(f"{path} does not exist (from {os.getcwd()}).")
    return found


def _has_known_suffix(path: Path) -> bool:
    return (Path(path.stem) if path.suffix in _COMPRESSED else path).suffix in SUFFIXES


def _line_rows(path: Path) -> Iterator[Row]:
    size = max(path.stat().st_size, 1)
    with open(path, "rb") as raw, _unpacked(raw, path) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if line.strip() in (b"{", b"[") and number == 1:
                    what = RowError(
                        "one JSON value over many lines", "wanted an array in a .json file, or a row a line"
                    )
                    yield Row("line 1", what, 1.0)
                    return
                if line.strip():
                    yield Row(f"line {number}", _parsed(line), min(raw.tell() / size, 1.0))
        except (OSError, EOFError, ValueError) as error:
            yield Row(f"line {number + 1}", RowError("the file can't be read from here on", str(error)), 1.0)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return RowError("not valid JSON", str(error))


def _array_rows(path: Path) -> Iterator[Row]:
    """The items of a JSON array, one by one, so that each has its line and damage ends only what follows."""
    with open(path, "rb") as raw, _unpacked(raw, path) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except (OSError, EOFError, ValueError) as error:
            yield Row("line 1", RowError("the file can't be read", str(error)), 1.0)
            return
    decoder, size = json.JSONDecoder(), max(len(text), 1)
    at, line, counted = _after_space(text, text.index("[") + 1), 1, 0
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield Row(f"line {line}", RowError("not valid JSON from here on", str(error)), 1.0)
            return
        yield Row(f"line {line}", value, at / size)
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            break
    if text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        yield Row(f"line {line}", RowError("the array does not end", "wanted , or ]"), 1.0)


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        yield Row("row 1", RowError("the file can't be read", str(error)), 1.0)
        return
    number, count = 0, max(file.metadata.num_rows, 1)
    try:
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", value, number / count)
    except (OSError, pa.ArrowException) as error:
        yield Row(f"row {number + 1}", RowError("the file can't be read from here on", str(error)), 1.0)


def _first_character(path: Path) -> str:
    with open(path, "rb") as raw, _unpacked(raw, path) as file:
        try:
            head = file.read(4096)
        except (OSError, EOFError, ValueError):
            return ""
    return head.decode("utf-8-sig", "replace").lstrip()[:1]


def _unpacked(raw: io.BufferedReader, path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw

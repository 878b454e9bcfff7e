"""Rows of JSON arrays, JSONL and Parquet files, on this machine and at gs:// and s3://, each with the line or row that
an error can name: what every reader of rows in data/ is made of."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from configs.typed import ConfigError
from data import storage

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


UNREADABLE = "the file can't be read from here on"


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


def has_lone_surrogates(value: Any) -> bool:
    """Whether a text in a row is no valid Unicode, which escapes of JSON can spell and no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def read_rows(path: str | os.PathLike) -> Iterator[Row]:
    """The rows of a file by its suffix, also packed. A bad line is a row with a RowError as its value.

    Raises ConfigError for a file that is missing or of another kind.
    """
    path = os.fspath(path)
    storage.check_exists(path)
    kind = storage.suffix(path)
    if storage.is_folder(path) or kind not in SUFFIXES:
        raise ConfigError(
            f"{path}: wanted one of {', '.join(SUFFIXES)}, or a JSON one with {', '.join(storage.COMPRESSED)}."
        )
    return parquet_rows(path) if kind == ".parquet" else json_rows(path)


def json_rows(path: str) -> Iterator[Row]:
    """The rows of a file with a JSON object a line, or with one array of them, whatever its name."""
    return _array_rows(path) if _first_character(path) == "[" else _line_rows(path)


def files_of(paths: tuple[str, ...]) -> list[str]:
    """Files as given, and in folders those with a known suffix, sorted. Raises ConfigError for none."""
    found: list[str] = []
    for path in map(os.fspath, paths):
        storage.check_exists(path)
        if storage.is_folder(path):
            inside = [file for file in storage.find(path, "**/*") if storage.suffix(file) in SUFFIXES]
            if not inside:
                endings = ", ".join(SUFFIXES)
                raise ConfigError(
                    f"{path}: no file in it ends in {endings} ({', '.join(storage.COMPRESSED)})."
                )
            found += inside
        else:
            found.append(path)
    return found


def _line_rows(path: str) -> Iterator[Row]:
    size = max(storage.state(path)[0], 1)
    with storage.open_raw(path) as raw, storage.unpacked(raw, path) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip() in (b"{", b"[") and number == 1:
                    what = RowError(
                        "one JSON value over many lines", "wanted an array in a .json file, or a row a line"
                    )
                    yield Row("line 1", what, 1.0)
                    return
                if line.strip():
                    yield Row(f"line {number}", _parsed(line), min(raw.tell() / size, 1.0))
        except storage.unreadable() as error:
            yield Row(f"line {number + 1}", RowError(UNREADABLE, str(error)), 1.0)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return RowError("not valid JSON", str(error))


def _array_rows(path: str) -> Iterator[Row]:
    """The items of a JSON array, one by one, so that each has its line and damage ends only what follows."""
    with storage.open_bytes(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except storage.unreadable() as error:
            yield Row("line 1", RowError(UNREADABLE, str(error)), 1.0)
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


def parquet_rows(path: str, columns: list[str] | None = None) -> Iterator[Row]:
    """The rows of a Parquet file, with these columns or with all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(storage.open_raw(path))
        count = max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", value, number / count)
    except (OSError, pa.ArrowException) as error:
        yield Row(f"row {number + 1}", RowError(UNREADABLE, str(error)), 1.0)


def _first_character(path: str) -> str:
    with storage.open_bytes(path) as file:
        try:
            head = file.read(4096)
        except storage.unreadable():
            return ""
    return head.decode("utf-8-sig", "replace").lstrip()[:1]

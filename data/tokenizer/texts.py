"""Texts for tokenizers, read as a stream: files, folders, JSONL, Parquet, and text datasets (data.shards)."""

from __future__ import annotations

import codecs
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from configs.typed import ConfigError
from data.documents import Rejected
from data.extract.encoding import encoding_of
from data.shards import MANIFEST, open_dataset
from data.sources import Csv, Folder, Jsonl, Parquet, SourceBase, TextFile
from data.storage import COMPRESSED

_PIECE = 1 << 20  # bytes of a plain file that are one text
_READERS = {".jsonl": Jsonl, ".ndjson": Jsonl, ".json": Jsonl, ".parquet": Parquet, ".csv": Csv}


def read_texts(
    paths: Iterable[str | Path], text_field: str = "text", unread: Counter[str] | None = None
) -> Iterator[str]:
    """The texts at each path in turn. What can't be read as text is left out, and counted in `unread` by its reason.

    A plain file that is larger than a megabyte comes in pieces that end with a line, so that memory stays bounded.
    Raises ConfigError for a path that does not exist or holds no text.
    """
    unread = Counter() if unread is None else unread
    for path in map(Path, paths):
        for file, reader in _files(path, text_field):
            if isinstance(reader, str):
                unread[reader] += 1
                continue
            try:
                for item in _items(file, reader):
                    if isinstance(item, str):
                        yield item
                    else:
                        unread[": ".join(item.reason.split(": ")[:2])] += 1
            except ConfigError as error:
                if file == path:
                    raise
                unread[f"unreadable: {error}"] += 1  # of one file among many, such as a table without texts


def size_of(paths: Iterable[str | Path]) -> int | None:
    """Bytes of the texts at the paths, to show progress; None where files are packed or hold more than their text."""
    files = [
        file for path in map(Path, paths) for file, reader in _files(path) if not isinstance(reader, str)
    ]
    plain = all(f.is_file() and f.suffix not in (*COMPRESSED, *_READERS) for f in files)
    return sum(file.stat().st_size for file in files) if plain else None


def read_groups(
    paths: Iterable[str], text_field: str = "text", only: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Texts by name, for a comparison: NAME=PATH, or a folder or .zip in which each file or sub-folder is a group.

    `only`: names to keep, all by default. A path by itself that is a file is a group of its own name.
    Raises ConfigError for a name in `only` that is not there.
    """
    groups: dict[str, list[str]] = {}
    for given in paths:
        name, _, path = given.rpartition("=")
        if name:
            groups[name] = list(read_texts([path], text_field))
        elif Path(given).suffix == ".zip":
            groups |= _zipped(Path(given))
        elif Path(given).is_dir() and not (Path(given) / MANIFEST).is_file():
            inside = sorted(p for p in Path(given).iterdir() if not p.name.startswith("."))
            groups |= {p.name.split(".")[0]: list(read_texts([p], text_field)) for p in inside}
        else:
            groups[Path(given).name.split(".")[0]] = list(read_texts([given], text_field))
    wanted = list(only)
    if missing := [name for name in wanted if name not in groups]:
        raise ConfigError(
            f"there are no texts named {', '.join(missing)}; there are {', '.join(sorted(groups))}."
        )
    return {name: texts for name, texts in groups.items() if not wanted or name in wanted}


def _files(path: Path, text_field: str = "text") -> list[tuple[Path, SourceBase | str | None]]:
    """Each file with the source that reads it, or why none does; None for a text dataset."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder of texts.")
    if (path / MANIFEST).is_file():
        return [(path, None)]
    if path.is_dir():
        folder = Folder(str(path), text_field=text_field)
        return [(Path(file), folder.reader(file)) for file in folder.files()]
    stem = Path(path.stem) if path.suffix in COMPRESSED else path
    kind = _READERS.get(stem.suffix)
    return [(path, TextFile(str(path)) if kind is None else kind(str(path), text_field=text_field))]


def _items(path: Path, reader: SourceBase | None) -> Iterator[str | Rejected]:
    if reader is None:
        dataset = open_dataset(path)
        if dataset.kind != "text":
            raise ConfigError(f"{path}: a dataset of kind {dataset.kind!r}; a tokenizer wants 'text'.")
        yield from (document["text"] for document in dataset)
    elif isinstance(reader, TextFile) and path.suffix not in COMPRESSED and path.stat().st_size > _PIECE:
        yield from _pieces(path)
    else:
        for item in reader.documents():
            yield item if isinstance(item, Rejected) else item["text"]


def _pieces(path: Path) -> Iterator[str | Rejected]:
    """A plain file, cut after the last line end of each megabyte."""
    kept = ""
    with open(path, "rb") as file:
        try:
            encoding = encoding_of(_telling_block(file))
        except ValueError as error:
            yield Rejected(str(path), f"unreadable: {error}", path.name)
            return
        file.seek(0)
        decode = codecs.getincrementaldecoder(encoding)("replace").decode
        while block := file.read(_PIECE):
            kept += decode(block)
            end = kept.rfind("\n") + 1 or len(kept)
            yield kept[:end].removeprefix("\ufeff")
            kept = kept[end:]
    if kept := kept + decode(b"", final=True):
        yield kept


def _telling_block(file: BinaryIO) -> bytes:
    """The first block that is not plain ASCII, if any is: the encoding shows in that."""
    block = b""
    while more := file.read(_PIECE):
        block = more
        if not block.isascii() or b"\0" in block:
            break
    return block


def _zipped(path: Path) -> dict[str, list[str]]:
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        return {Path(name).stem: [archive.read(name).decode("utf-8", "replace")] for name in names}

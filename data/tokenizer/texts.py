"""Texts for tokenizers, read as a stream: files, folders, JSONL, Parquet, and text datasets (data.shards)."""

from __future__ import annotations

import codecs
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from configs.typed import ConfigError
from data.shards import MANIFEST, open_dataset
from data.sources import Folder, Jsonl, Parquet, TextFile

_PIECE = 1 << 20  # bytes of a plain file that are one text
_READERS = {".jsonl": Jsonl, ".json": Jsonl, ".parquet": Parquet}


def read_texts(paths: Iterable[str | Path], text_field: str = "text") -> Iterator[str]:
    """The texts at each path in turn; what can't be read as text is left out.

    A plain file that is larger than a megabyte comes in pieces that end with a line, so that memory stays bounded.
    Raises ConfigError for a path that does not exist or holds no text.
    """
    for path in map(Path, paths):
        for file in _files(path):
            yield from _texts_of(file, text_field)


def size_of(paths: Iterable[str | Path]) -> int | None:
    """Bytes of the texts at the paths, to show progress; None where files are packed or hold more than their text."""
    files = [file for path in map(Path, paths) for file in _files(path)]
    plain = all(f.is_file() and f.suffix not in (".gz", ".zst", ".parquet", ".jsonl", ".json") for f in files)
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


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder of texts.")
    if path.is_dir() and not (path / MANIFEST).is_file():
        return [Path(file) for file in Folder(str(path)).files()]
    return [path]


def _texts_of(path: Path, text_field: str) -> Iterator[str]:
    if path.is_dir():
        dataset = open_dataset(path)
        if dataset.kind != "text":
            raise ConfigError(f"{path}: a dataset of kind {dataset.kind!r}; a tokenizer wants 'text'.")
        yield from (document["text"] for document in dataset)
        return
    stem = Path(path.stem) if path.suffix in (".gz", ".zst") else path
    if stem.suffix in _READERS:
        source = _READERS[stem.suffix](str(path), text_field=text_field)
        yield from (item["text"] for item in source.documents() if isinstance(item, dict))
    elif path.suffix in (".gz", ".zst"):
        yield from (item["text"] for item in TextFile(str(path)).documents() if isinstance(item, dict))
    else:
        yield from _pieces(path)


def _pieces(path: Path) -> Iterator[str]:
    """A plain file, bytes that are no UTF-8 as U+FFFD, cut after the last line end of each megabyte."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    kept = ""
    with open(path, "rb") as file:
        while block := file.read(_PIECE):
            kept += decode(block)
            end = kept.rfind("\n") + 1 or len(kept)
            yield kept[:end]
            kept = kept[end:]
    if kept := kept + decode(b"", final=True):
        yield kept


def _zipped(path: Path) -> dict[str, list[str]]:
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        return {Path(name).stem: [archive.read(name).decode("utf-8", "replace")] for name in names}

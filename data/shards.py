"""A dataset on disk: a folder of ArrayRecord shards with a `manifest.json` that says what is in it and where
it is from.

Kinds and their records:
    text        a JSON object {"id", "text", "source", "licence", "metadata"}
    tokens      one document's ids, for pretraining: may be split between rows
    chat        one dialogue's ids and loss mask: stays in one row
    preference  two dialogues with the same prompt: chosen, rejected
    labelled    one dialogue and whether it is desired (1) or not (0), for KTO
    steps       one dialogue, a mask on the last token of each step of its answer, and the steps' labels
    prompt      a JSON object {"messages", "tools", "answer", "metadata"}: what to sample from in RL

Beside the shards of a token dataset lies `lengths.npy`: int64 [N], or [N, 2] for preferences, in tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.files import atomic_write, temporary_beside
from configs.typed import ConfigError
from data import storage

FORMAT, VERSION = "crucible-dataset", 1
KINDS = ("text", "tokens", "chat", "preference", "labelled", "steps", "prompt")
_JSON_KINDS = ("text", "prompt")  # have no lengths
MANIFEST, LENGTHS = "manifest.json", "lengths.npy"


class DatasetError(ConfigError):
    """A dataset folder that is missing, incomplete or damaged: what, and the mend."""


class TokenRecord(NamedTuple):
    """Ids of one document, int32 [n], and its loss mask, bool [n] (None: every token counts)."""

    tokens: np.ndarray
    mask: np.ndarray | None = None


def write_dataset(
    folder: str | os.PathLike,
    records: Iterable[Any],
    kind: str = "text",
    manifest: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    *,
    shard_bytes: int = 64 << 20,
) -> Dataset:
    """Writes shards and manifest, whole or not at all: the folder appears (or is replaced) when all is
    written.

    Args:
        records: dicts for "text" and "prompt", TokenRecords for "tokens" and "chat", pairs of TokenRecords
            for "preference", (TokenRecord, label) for "labelled", (TokenRecord, labels float32) for "steps".
        manifest: more keys for manifest.json (sources, stages, dropped, key, ...); a function is called after
            the last record, when it can say totals.
        shard_bytes: a shard is closed when its records reach this size.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; known are {', '.join(KINDS)}")
    folder = storage.local(folder, "a dataset")
    temporary = temporary_beside(folder)
    temporary.mkdir(parents=True)
    try:
        facts, lengths = _write_shards(temporary, records, kind, shard_bytes)
        if kind not in _JSON_KINDS:
            shape = (-1, 2) if kind == "preference" else (-1,)
            np.save(temporary / LENGTHS, np.asarray(lengths, np.int64).reshape(shape))
        more = manifest() if callable(manifest) else manifest or {}
        content = {"format": FORMAT, "version": VERSION, "kind": kind, **facts, **more}
        atomic_write(temporary / MANIFEST, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return open_dataset(folder)


def open_dataset(folder: str | os.PathLike) -> Dataset:
    """Opens a dataset and holds its manifest against what is there. Raises DatasetError."""
    return Dataset(folder)


class Dataset(Sequence):
    """Random access to the records of a dataset folder, safe to share between threads.

    Attributes: `folder`, `manifest` (the whole mapping), `kind`, and `lengths` (None for text and prompts).
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = storage.local(folder, "a dataset")
        self.manifest = read_manifest(self.folder)
        self.kind: str = self.manifest["kind"]
        for shard in self.manifest["shards"]:
            _check_file(self.folder / shard["file"], shard["bytes"])
        self.lengths: np.ndarray | None = None
        if self.kind not in _JSON_KINDS:
            if not (self.folder / LENGTHS).is_file():
                raise DatasetError(f"{self.folder}: {LENGTHS} is missing. Write the dataset again.")
            lengths = np.load(self.folder / LENGTHS)
            if len(lengths) != len(self):
                raise DatasetError(
                    f"{self.folder}: {LENGTHS} has {len(lengths)} entries for {len(self)} records"
                )
            self.lengths = lengths
        self._source: Any = None

    def __len__(self) -> int:
        return self.manifest["records"]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.read(range(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.folder} has {len(self)} records; there is none at {index}")
        return self.read([index % len(self)])[0]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), 256):
            yield from self.read(range(start, min(start + 256, len(self))))

    def read(self, indices: Sequence[int]) -> list[Any]:
        """The records at `indices`, as `write_dataset` took them."""
        if len(indices) == 0:
            return []
        if self._source is None:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            self._source = ArrayRecordDataSource(
                [str(self.folder / s["file"]) for s in self.manifest["shards"]]
            )
        try:
            raw = self._source.__getitems__(list(indices))
        except (RuntimeError, ValueError) as error:
            raise DatasetError(
                f"{self.folder}: a shard can't be read: {error}. Write the dataset again."
            ) from error
        return [_unpack(self.kind, record) for record in raw]

    def __getstate__(self):
        return self.__dict__ | {"_source": None}


def _datasets_near(folder: Path) -> str:
    """Those in a folder that is no dataset or, where it is not there, in the one that it would be in."""
    inside, place = ("It", folder) if folder.is_dir() else (str(folder.parent), folder.parent)
    if not place.is_dir():
        return ""
    found = [path.parent for depth in ("*", "*/*") for path in place.glob(f"{depth}/{MANIFEST}")]
    names = sorted(str(path.relative_to(place)) for path in found)
    more = ", ..." if len(names) > 8 else ""
    return f" {inside} holds the datasets {', '.join(names[:8])}{more}: name one of them." if names else ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a dataset folder. Raises DatasetError when there is none, or none of ours."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DatasetError(f"{folder} is no dataset: there is no {MANIFEST}.{_datasets_near(folder)}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path}: not valid JSON: {error}") from error
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or manifest.get("kind") not in KINDS
    ):
        raise DatasetError(f"{path}: not the manifest of a dataset (format {FORMAT!r})")
    if manifest.get("version") != VERSION:
        raise DatasetError(f"{path}: version {manifest.get('version')!r}; this code reads version {VERSION}")
    if sum(shard["records"] for shard in manifest["shards"]) != manifest["records"]:
        raise DatasetError(f"{path}: the shards' records do not add up to {manifest['records']}")
    return manifest


def is_current(folder: str | os.PathLike, key: str) -> bool:
    """Whether `folder` holds a whole dataset that was written under the same `key` (a hash of inputs and
    config).
    """
    try:
        return open_dataset(folder).manifest.get("key") == key
    except DatasetError:
        return False


def hash_of(*values: Any) -> str:
    """A short hash of JSON-able values, the same in every process."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _write_shards(folder: Path, records: Iterable[Any], kind: str, shard_bytes: int) -> tuple[dict, list]:
    from array_record.python.array_record_module import ArrayRecordWriter

    shards: list[dict[str, Any]] = []
    lengths: list[Any] = []
    digest, writer, size, count = hashlib.sha256(), None, 0, 0

    def close() -> None:
        if writer is not None:
            writer.close()
            file = f"shard-{len(shards):05d}.array_record"
            shards.append({"file": file, "records": count, "bytes": (folder / file).stat().st_size})

    for record in records:
        if writer is not None and size >= shard_bytes:
            close()
            writer = None
        if writer is None:
            writer = ArrayRecordWriter(str(folder / f"shard-{len(shards):05d}.array_record"), "group_size:1")
            size = count = 0
        packed = _pack(kind, record)
        writer.write(packed)
        digest.update(struct.pack("<Q", len(packed)) + packed)
        size, count = size + len(packed), count + 1
        if kind == "preference":
            lengths.append([len(record[0].tokens), len(record[1].tokens)])
        elif kind in ("labelled", "steps"):
            lengths.append(len(record[0].tokens))
        elif kind not in _JSON_KINDS:
            lengths.append(len(record.tokens))
    close()
    facts = {"records": sum(s["records"] for s in shards), "sha256": digest.hexdigest(), "shards": shards}
    return facts, lengths


def _pack(kind: str, record: Any) -> bytes:
    if kind in _JSON_KINDS:
        return json.dumps(record, ensure_ascii=False).encode("utf-8")
    if kind == "preference":
        return b"".join(map(_pack_tokens, record))
    if kind == "labelled":
        return struct.pack("<B", bool(record[1])) + _pack_tokens(record[0])
    if kind == "steps":
        labels = np.asarray(record[1], "<f4")
        if record[0].mask is None or len(labels) != int(record[0].mask.sum()):
            raise ValueError(f"a record has {len(labels)} labels; wanted one for each token of its mask")
        return _pack_tokens(record[0]) + labels.tobytes()
    return _pack_tokens(record)


def _pack_tokens(record: TokenRecord) -> bytes:
    """uint32 count, uint8 has-mask, uint32 ids, mask bits."""
    tokens = np.asarray(record.tokens, "<u4")
    head = struct.pack("<IB", len(tokens), record.mask is not None)
    if record.mask is None:
        return head + tokens.tobytes()
    if len(record.mask) != len(tokens):
        raise ValueError(f"a record has {len(tokens)} tokens and a mask of {len(record.mask)}")
    return head + tokens.tobytes() + np.packbits(np.asarray(record.mask, bool)).tobytes()


def _unpack(kind: str, raw: bytes) -> Any:
    if kind in _JSON_KINDS:
        return json.loads(raw)
    if kind == "labelled":
        return _unpack_tokens(raw, 1)[0], raw[0]
    first, used = _unpack_tokens(raw, 0)
    if kind == "steps":
        return first, np.frombuffer(raw, "<f4", offset=used).copy()
    return (first, _unpack_tokens(raw, used)[0]) if kind == "preference" else first


def _unpack_tokens(raw: bytes, offset: int) -> tuple[TokenRecord, int]:
    count, has_mask = struct.unpack_from("<IB", raw, offset)
    offset += 5
    tokens = np.frombuffer(raw, "<u4", count, offset).astype(np.int32)
    offset += 4 * count
    if not has_mask:
        return TokenRecord(tokens), offset
    bits = np.frombuffer(raw, np.uint8, (count + 7) // 8, offset)
    return TokenRecord(tokens, np.unpackbits(bits, count=count).astype(bool)), offset + len(bits)


def _check_file(path: Path, size: int) -> None:
    if not path.is_file():
        raise DatasetError(f"{path} is missing, though the manifest lists it. Write the dataset again.")
    if path.stat().st_size != size:
        raise DatasetError(
            f"{path} has {path.stat().st_size} bytes where the manifest says {size}: it is truncated or "
            "changed. "
            "Write the dataset again."
        )


def _replace_folder(new: Path, target: Path) -> None:
    """Puts `new` in the place of `target`. A reader may find nothing for a moment, never a mixture."""
    if target.exists():
        old = temporary_beside(target, "old")
        os.rename(target, old)
        os.rename(new, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(new, target)

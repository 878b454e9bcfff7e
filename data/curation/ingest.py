"""The first step: what the sources give, cut into shards of some megabytes.

A part is a file, or a group of small ones, and is read by one worker; its shards are named by a hash of what it
is. So a new file makes new shards and leaves the others as they are, in whatever order the sources are named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.typed import ConfigError, to_dict
from data.curation.child import careful, tell
from data.curation.layout import SOURCES, Layout, facts_of, mark_done
from data.curation.shard import Counts, kind_of
from data.documents import COPY_MARK, Document, Rejected, make_document, write_documents
from data.shards import hash_of
from data.sources import Source, file_state, parts_of

_VERSION = 4  # raised when a source gives something else for the same file


Place = tuple[int, int]  # a group of files, and how many of its documents were read


@dataclasses.dataclass(frozen=True)
class Part:
    """Files of one source that one worker reads."""

    layout: Layout
    name: str
    key: str
    source: Source
    groups: tuple[tuple[str, ...], ...]
    twin: int  # of sources with one name, which this is: its documents' ids say so from the second on
    shard_bytes: int
    limit: int | None = None  # documents to read; None: all
    killers: tuple[tuple[Place, str], ...] = ()  # where reading may not go on, and why

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for group in self.groups for path in group)

    @property
    def label(self) -> str:
        first, *more = self.paths or (self.source.label(),)
        return first + (f" and {len(more)} more files" if more else "")

    def limited(self, limit: int) -> Part:
        return dataclasses.replace(self, limit=limit, key=hash_of(self.key, limit))

    def without(self, place: Place, reason: str) -> Part:
        return dataclasses.replace(self, killers=(*self.killers, (place, reason)))


def parts(sources: Sequence[Source], layout: Layout, shard_bytes: int) -> list[Part]:
    """All parts, by name. Raises ConfigError for sources that are missing or give nothing to read."""
    found: dict[str, Part] = {}
    named: dict[str, list[str]] = {}
    for source in sources:
        config = hash_of(type(source).__name__, to_dict(source), _VERSION)
        named.setdefault(source.label(), []).append(config)
        if named[source.label()].count(config) > 1:
            raise ConfigError(f"sources: {source.label()!r} is there twice with the same settings")
    for source in sources:
        config = hash_of(type(source).__name__, to_dict(source), _VERSION)
        twin = sorted(named[source.label()]).index(config)
        for groups in parts_of(source, shard_bytes):
            paths = [path for group in groups for path in group]
            within = [source.within(path) for path in paths]
            name = hash_of(type(source).__name__, source.label(), twin, within)[:12]
            key = hash_of(config, [(path, file_state(path)) for path in paths], source.state())
            files = tuple(map(tuple, groups))
            found[name] = Part(layout, name, key, source, files, twin, shard_bytes)
    return [found[name] for name in sorted(found)]


def ingest(part: Part) -> dict[str, Counts]:
    """Reads a part and writes its shards; gives the counts by shard."""
    mark = part.layout.done(SOURCES, part.name)
    facts = facts_of(mark, part.key)
    if facts is not None:
        return {name: Counts(**counts) for name, counts in facts["shards"].items()}
    made: dict[str, Counts] = {}
    began = time.monotonic()
    for number, items in enumerate(_groups(_items(part), part.shard_bytes)):
        name = f"{part.name}-{number:03d}"
        made[name] = _write(part.layout, name, items, time.monotonic() - began)
        began = time.monotonic()
    mark_done(mark, part.key, shards={name: counts._asdict() for name, counts in made.items()})
    return made


def _items(part: Part) -> Iterator[Document | Rejected]:
    """What the source gives, with ids that no other document has, and text that is valid Unicode."""
    seen: Counter[bytes] = Counter()
    mark = "" if part.twin == 0 else f"~{part.twin + 1}"
    for item in itertools.islice(_read(part), part.limit):
        name = _valid(item.id if isinstance(item, Rejected) else item["id"]) + mark
        digest = hashlib.blake2b(name.encode(), digest_size=12).digest()
        seen[digest] += 1
        name = name if seen[digest] == 1 else f"{name}{COPY_MARK}{seen[digest]}"
        if isinstance(item, Rejected):
            yield Rejected(name, f"source: {_valid(item.reason)}", item.source)
        elif (text := _valid(item["text"])) != item["text"]:
            yield Rejected(name, "source: lone surrogates", item["source"])
        else:
            yield {**item, "id": name, "text": text, "metadata": _valid_all(item["metadata"])}


def _read(part: Part) -> Iterator[Document | Rejected]:
    """What the source gives. Where it raises, the rest of that group of files is lost, and the next is read."""
    count = 0
    if not careful():
        try:
            for item in part.source.documents(part.paths):
                count += 1
                yield item
            return
        except ConfigError:
            raise
        except Exception:  # which group it is shows when they are read one by one
            pass
    behind = itertools.chain.from_iterable(_read_group(part, number) for number in range(len(part.groups)))
    yield from itertools.islice(behind, count, None)


def _read_group(part: Part, number: int) -> Iterator[Document | Rejected]:
    source, killers = part.source, dict(part.killers)
    items = iter(source.documents(part.groups[number]))
    for count in itertools.count():
        reason = killers.get((number, count))
        if reason is None:
            tell((number, count))
            try:
                yield next(items)
                continue
            except StopIteration:
                return
            except ConfigError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        within = source.within(part.groups[number][0]) if part.groups[number] else ""
        name = "/".join(part for part in (source.label(), within, "end") if part)
        yield Rejected(name, f"unreadable from here on: {reason}", source.label())
        return


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of items with about `size` characters; one empty list where there is nothing."""
    group, held, any_yet = [], 0, False
    for item in items:
        group.append(item)
        held += 100 if isinstance(item, Rejected) else len(item["text"]) + 100
        if held >= size:
            yield group
            group, held, any_yet = [], 0, True
    if group or not any_yet:
        yield group


def _write(layout: Layout, name: str, items: list[Any], seconds: float) -> Counts:
    documents = [item for item in items if not isinstance(item, Rejected)]
    rejected = [item for item in items if isinstance(item, Rejected)]
    reasons = [item.reason for item in rejected]
    empty = [make_document(r.id, "", r.source, "", {}) for r in rejected]
    write_documents(layout.documents(SOURCES, name), documents)
    write_documents(layout.dropped(SOURCES, name), empty, reasons)
    dropped = dict(sorted(Counter(map(kind_of, reasons)).items()))
    characters = sum(len(d["text"]) for d in documents)
    return Counts(len(items), len(documents), characters, dropped, round(seconds, 3))


def _valid(text: str) -> str:
    """The text with lone surrogates (in file names, in JSON escapes) replaced."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()


def _valid_all(value: Any) -> Any:
    """The value as JSON can hold it: dates, bytes and other things of Parquet as text."""
    if isinstance(value, str):
        return _valid(value)
    if isinstance(value, dict):
        return {_valid(str(key)): _valid_all(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_valid_all(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else _valid(str(value))


def remove_stale(layout: Layout, stages: set[str], taggers: set[str], names: set[str]) -> None:
    """What an earlier list of stages, an earlier set of files, or a killed run left."""
    import shutil

    for folder, current in (("stages", stages), ("tags", taggers), ("dropped", stages)):
        for child in _children(layout.workdir / folder):
            if child.name.removesuffix(".parquet") not in current:
                shutil.rmtree(child, ignore_errors=True) if child.is_dir() else child.unlink()
                continue
            for file in child.rglob("*"):
                if file.is_file() and file.stem not in names:
                    file.unlink()


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []

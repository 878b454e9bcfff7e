"""What a source is: a small frozen dataclass with `files()`, and `documents(paths)` for some of them.

It yields a Document, or a Rejected where something can't be read: one bad file or line never stops a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from data import storage
from data.documents import Document, Rejected

Items = Iterator[Document | Rejected]


class SourceBase:
    """What all sources share. Each has a field `name`, the first part of its documents' ids."""

    name: str = ""

    def label(self) -> str:
        """The name, by default that of the file or folder."""
        return (
            self.name or os.path.basename(str(getattr(self, "path", "")).rstrip("/")) or type(self).__name__
        )

    def files(self) -> list[str]:
        """What is read, in order. Raises ConfigError where there is nothing."""
        raise NotImplementedError

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        """The documents of these files; None: of all."""
        raise NotImplementedError

    def has_pages(self) -> bool:
        """Whether documents of type html may come, which must be extracted."""
        return getattr(self, "type", "") == "html"

    def within(self, path: str) -> str:
        """A file's path as seen from the source's folder: the same wherever that folder lies."""
        folder = str(getattr(self, "path", ""))
        return path[len(folder) :].lstrip("/") if folder and path.startswith(folder) else path

    def state(self) -> Any:
        """What else decides on the documents, beside the config and the files."""
        return None

    def groups(self) -> list[list[str]]:
        """Files that one worker must read together. Default: each may be read alone."""
        return [[path] for path in self.files()]


def parts_of(source: SourceBase, size: int) -> list[list[list[str]]]:
    """The source's groups of files in pieces of work: a large group alone, small ones together up to `size` bytes."""
    parts: list[list[list[str]]] = []
    room = 0
    for group in source.groups():
        weight = sum(
            file_state(path)[0] * (4 if path.endswith((".gz", ".zst", ".bz2", ".xz")) else 1)
            for path in group
        )
        if not parts or weight > room:
            parts.append([])
            room = size
        parts[-1].append(group)
        room -= weight
    return parts


def file_state(path: str) -> tuple[int, int]:
    """(bytes, time of the last change): what a re-run must find as it was. Both 0 for what is no file."""
    try:
        return storage.state(path)
    except FileNotFoundError:
        return 0, 0

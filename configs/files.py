"""Writing files so that a reader sees the old content or the new, never half of one."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.typed import to_dict


def atomic_write(path: str | os.PathLike, content: str | bytes) -> Path:
    """Writes text (as UTF-8) or bytes under a temporary name beside `path`, flushes to disk, then renames.

    Missing parent folders are made. Returns the path. An interrupted write leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


@contextmanager
def replacing(folder: Path, own: str = "config.json") -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder`, of the same kind by its file `own`, when the block ends
    well."""
    if folder.exists() and not (folder / own).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there and has no {own}; it is not replaced. Give another path.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{os.getpid()}.{uuid.uuid4().hex[:8]}"
    new, old = folder.with_name(f".{folder.name}.{mark}.tmp"), folder.with_name(f".{folder.name}.{mark}.old")
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def save(config: Any, path: str | os.PathLike) -> Path:
    """Writes a config dataclass as JSON, atomically; a folder gets `config.json`. `--config` takes the result
    back.
    """
    path = Path(path)
    if path.is_dir() or path.suffix != ".json":
        path = path / "config.json"
    return atomic_write(path, json.dumps(to_dict(config), indent=2) + "\n")

"""Writing files so that a reader sees the old content or the new, never half of one.

What a killed process was writing stays beside its target under a name of `temporary_beside`, which nothing reads;
`remove_leftovers` takes it away.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from configs.typed import ConfigError, to_dict

_LEFT = re.compile(r"\.(?P<name>.+)\.\d+\.[0-9a-f]{8}\.(?P<kind>tmp|old)")


def temporary_beside(path: Path, kind: Literal["tmp", "old"] = "tmp") -> Path:
    """A new name in the folder of `path`: for what will take its place, or ("old") for what had it."""
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.{kind}")


def remove_leftovers(folder: str | os.PathLike) -> list[Path]:
    """Takes away what killed processes left in a folder, at any depth, and beside it of the folder itself.

    An old file or folder goes back to its place where that is empty. Returns what was found. Call it before anything
    writes there: a name does not tell a killed process from a living one.
    """
    folder = Path(folder)
    beside = sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*"))
    found = [path for path in beside if _target(path) == folder]
    for path in found:
        _clear(path)
    for parent, folders, files in os.walk(folder):
        left = [Path(parent, name) for name in (*folders, *files) if _LEFT.fullmatch(name)]
        back = [target.name for path in left if (target := _clear(path)) is not None and target.is_dir()]
        folders[:] = [name for name in folders if not _LEFT.fullmatch(name)] + back
        found += left
    return found


def _target(left: Path) -> Path | None:
    match = _LEFT.fullmatch(left.name)
    return None if match is None else left.with_name(match["name"])


def _clear(left: Path) -> Path | None:
    """Removes one leftover, or puts it back; the place where it is then."""
    target = _target(left)
    if target is not None and left.suffix == ".old" and not target.exists():
        return left.rename(target)
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)
    return None


def atomic_write(path: str | os.PathLike, content: str | bytes) -> Path:
    """Writes text (as UTF-8) or bytes under a temporary name beside `path`, flushes to disk, then renames.

    Missing parent folders are made. Returns the path. An interrupted write leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
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
    new, old = temporary_beside(folder), temporary_beside(folder, "old")
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


@contextmanager
def only_one(folder: str | os.PathLike, seconds: float = 10.0) -> Iterator[int]:
    """Holds a folder for this process, which may make it; yields the lock's file descriptor.

    A child that inherits the descriptor holds the folder as well. The lock goes with its processes, however they end.

    Args:
      seconds: to wait for the last process to be gone.

    Raises:
      ConfigError: another run holds the folder.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(folder) / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ConfigError(
                        f"another run holds {folder}. Wait for it, stop it, or give another --workdir."
                    ) from None
                time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)

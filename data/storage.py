"""Files by path or address: on this machine, gs:// and s3:// (through Arrow's own clients), plain or compressed."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from configs.typed import ConfigError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def unreadable() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    import lzma

    import zstandard

    return OSError, ValueError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError


def is_remote(path: str) -> bool:
    return "://" in path


def local(path: str | os.PathLike, what: str) -> Path:
    """A path of this machine. Raises ConfigError for an address, which would become a folder called "gs:"."""
    if is_remote(os.fspath(path)):
        raise ConfigError(
            f"{what} {os.fspath(path)!r}: it lies in a file system. Mount the bucket (gcsfuse, mountpoint-s3) and give "
            "the folder that it is mounted at."
        )
    return Path(path)


def check_exists(path: str) -> None:
    """Raises ConfigError unless there is a file or folder."""
    if is_remote(path):
        from pyarrow.fs import FileType

        system, inner = _remote(path)
        if system.get_file_info(inner).type == FileType.NotFound:
            raise ConfigError(
                f"the source {path!r} does not exist, or may not be read with these credentials"
            )
    elif not os.path.exists(path):
        raise ConfigError(f"the source {path!r} does not exist (from {os.getcwd()})")


def is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    from pyarrow.fs import FileType

    system, inner = _remote(path)
    return system.get_file_info(inner).type == FileType.Directory


def find(folder: str, glob: str) -> list[str]:
    """All files under a folder whose path within it matches `glob` (`**/*` is all of them), sorted."""
    if not is_remote(folder):
        root = Path(folder)
        return sorted(str(path) for path in root.glob(glob) if path.is_file())
    from pyarrow.fs import FileSelector, FileType

    system, inner = _remote(folder)
    scheme, pattern = folder.split("://", 1)[0], glob.removeprefix("**/")
    found = []
    for info in system.get_file_info(FileSelector(inner, recursive=True)):
        within = info.path[len(inner.rstrip("/")) + 1 :]
        deep = glob.startswith("**/") or "/" not in within
        if (
            info.type == FileType.File
            and deep
            and (fnmatch(within, pattern) or fnmatch(info.base_name, pattern))
        ):
            found.append(f"{scheme}://{info.path}")
    return sorted(found)


def state(path: str) -> tuple[int, int]:
    """(bytes, time of the last change in nanoseconds): what a re-run must find as it was."""
    if is_remote(path):
        system, inner = _remote(path)
        info = system.get_file_info(inner)
        return info.size or 0, info.mtime_ns or 0
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def open_raw(path: str) -> BinaryIO:
    """The bytes as they lie there."""
    if is_remote(path):
        system, inner = _remote(path)
        return io.BufferedReader(_Readable(system.open_input_file(inner)), 1 << 20)
    return open(path, "rb")


def open_bytes(path: str) -> BinaryIO:
    """The bytes, decompressed where the name ends in .gz, .zst, .bz2 or .xz."""
    return unpacked(open_raw(path), path)


def unpacked(raw: BinaryIO, path: str) -> BinaryIO:
    """What an open file holds, by its name."""
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.endswith(".zst"):
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(reader)
    if path.endswith(".bz2"):
        import bz2

        return cast(BinaryIO, bz2.BZ2File(raw))
    if path.endswith(".xz"):
        import lzma

        return cast(BinaryIO, lzma.LZMAFile(raw))
    return raw


def suffix(path: str) -> str:
    """The last suffix in small letters, the one under .gz, .zst, .bz2 or .xz."""
    name = PurePosixPath(path)
    return PurePosixPath(name.stem).suffix.lower() if name.suffix in COMPRESSED else name.suffix.lower()


def lines(path: str) -> Iterator[bytes]:
    """The lines of a file, decompressed."""
    with open_bytes(path) as file:
        yield from file


def _remote(path: str) -> tuple[Any, str]:
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem

    try:
        return FileSystem.from_uri(path)
    except (ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path!r}: {error}. Known are paths of this machine, gs:// and s3://.") from error


class _Readable(io.RawIOBase):
    """Arrow's file as Python's."""

    def __init__(self, file: Any):
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._file.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()

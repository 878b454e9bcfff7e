"""Source-code trees: the files of a repository together, with language and licence."""

from __future__ import annotations

import dataclasses
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from configs.typed import ConfigError
from data import storage
from data.documents import Document, Rejected, make_document
from data.extract.encoding import decode
from data.sources import code
from data.sources.base import Items, SourceBase

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
Files = dict[str, bytes]  # by path within the repository


@dataclasses.dataclass(frozen=True)
class Repositories(SourceBase):
    """A repository (folder, .tar.gz, .zip), or with `many` a folder of them.

    The files of a repository lie next to each other, README first, then by path; they are one group. A file's
    licence is what its header says, else that of the licence file nearest above it. Metadata: repository, path,
    language, licence, permissive. Vendored, built, generated, minified and binary files go with their reason.
    """

    path: str
    many: bool = False
    permissive_only: bool = False
    max_file_bytes: int = 1_000_000
    max_repository_bytes: int = 1_000_000_000
    name: str = ""

    def files(self) -> list[str]:
        return [path for group in self.groups() for path in group]

    def groups(self) -> list[list[str]]:
        storage.check_exists(self.path)
        if not storage.is_folder(self.path):
            if not self.path.lower().endswith(_ARCHIVES):
                raise ConfigError(f"{self.path}: wanted a folder, or an archive among {' '.join(_ARCHIVES)}")
            return [[self.path]]
        groups: dict[str, list[str]] = {}
        for path in storage.find(self.path, "**/*"):
            within = self.within(path)
            if ".git" not in within.split("/"):
                groups.setdefault(within.split("/")[0] if self.many else "", []).append(path)
        if not groups:
            raise ConfigError(f"{self.path}: no file in this folder")
        return [groups[name] for name in sorted(groups)]

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        wanted = None if paths is None else set(paths)
        for group in self.groups():
            if wanted is None or not wanted.isdisjoint(group):
                yield from self._repository(group)

    def _repository(self, paths: list[str]) -> Items:
        source = self.label()
        within = self.within(paths[0])
        repository = f"{source}/{within.split('/')[0]}" if self.many else source
        archived = len(paths) == 1 and paths[0].lower().endswith(_ARCHIVES)
        files: Files = {}
        gone: dict[str, str] = {}
        room = self.max_repository_bytes
        prefix = "" if archived or not self.many else within.split("/")[0] + "/"
        try:
            for name, content in _unpacked(paths[0]) if archived else self._plain(paths, prefix):
                if isinstance(content, str):
                    gone[name] = content
                elif len(content) > self.max_file_bytes:
                    gone[name] = "large"
                elif (room := room - len(content)) < 0:
                    gone[name] = "large: repository"
                else:
                    files[name] = content
        except (OSError, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile, RuntimeError) as error:
            yield Rejected(f"{repository}/end", f"unreadable from here on: {type(error).__name__}", source)
        if archived:
            top = _one_folder([*files, *gone])
            files = {name.removeprefix(top): content for name, content in files.items()}
            gone = {name.removeprefix(top): reason for name, reason in gone.items()}
        for name, reason in gone.items():
            yield Rejected(f"{repository}/{name}", reason, source)
        licences = _licences(files)
        for name in sorted(files, key=_readme_first):
            yield self._item(name, files[name], repository, licences)

    def _plain(self, paths: list[str], prefix: str) -> Iterator[tuple[str, bytes | str]]:
        for path in paths:
            name = self.within(path).removeprefix(prefix)
            if code.language_of(name) is None and not code.is_licence_file(name):
                yield name, "type: no source file"
                continue
            try:
                with storage.open_raw(path) as file:
                    yield name, file.read(self.max_file_bytes + 1)
            except OSError as error:
                yield name, f"unreadable: {type(error).__name__}"

    def _item(self, name: str, raw: bytes, repository: str, licences: dict[str, str]) -> Document | Rejected:
        source, key = self.label(), f"{repository}/{name}"
        language = code.language_of(name)
        if language is None:
            return Rejected(
                key, "licence file" if code.is_licence_file(name) else "type: no source file", source
            )
        if reason := code.unwanted_path(name):
            return Rejected(key, reason, source)
        if b"\0" in raw:
            return Rejected(key, "binary", source)
        text = decode(raw)[0]
        if reason := code.unwanted_text(text):
            return Rejected(key, reason, source)
        licence = code.licence_in_header(text) or _nearest(name, licences) or "unknown"
        permissive = code.is_permissive(licence)
        if self.permissive_only and not permissive:
            return Rejected(key, f"licence: {licence}", source)
        prose = language in code.PROSE.values()
        metadata: dict[str, Any] = {
            "type": "prose" if prose else "code",
            "path": name,
            "repository": repository,
            "group": repository,
            "language": language,
            "licence": licence,
            "permissive": permissive,
        }
        return make_document(key, text, source, licence, metadata)


def _licences(files: Files) -> dict[str, str]:
    """Licence by folder ("" is the root)."""
    found: dict[str, str] = {}
    for name in sorted(files):
        if code.is_licence_file(name) and (licence := code.licence_of(decode(files[name])[0])):
            folder = name.rpartition("/")[0]
            if licence not in found.get(folder, "").split(" OR "):
                found[folder] = f"{found[folder]} OR {licence}" if folder in found else licence
    return found


def _nearest(name: str, licences: dict[str, str]) -> str | None:
    folder = name.rpartition("/")[0]
    while folder and folder not in licences:
        folder = folder.rpartition("/")[0]
    return licences.get(folder)


def _readme_first(name: str) -> tuple[bool, str]:
    return not name.lower().startswith("readme"), name


def _unpacked(path: str) -> Iterator[tuple[str, bytes | str]]:
    """(path, bytes or a reason) of an archive's files."""
    return _zip(path) if path.lower().endswith(".zip") else _tar(path)


def _one_folder(names: list[str]) -> str:
    """The folder that holds them all, with its slash, as archives of a release have one; else nothing."""
    tops = {name.split("/")[0] for name in names}
    return tops.pop() + "/" if len(tops) == 1 and all("/" in name for name in names) else ""


def _tar(path: str) -> Iterator[tuple[str, bytes | str]]:
    with storage.open_raw(path) as raw, tarfile.open(fileobj=raw, mode="r:*") as archive:
        for member in archive:
            if member.isfile():
                yield (
                    member.name.removeprefix("./"),
                    _content(member.name, archive.extractfile(member), member.size),
                )


def _zip(path: str) -> Iterator[tuple[str, bytes | str]]:
    with storage.open_raw(path) as raw, zipfile.ZipFile(raw) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                with archive.open(info) as file:
                    yield info.filename, _content(info.filename, file, info.file_size)


def _content(name: str, file: Any, size: int) -> bytes | str:
    if code.language_of(name) is None and not code.is_licence_file(name):
        return "type: no source file"
    return "large" if size > 64 << 20 else file.read()

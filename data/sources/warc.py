"""Web archives: WARC and WET files (ISO 28500), read by fastwarc.

<urn:uuid:...>  response, resource  text/html               a document of type html
                conversion          text/plain (WET)        a document of type prose
all else, each with its reason: "status: 404", "type: image/png", "record: revisit", "truncated", "broken: ..."
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from configs.typed import ConfigError
from data import storage
from data.documents import Document, Rejected, make_document
from data.extract.encoding import decode
from data.sources.base import Items, SourceBase

_SUFFIXES = (".warc", ".wet", ".wat", ".arc")  # and packed, .gz or .zst
_PIECE = 1 << 20
_GZIP = b"\x1f\x8b\x08"
_MIME = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}/[a-z0-9][a-z0-9.+-]{0,60}")


@dataclasses.dataclass(frozen=True)
class Warc(SourceBase):
    """Pages of a .warc, .wet, .warc.gz or .wet.gz file, or of all such files in a folder; others are counted.

    Metadata: url, date, status, content_type, encoding, record (the WARC id); the group is the site's host, so that
    no site is in two splits. A record that is broken is passed over and counted, and reading goes on with the next.
    """

    path: str
    glob: str = "**/*"
    types: tuple[str, ...] = ("text/html", "application/xhtml+xml")
    statuses: tuple[int, ...] = (200,)
    max_megabytes: float = 8.0  # of a page, unpacked
    group_by_host: bool = True
    licence: str = "unknown"
    name: str = ""

    def files(self) -> list[str]:
        storage.check_exists(self.path)
        if not storage.is_folder(self.path):
            return [self.path]
        found = storage.find(self.path, self.glob)
        if not any(map(is_archive, found)):
            raise ConfigError(
                f"{self.path}: no file matches {self.glob} with a name in .warc, .wet (.gz, .zst)"
            )
        return found

    def has_pages(self) -> bool:
        return True

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        name = self.label()
        for path in self.files() if paths is None else paths:
            prefix = "/".join(part for part in (name, self.within(path)) if part)
            if path != self.path and not is_archive(path):
                yield Rejected(f"{prefix}/0", "type: no web archive by its name", name)
                continue
            if _is_arc(path):
                yield Rejected(f"{prefix}/0", "type: ARC; convert it to WARC (warcio recompress)", name)
                continue
            for number, record in enumerate(records(path, int(self.max_megabytes * 1e6))):
                yield self._item(record, path, f"{prefix}/{number}", name)

    def _item(self, record: Record, path: str, key: str, name: str) -> Document | Rejected:
        reason = record.broken or self._unwanted(record)
        if reason:
            return Rejected(key, reason, name)
        try:
            body = unpacked(record.body, record.http, int(self.max_megabytes * 1e6))
        except ValueError as error:
            return Rejected(key, str(error), name)
        text, encoding = decode(body, record.charset)
        if not text.strip():
            return Rejected(key, "empty", name)
        url = record.headers.get("WARC-Target-URI", "").strip("<> ")
        metadata: dict[str, Any] = {
            "type": "prose" if record.kind == "conversion" else "html",
            "url": url,
            "date": record.headers.get("WARC-Date", ""),
            "content_type": record.content_type,
            "encoding": encoding,
            "record": record.headers.get("WARC-Record-ID", "").strip("<>"),
            "path": path,
        }
        if record.status is not None:
            metadata["status"] = record.status
        if self.group_by_host and (host := _host(url)):
            metadata["group"] = host
        return make_document(key, text, name, self.licence, metadata)

    def _unwanted(self, record: Record) -> str | None:
        if record.kind not in ("response", "resource", "conversion"):
            return f"record: {record.kind}"
        if record.kind == "response" and record.status not in self.statuses:
            return f"status: {record.status or 'none'}"
        wanted = (*self.types, "text/plain") if record.kind == "conversion" else self.types
        if record.content_type not in wanted:
            return f"type: {record.content_type or 'none'}"
        return None if record.body.strip() else "empty"


@dataclasses.dataclass(frozen=True)
class Record:
    """One record as it was read; `broken` says why there is no more of it."""

    kind: str
    headers: dict[str, str]
    body: bytes = b""
    http: dict[str, str] = dataclasses.field(default_factory=dict)  # names in small letters
    status: int | None = None
    content_type: str = ""
    charset: str | None = None
    broken: str | None = None


def records(path: str, max_bytes: int) -> Iterator[Record]:
    """All records of a file. What is broken comes as a Record with its reason, and reading goes on at the next start.

    Records of a gzip file that is not packed record by record can't be found again once one is broken.
    """
    from fastwarc.warc import ArchiveIterator

    at = 0  # where the last record that was found begins
    while True:
        try:
            with storage.open_raw(path) as file:
                lenient = _ends_lines_with_lf(file, at)
                for record in ArchiveIterator(file, parse_http=False, quirks_mode=lenient):
                    at = max(at, record.stream_pos)
                    found = _read(record, max_bytes)
                    yield found
                    if found.broken and not found.broken.startswith("large"):
                        raise OSError  # what follows may be inside this record
                return
        except (OSError, ValueError, EOFError, RuntimeError, zlib.error) as error:
            if str(error):
                yield Record("broken", {}, broken=f"broken: {_plain(error)}")
        following = _next_start(path, at + 1)
        if following is None:
            return
        at = following


def _read(record: Any, max_bytes: int) -> Record:
    headers = dict(record.headers.items())
    kind = str(record.record_type)
    length = headers.get("Content-Length", "").strip()
    if not length.isdigit():
        return Record(kind, headers, broken="broken: no length")
    if int(length) > max_bytes:
        return Record(kind, headers, broken="large: over the limit of a page")
    try:
        if not record.is_http:
            body = record.reader.read()
            if len(body) < int(length):
                return Record(kind, headers, broken="truncated")
            mime, charset = _content_type(headers.get("Content-Type"))
            return _checked(Record(kind, headers, body, content_type=mime, charset=charset))
        block = record.reader.read()
    except (OSError, ValueError, EOFError) as error:
        return Record(kind, headers, broken=f"broken: {_plain(error)}")
    if len(block) < int(length):
        return Record(kind, headers, broken="truncated")
    status, http, body = _http(block)
    mime, charset = _content_type(http.get("content-type"))
    return _checked(Record(kind, headers, body, http, status, mime, charset))


def _checked(record: Record) -> Record:
    """A record that was cut holds the head of the next."""
    inside = record.body.find(b"WARC/1.")
    if inside >= 0 and b"WARC-Record-ID:" in record.body[inside : inside + 2000]:
        return Record(record.kind, record.headers, broken="broken: holds another record")
    return record


def _http(block: bytes) -> tuple[int | None, dict[str, str], bytes]:
    """(status, headers, body) of an HTTP message, with CRLF or LF."""
    split = re.search(rb"\r?\n\r?\n", block)
    head, body = (block, b"") if split is None else (block[: split.start()], block[split.end() :])
    first, *rest = head.decode("latin-1").splitlines() or [""]
    match = re.match(r"HTTP/[\d.]+\s+(\d{3})\b", first)
    headers: dict[str, str] = {}
    for line in rest if match else [first, *rest]:  # some archives leave the status line out
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    return int(match[1]) if match else None, headers, body


def unpacked(body: bytes, headers: dict[str, str], max_bytes: int) -> bytes:
    """The page under its transfer and content encodings, which many archives name but have taken off already.

    Raises ValueError with a reason for what can't be unpacked or is larger than `max_bytes`.
    """
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = _joined(body)
    packings = [name.strip().lower() for name in headers.get("content-encoding", "").split(",")]
    for packing in reversed(packings):
        if packing not in _UNPACK:
            raise ValueError(f"content-encoding: {packing[:20]}")
        body = _UNPACK[packing](body, max_bytes + 1)
        if len(body) > max_bytes:
            raise ValueError("large: over the limit of a page")
    return body


def _joined(body: bytes) -> bytes:
    """The chunks of a body (RFC 9112, section 7.1) up to the first that is none; a body without chunks as it is."""
    pieces, at = [], 0
    while match := re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n").match(body, at):
        size = int(match[1], 16)
        pieces.append(body[match.end() : match.end() + size])
        at = match.end() + size
        at += 2 if body[at : at + 2] == b"\r\n" else 1 if body[at : at + 1] == b"\n" else 0
        if size == 0:
            break
    return b"".join(pieces) if pieces else body


def _gunzip(body: bytes, limit: int) -> bytes:
    return _inflate(body, limit, 31) if body.startswith(_GZIP[:2]) else body


def _undeflate(body: bytes, limit: int) -> bytes:
    try:
        return _inflate(body, limit, zlib.MAX_WBITS)
    except ValueError:
        return _plain_or(
            body, lambda: _inflate(body, limit, -zlib.MAX_WBITS)
        )  # servers that left zlib's head out


def _inflate(body: bytes, limit: int, bits: int) -> bytes:
    try:
        return zlib.decompressobj(bits).decompress(body, limit)
    except zlib.error as error:
        raise ValueError(f"broken: {_plain(error)}") from error


def _unbrotli(body: bytes, limit: int) -> bytes:
    import brotli

    def unpack() -> bytes:
        try:
            return brotli.Decompressor().process(body, output_buffer_limit=limit)
        except brotli.error as error:
            raise ValueError("broken: brotli") from error

    return _plain_or(body, unpack)


def _unzstd(body: bytes, limit: int) -> bytes:
    import zstandard

    if not body.startswith(b"\x28\xb5\x2f\xfd"):
        return body
    try:
        return zstandard.ZstdDecompressor().stream_reader(body).read(limit)
    except zstandard.ZstdError as error:
        raise ValueError("broken: zstd") from error


def _plain_or(body: bytes, unpack: Any) -> bytes:
    """A page that is named packed and is not begins with a tag."""
    return body if body.lstrip()[:1] == b"<" else unpack()


_UNPACK = {
    "": lambda body, limit: body,
    "identity": lambda body, limit: body,
    "none": lambda body, limit: body,
    "utf-8": lambda body, limit: body,  # a common mistake for the character set
    "gzip": _gunzip,
    "x-gzip": _gunzip,
    "deflate": _undeflate,
    "br": _unbrotli,
    "zstd": _unzstd,
}


def _content_type(value: str | None) -> tuple[str, str | None]:
    """(media type in small letters, character set) of a header."""
    value = value or ""
    mime = value.split(";")[0].split(",")[0].strip().lower()
    charset = re.search(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", value, re.I)
    return mime if _MIME.fullmatch(mime) else "malformed" if mime else "", charset[1] if charset else None


def _next_start(path: str, at: int) -> int | None:
    """The first byte at or after `at` where a record begins: a gzip member, or a line "WARC/1.x"."""
    with storage.open_raw(path) as file:
        packed = file.read(2) == _GZIP[:2]
        pattern = re.compile(re.escape(_GZIP) if packed else rb"(?<![^\n])WARC/[01]\.\d+\r?\n")
        file.seek(at)
        base, buffer = at, b""
        while piece := file.read(_PIECE):
            buffer += piece
            for match in pattern.finditer(buffer):
                if not packed or _begins_record(file, base + match.start()):
                    return base + match.start()
            file.seek(base + len(buffer))
            base, buffer = base + len(buffer) - min(len(buffer), 16), buffer[-16:]
    return None


def _ends_lines_with_lf(file: BinaryIO, at: int) -> bool:
    """Whether a record's first line ends without CR, which only the lenient reading takes (and junk with it)."""
    file.seek(at)
    first = file.read(64)
    if first.startswith(_GZIP[:2]):
        first = zlib.decompressobj(31).decompress(first, 16)
    file.seek(at)
    return re.match(rb"WARC/[01]\.\d+\n", first) is not None


def _begins_record(file: BinaryIO, at: int) -> bool:
    """Whether a gzip member that opens with a WARC record lies there: its three magic bytes are common."""
    file.seek(at)
    try:
        return zlib.decompressobj(31).decompress(file.read(512), 5) == b"WARC/"
    except zlib.error:
        return False


def _host(url: str) -> str:
    match = re.match(r"[a-z][a-z0-9+.-]*://(?:[^/@]*@)?([^/:?#]+)", url, re.I)
    return match[1].lower().rstrip(".") if match else ""


def _plain(error: Exception) -> str:
    """An error in a few words, the same whatever the bytes were."""
    return re.sub(r"[^\w,.-]+", " ", str(error)).strip()[:60] or type(error).__name__


def _is_arc(path: str) -> bool:
    """Whether it is a file of the format before WARC, by its first record."""
    try:
        with storage.open_bytes(path) as file:
            return file.read(11) == b"filedesc://"
    except (OSError, EOFError, ValueError, zlib.error):
        return False


def is_archive(path: str) -> bool:
    """Whether a file is a web archive by its name."""
    name = path.rsplit("/", 1)[-1].lower()
    for ending in storage.COMPRESSED:
        name = name.removesuffix(ending)
    return name.endswith(_SUFFIXES) or ".wet." in name or ".warc." in name

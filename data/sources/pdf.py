"""PDF files: the text of their pages by pdfium, put together as a reader would."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from configs.typed import ConfigError
from data import storage
from data.documents import Document, Rejected, make_document
from data.sources.base import Items, SourceBase

_EDGE_LINES = 2  # at the top and the bottom of a page, where headers, footers and page numbers are


@dataclasses.dataclass(frozen=True)
class Pdf(SourceBase):
    """A PDF file, or all of a folder; one is one document.

    Words cut at line ends are joined, lines that most pages repeat at their edges go. Metadata: pages, and
    pages_without_text (scans). Scanned, broken and encrypted files go with their reason.
    """

    path: str
    glob: str = "**/*"
    max_pages: int = 2000
    max_megabytes: float = 200.0
    licence: str = "unknown"
    name: str = ""

    def files(self) -> list[str]:
        storage.check_exists(self.path)
        if not storage.is_folder(self.path):
            return [self.path]
        found = [path for path in storage.find(self.path, self.glob) if path.lower().endswith(".pdf")]
        if not found:
            raise ConfigError(f"{self.path}: no file matches {self.glob} with a name in .pdf")
        return found

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        for path in self.files() if paths is None else paths:
            yield self._document(path)

    def _document(self, path: str) -> Document | Rejected:
        name = self.label()
        key = "/".join(part for part in (name, self.within(path)) if part)
        limit = int(self.max_megabytes * 1e6)
        try:
            with storage.open_raw(path) as file:
                raw = file.read(limit + 1)
        except OSError as error:
            return Rejected(key, f"unreadable: {type(error).__name__}", name)
        if len(raw) > limit:
            return Rejected(key, "large", name)
        try:
            pages = _pages(raw, self.max_pages)
        except ValueError as error:
            return Rejected(key, str(error), name)
        text = joined(pages)
        if not text:
            return Rejected(key, "no text: scanned or empty pages", name)
        empty = sum(not page.strip() for page in pages)
        metadata: dict[str, Any] = {"type": "prose", "path": path, "pages": len(pages)}
        return make_document(key, text, name, self.licence, metadata | {"pages_without_text": empty})


def joined(pages: Sequence[str]) -> str:
    """The text of pages: without what most of them repeat at their edges, paragraphs whole, words whole."""
    split = [[line.strip() for line in page.replace("\r", "").split("\n") if line.strip()] for page in pages]
    repeated = _repeated(split)
    lines: list[str] = []
    for page in split:
        edge = {*range(_EDGE_LINES), *range(len(page) - _EDGE_LINES, len(page))}
        lines += [line for i, line in enumerate(page) if i not in edge or _shape(line) not in repeated]
    text = (
        "\n".join(lines).replace("\ufffe", "\u00ad").replace("\u0002", "\u00ad")
    )  # pdfium's signs for a hyphen
    text = re.sub(r"\u00ad\n?", "", text)
    text = re.sub(r"(?<=[^\W\d_])-\n(?=[a-z\u00df-\u00ff])", "", text)
    full = max((len(line) for line in lines), default=0) * 0.6  # a shorter line ends its paragraph
    out: list[str] = []
    for line in text.split("\n"):
        if out and len(out[-1].rsplit("\n", 1)[-1]) >= full and _goes_on(out[-1], line):
            out[-1] += f" {line}"
        else:
            out.append(line)
    return "\n".join(out).strip()


def _goes_on(before: str, line: str) -> bool:
    """Whether a line goes on with the sentence before it."""
    return (
        before[-1:] not in ".!?:"
        and not re.match(r"[-\u2022*\u25aa]|\(?\d+[.)]\s", line)
        and not line.isupper()
    )


def _repeated(pages: Sequence[Sequence[str]]) -> set[str]:
    """The shapes of edge lines that are on at least half of the pages with text, and on three."""
    filled = [page for page in pages if page]
    counts: Counter[str] = Counter()
    for page in filled:
        counts.update({_shape(line) for line in (*page[:_EDGE_LINES], *page[-_EDGE_LINES:])})
    return {shape for shape, count in counts.items() if count >= max(3, len(filled) / 2)}


def _shape(line: str) -> str:
    """A line with its numbers alike: page 7 is page 8."""
    return re.sub(r"\d+|\b[ivxlc]{1,6}\b", "#", line.lower())


def _pages(raw: bytes, max_pages: int) -> list[str]:
    """The text of each page. Raises ValueError with a reason."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(raw)
    except pypdfium2.PdfiumError as error:
        raise ValueError("encrypted" if "assword" in str(error) else "broken: no PDF") from error
    try:
        if len(document) > max_pages:
            raise ValueError("large: pages")
        return [_text(document, number) for number in range(len(document))]
    finally:
        document.close()


def _text(document: Any, number: int) -> str:
    """The text of a page, empty for one that pdfium can't read."""
    import pypdfium2

    try:
        page = document[number]
        try:
            return page.get_textpage().get_text_bounded().encode("utf-8", "replace").decode()
        finally:
            page.close()
    except pypdfium2.PdfiumError:
        return ""

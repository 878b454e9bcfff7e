"""Wikipedia dumps (pages-articles.xml, also .bz2): articles as text, in constant memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from configs.typed import ConfigError
from data import storage
from data.documents import Document, Rejected, make_document
from data.extract.wikitext import plain_text
from data.sources.base import Items, SourceBase


@dataclasses.dataclass(frozen=True)
class Wikipedia(SourceBase):
    """The articles of a MediaWiki XML dump, or of all dumps in a folder: no redirects, no other namespaces.

    Metadata: title, url where the dump says the site's address, page (the wiki's id).
    """

    path: str
    glob: str = "**/*.xml*"
    namespaces: tuple[int, ...] = (0,)
    max_page_characters: int = 2_000_000
    licence: str = "CC-BY-SA-4.0"
    name: str = ""

    def files(self) -> list[str]:
        storage.check_exists(self.path)
        if not storage.is_folder(self.path):
            return [self.path]
        found = [path for path in storage.find(self.path, self.glob) if storage.suffix(path) == ".xml"]
        if not found:
            raise ConfigError(f"{self.path}: no file matches {self.glob} with a name in .xml (.bz2, .gz)")
        return found

    def documents(self, paths: Sequence[str] | None = None) -> Items:
        name = self.label()
        for path in self.files() if paths is None else paths:
            try:
                for site, page in _pages(path):
                    yield self._item(site, page, path, name)
            except (OSError, ValueError, EOFError, SyntaxError) as error:  # lxml's errors are SyntaxErrors
                within = self.within(path) or "dump"
                yield Rejected(
                    f"{name}/{within}/end", f"unreadable from here on: {type(error).__name__}", name
                )

    def _item(self, site: str, page: dict[str, str], path: str, name: str) -> Document | Rejected:
        key = f"{name}/{page.get('id') or page.get('title', '')}"
        namespace = page.get("ns", "0")
        if not namespace.lstrip("-").isdigit() or int(namespace) not in self.namespaces:
            return Rejected(key, f"namespace: {namespace}", name)
        if "redirect" in page:
            return Rejected(key, "redirect", name)
        markup = page.get("text", "")
        if len(markup) > self.max_page_characters:
            return Rejected(key, "large", name)
        text = plain_text(markup)
        if not text:
            return Rejected(key, "empty", name)
        title = page.get("title", "")
        metadata: dict[str, Any] = {"type": "prose", "title": title, "page": page.get("id", ""), "path": path}
        if site:
            metadata["url"] = f"{site}/wiki/{title.replace(' ', '_')}"
        return make_document(key, f"{title}\n\n{text}" if title else text, name, self.licence, metadata)


def _pages(path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(the site's address, fields of a page); what was read is forgotten at once."""
    import lxml.etree as etree

    site = ""
    with storage.open_bytes(path) as file:
        events = etree.iterparse(
            file, events=("end",), huge_tree=True, resolve_entities=False, no_network=True
        )
        page: dict[str, str] = {}
        for _, element in events:
            tag = element.tag.rsplit("}", 1)[-1] if isinstance(element.tag, str) else ""
            parent = element.getparent()
            outer = parent.tag.rsplit("}", 1)[-1] if parent is not None else ""
            if tag == "base" and outer == "siteinfo":
                site = (element.text or "").partition("/wiki/")[0]
            elif tag in ("title", "ns", "id", "redirect") and outer == "page":
                page.setdefault(tag, element.text or "")
            elif tag == "text":
                page["text"] = element.text or ""  # of the last revision
            elif tag == "page":
                yield site, page
                page = {}
                element.clear()
                while element.getprevious() is not None:
                    del element.getparent()[0]

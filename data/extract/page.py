"""Web pages to their main text, by trafilatura or resiliparse, with mathematics and code blocks kept."""

from __future__ import annotations

import dataclasses
import html as entities
import re
from typing import ClassVar, Literal

from data.documents import Document, DocumentType
from data.extract.protect import protect, restore
from data.stage import Transform, Verdict

_TITLES = (
    re.compile(
        r"""<meta\b[^>]{0,200}?\bproperty\s*=\s*["']og:title["'][^>]{0,200}?\bcontent\s*=\s*"([^"]{1,500})\"""",
        re.I,
    ),
    re.compile(r"<title\b[^>]*>([^<]{1,1000})</title", re.I),
    re.compile(r"<h1\b[^>]*>([^<]{1,500})</h1", re.I),
)
_TAGS = re.compile(
    r"<(/?)(?:div|span|table|tr|td|font|b|i|em|strong|section|article|ul|ol|blockquote|center)\b", re.I
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclasses.dataclass(frozen=True)
class Extract(Transform):
    """A page (type html) becomes its text (type prose); its title goes to the metadata.

    `engine`: trafilatura (Barbaresi 2021, ACL demo) or resiliparse (Bevendorff et al. 2018), the second several
    times as fast. Pages that are too large or nested too deep for either go with their reason: both take time that
    grows with the square of the depth.
    """

    applies_to: DocumentType = "html"
    engine: Literal["trafilatura", "resiliparse"] = "trafilatura"
    precision: bool = False  # less text that is surely the page's own: trafilatura's favor_precision
    tables: bool = True
    links: bool = False  # the addresses of links
    comments: bool = False  # of readers
    mathematics: bool = True  # MathML, KaTeX, MathJax and pictures of formulas as $...$
    code: bool = True  # <pre> with its white space, fenced
    max_characters: int = 2_000_000  # of the page
    max_depth: int = 1000
    max_tags: int = 100_000

    version: ClassVar[int] = 1

    def __post_init__(self):
        if self.precision and self.engine != "trafilatura":
            raise ValueError(f"precision is trafilatura's; engine={self.engine!r} has none")

    def apply(self, text: str) -> Verdict:
        if reason := self._too_much(text):
            return text, reason
        page, blocks, mark = protect(_CONTROL.sub(" ", text), self.mathematics, self.code)
        try:
            found = ENGINES[self.engine](page, self)
        except (
            Exception,
            RecursionError,
        ) as error:  # whatever a broken page does to a parser, the run goes on
            return text, f"extract: {type(error).__name__}"
        found = restore(_whole(found), blocks, mark)
        return (found, None) if found.strip() else (text, "extract: no text")

    def edit(self, document: Document) -> tuple[Document, str | None]:
        page = document["text"]
        text, reason = self.apply(page)
        if reason is not None:
            return document, reason
        metadata = document["metadata"] | {"type": "prose"}
        if title := title_of(page):
            metadata["title"] = title
        return {**document, "text": text, "metadata": metadata}, None

    def _too_much(self, page: str) -> str | None:
        if len(page) > self.max_characters:
            return "extract: too large"
        if not page.strip():
            return "extract: empty"
        if page.count("<") > self.max_tags:
            return "extract: too many tags"
        return "extract: nested too deep" if _depth(page) > self.max_depth else None


def title_of(page: str) -> str:
    """What the page calls itself, empty where it does not say."""
    head = page[:100_000]
    for pattern in _TITLES:
        if (found := pattern.search(head)) and (title := " ".join(entities.unescape(found[1]).split())):
            return _whole(title)
    return ""


def _trafilatura(page: str, config: Extract) -> str:
    import logging

    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it logs every broken page as an error
    text = trafilatura.extract(
        page,
        favor_precision=config.precision,
        include_comments=config.comments,
        include_tables=config.tables,
        include_links=config.links,
        deduplicate=False,  # it remembers earlier pages
    )
    return text or ""


def _resiliparse(page: str, config: Extract) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(
        page,
        main_content=True,
        preserve_formatting=True,
        alt_texts=False,
        links=config.links,
        comments=config.comments,
        skip_elements=None if config.tables else ["table"],
    )


ENGINES = {"trafilatura": _trafilatura, "resiliparse": _resiliparse}


def _depth(page: str) -> int:
    """How deep elements that have to be closed lie in each other, about."""
    depth = deepest = 0
    for match in _TAGS.finditer(page):
        depth = max(depth - 1, 0) if match[1] else depth + 1
        deepest = max(deepest, depth)
    return deepest


def _whole(text: str) -> str:
    """Valid Unicode: a numeric entity may name half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()

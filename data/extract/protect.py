r"""Mathematics and code in a page, made ready for extractors that lose or mangle them.

Formulas (MathML, KaTeX, MathJax 2 and 3, wiki formulas, pictures with LaTeX in `alt`) become text $...$. Code
(<pre>, <code> with several lines) is put between two marks; `restore` puts the original, fenced, in the place of
what the extractor made of it. The page is edited as text: all else in it stays as it was, byte for byte.
"""

from __future__ import annotations

import html as entities
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from data.extract.mathml import latex_of, tidy

_TEX_SCRIPT = re.compile(
    r"""<script\b[^>]*type\s*=\s*["']?math/(?:tex|latex)(;\s*mode\s*=\s*display)?""", re.I
)
_MATH_CLASS = re.compile(r"\b(?:tex|latex|math|mwe-math-fallback-image-(?:inline|display)|equation)\b", re.I)
_MATH_SRC = re.compile(r"latex|/math/|mathtex|mimetex|codecogs|texvc", re.I)
_MAYBE_FORMULA = re.compile(r"tex|math|equation|codecogs", re.I)
_ATTRIBUTE = r"""\b{}\s*=\s*(?:"([^"]*)"|'([^']*)')"""
_LANGUAGE = re.compile(
    r"\b(?:language-|lang-|highlight-source-|brush:\s*|sourceCode\s+|highlight-)([A-Za-z0-9+#]{1,20})\b"
)
_GUTTER = re.compile(r"\b(?:gutter|lineno|linenos|line-numbers?|linenumbers?|linenodiv)\b", re.I)
_NO_LANGUAGE = frozenset(("none", "plaintext", "text", "nohighlight", "plain", "default", "notranslate"))
_MAX_PIECES = 5000  # of one kind in a page; the rest stays as it is


class Block(NamedTuple):
    """A code block that was put between marks."""

    code: str
    language: str


def protect(page: str, mathematics: bool, code: bool) -> tuple[str, list[Block], str]:
    """(page for the extractor, its code blocks, the word that marks them)."""
    mark = "codeblockmark"
    while mark in page:
        mark += "x"
    blocks: list[Block] = []
    if code:
        page = _replaced(page, "pre", lambda tag, inner: _marked(tag, inner, blocks, mark))
        page = _replaced(page, "code", lambda tag, inner: _code(tag, inner, blocks, mark))
    if mathematics:
        page = _mathematics(page)
    return page, blocks, mark


def restore(text: str, blocks: list[Block], mark: str) -> str:
    """The extracted text with each block that the extractor kept as a fenced block of its own."""
    if mark not in text:
        return text
    for number, block in enumerate(blocks):
        opening, closing = f"{mark}{number}a", f"{mark}{number}z"
        start, stop = text.find(opening), text.find(closing)
        if 0 <= start < stop:
            before = re.sub(r"[ \t]*(?:[-*\u2022|`][ \t]*)?$", "", text[:start])
            after = re.sub(r"^[ \t|`]*", "", text[stop + len(closing) :])
            text = f"{before.rstrip()}\n\n{_fenced(block)}\n\n{after.lstrip()}"
    return re.sub(rf" ?\b{mark}\d+[az]\b ?", " ", text).strip() if mark in text else text.strip()


def _fenced(block: Block) -> str:
    fence = "```"
    while fence in block.code:
        fence += "`"
    return f"{fence}{block.language}\n{block.code}\n{fence}"


def _replaced(page: str, tag: str, replacement: Callable[[str, str], str]) -> str:
    """The page with each element that no other of its kind is in replaced, by its opening tag and what is inside."""
    opening = re.compile(rf"<{tag}\b[^>]*>", re.I)
    closing = re.compile(rf"</{tag}\s*>", re.I)
    parts, at = [], 0
    while len(parts) < 2 * _MAX_PIECES and (start := opening.search(page, at)):
        stop = closing.search(page, start.end())
        if stop is None:
            break
        parts += (page[at : start.start()], replacement(start[0], page[start.end() : stop.start()]))
        at = stop.end()
    return "".join([*parts, page[at:]])


def _marked(tag: str, inner: str, blocks: list[Block], mark: str) -> str:
    """A <pre> with marks at both ends; what is inside still weighs in the extractor's choice of the main text."""
    if _GUTTER.search(tag):
        return ""
    code = _text_of(inner)
    if not code.strip():
        return f"{tag}{inner}</pre>"
    found = _LANGUAGE.search(tag) or _LANGUAGE.search(inner[:300])
    language = found[1].lower() if found and found[1].lower() not in _NO_LANGUAGE else ""
    blocks.append(Block(code, language))
    number = len(blocks) - 1
    body = entities.escape(code, quote=False)
    return f"<pre>{mark}{number}a {body} {mark}{number}z</pre>"


def _code(tag: str, inner: str, blocks: list[Block], mark: str) -> str:
    if "\n" in inner.strip("\r\n") or re.search(r"<br\b", inner, re.I):
        code = _text_of(inner)
        if "\n" in code.strip():
            return _marked(tag, inner, blocks, mark)
    text = inner.strip()
    return f"`{text}`" if text and "`" not in text and mark not in text else inner


def _text_of(inner: str) -> str:
    """The characters of a <pre>: <br> is a newline, the columns of line numbers are left out."""
    if "<" not in inner:
        return entities.unescape(inner).replace("\r\n", "\n").strip("\n").rstrip()
    root = _fragment(inner)
    if root is None:
        return entities.unescape(re.sub(r"<[^>]*>", "", inner)).strip("\n").rstrip()
    for element in list(root.iter()):
        if not isinstance(element.tag, str):
            element.text = ""
        elif element.tag == "br":
            element.text = "\n"
        elif _GUTTER.search(element.get("class") or ""):
            for child in list(element):
                element.remove(child)
            element.text = ""
    return "".join(root.itertext()).replace("\r\n", "\n").strip("\n").rstrip()


def _mathematics(page: str) -> str:
    small = page.lower()
    if "mwe-math-element" in small:
        page = _spans(page, "mwe-math-element", _math_inside)
    if "katex" in small:
        page = _spans(page, "katex-display", _math_inside)
        page = _spans(page, "katex", _math_inside)
    if "mathjax" in small:
        for name in ("MathJax_Preview", "MathJax_Display", "MathJax_SVG", "MathJax_CHTML", "MathJax"):
            page = _spans(page, name, lambda whole: "" if "math/tex" not in whole.lower() else None)
    if "mjx-container" in small:
        page = _replaced(page, "mjx-container", lambda tag, inner: _math_inside(tag + inner) or inner)
    if "math/tex" in small or "math/latex" in small:
        page = _replaced(page, "script", _tex_script)
    if "<math" in small:
        page = _replaced(page, "math", lambda tag, inner: _math_inside(f"{tag}{inner}</math>") or inner)
    if "<img" in small:
        page = re.sub(r"<img\b[^>]*>", _picture, page, flags=re.I)
    return page


def _tex_script(tag: str, inner: str) -> str:
    found = _TEX_SCRIPT.match(tag)
    if found is None:
        return f"{tag}{inner}</script>"
    inner = re.sub(r"^\s*(?:%\s*)?<!\[CDATA\[|(?:%\s*)?\]\]>\s*$", "", inner)
    return _formula(tidy(inner), display=bool(found[1]))


def _math_inside(whole: str) -> str | None:
    """The formula of the first <math> in a piece of HTML, None where there is none."""
    start = re.search(r"<math\b", whole, re.I)
    root = _fragment(whole[start.start() :]) if start else None
    element = next(root.iter("math"), None) if root is not None else None
    latex = latex_of(element) if element is not None else ""
    if element is None or not latex:
        return None
    display = (
        element.get("display") == "block"
        or "katex-display" in whole
        or re.search(r'display="true"', whole[:200])
    )
    return _formula(latex, display=bool(display))


def _picture(match: re.Match[str]) -> str:
    """A formula's picture as its LaTeX."""
    tag = match[0]
    if not _MAYBE_FORMULA.search(tag):
        return tag
    alt = _attribute(tag, "alt")
    named = _MATH_CLASS.search(_attribute(tag, "class")) or _MATH_SRC.search(_attribute(tag, "src"))
    latex = tidy(entities.unescape(alt)).strip("$ ")
    if not latex or not named or not re.search(r"[\\^_=+]|^\w$", latex):
        return tag
    return _formula(latex, display="fallback-image-display" in tag)


def _formula(latex: str, display: bool) -> str:
    if not latex:
        return ""
    dollars = "$$" if display else "$"
    return (
        f" {dollars}{entities.escape(latex, quote=False)}{dollars} "
        if display
        else f"${entities.escape(latex, quote=False)}$"
    )


def _spans(page: str, name: str, replacement: Callable[[str], str | None]) -> str:
    """The page with each outermost <span> or <div> of this class replaced, where `replacement` gives something."""
    opening = re.compile(
        rf"""<(span|div)\b[^>]*\bclass\s*=\s*["'](?:[^"']*\s)?{name}(?:\s[^"']*)?["'][^>]*>""", re.I
    )
    parts, at, tries = [], 0, 0
    while (start := opening.search(page, at)) and tries < _MAX_PIECES:
        tries += 1
        stop = _end_of(page, start.end(), start[1].lower())
        new = None if stop is None else replacement(page[start.start() : stop])
        if stop is None or new is None:
            parts.append(page[at : start.end()])
            at = start.end()
        else:
            parts += (page[at : start.start()], new)
            at = stop
    return "".join([*parts, page[at:]])


def _end_of(page: str, at: int, tag: str) -> int | None:
    """Where the element that was opened before `at` ends, looking no further than 100,000 characters."""
    depth = 1
    for match in re.compile(rf"<(/?){tag}\b[^>]*>", re.I).finditer(page, at, at + 100_000):
        depth += -1 if match[1] else 1
        if depth == 0:
            return match.end()
    return None


def _attribute(tag: str, name: str) -> str:
    found = re.search(_ATTRIBUTE.format(name), tag, re.I)
    return (found[1] if found[1] is not None else found[2]) if found else ""


def _fragment(piece: str) -> Any:
    import lxml.etree
    import lxml.html

    try:
        parent: Any = "div"  # a name, where lxml's own types know True alone
        return lxml.html.fragment_fromstring(piece, create_parent=parent)
    except (lxml.etree.LxmlError, ValueError, AssertionError):
        return None

"""Wiki markup to text: headings, lists, the words of links and formulas ($...$) stay; templates, tables and notes go.

It reads a page once for each kind of markup, whatever is left open or crossed: time is linear in the page.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

from data.extract.mathml import tidy

_MEDIA = re.compile(
    r"\s*:?(?:file|image|datei|bild|fichier|archivo|imagen|immagine|plik|\u0444\u0430\u0439\u043b|media)\s*:",
    re.I,
)
_CATEGORY = re.compile(
    r"\s*(?:category|kategorie|cat\u00e9gorie|categor\u00eda|categoria|kategoria|[a-z]{2,3}(?:-[a-z]+)?)\s*:(?! )",
    re.I,
)
_GONE = (
    "ref",
    "gallery",
    "timeline",
    "imagemap",
    "score",
    "graph",
    "mapframe",
    "templatedata",
    "style",
    "noinclude",
)
_SIGNS = {
    "snd": " \u2013 ",
    "spnd": " \u2013 ",
    "spaced ndash": " \u2013 ",
    "ndash": "\u2013",
    "mdash": "\u2014",
    "pi": "\u03c0",
    "'": "'",
    "=": "=",
    "!": "|",
}
_OUTSIDE = re.compile(r"\[(?:https?:|ftp:|mailto:|//)[^\s\]\[]{1,2000}(?:\s+([^\]\[\n]{0,1000}))?\]")
_DRESSING = (
    "nowrap",
    "nobr",
    "abbr",
    "em",
    "strong",
    "lang-en",
    "mvar",
    "math",
    "tlit",
    "ill",
    "interlanguage link",
)
_BEHAVIOUR = re.compile(r"__[A-Z]{3,20}__")
_HOLE = "\ue000{}\ue001"  # where a formula or code is put back
_LAST = re.compile(  # sections without prose
    r"^==\s*(?:references|notes|external links|see also|further reading|bibliography|sources|footnotes)\s*==\s*$",
    re.I,
)


def plain_text(markup: str) -> str:
    """The text of an article in MediaWiki's markup."""
    held: list[str] = []
    text = markup.replace("\ue000", "").replace("\ue001", "")
    text = _replaced(text, "<!--", "-->", lambda opening, inner: "")
    for tag in ("syntaxhighlight", "source", "pre"):
        text = _elements(text, tag, lambda opening, inner: _hold(held, _fence(opening, inner)))
    for tag in ("math", "chem"):
        text = _elements(text, tag, lambda opening, inner: _hold(held, _formula(opening, inner)))
    text = re.sub(r"<nowiki\s*/>|</?nowiki>", "", text, flags=re.I)
    for tag in _GONE:
        text = re.sub(rf"<{tag}\b[^>]*?/>", "", text, flags=re.I)
        text = _elements(text, tag, lambda opening, inner: "")
        text = re.sub(rf"<{tag}\b[^>\n]{{0,300}}>[^\n]{{0,500}}", "", text, flags=re.I)  # nobody closed it
    text = _without_pairs(text, "{{", "}}")
    text = _without_pairs(text, "{|", "|}", at_line=True)
    text = _links(text)
    text = re.sub(
        r"\[(?:https?:|ftp:|mailto:|//)[^\s\]\[]{1,2000}(?:\s+([^\]\[\n]{0,1000}))?\]",
        lambda m: m[1] or "",
        text,
    )
    text = re.sub(r"<br\s*/?>", "\n", text, flags=re.I)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^<>]{0,1000}>", "", text))
    text = _lines(_BEHAVIOUR.sub("", re.sub(r"'{2,5}", "", text)))
    return re.sub(r"\ue000(\d+)\ue001", lambda m: held[int(m[1])], text).strip()


def _hold(held: list[str], piece: str) -> str:
    held.append(piece)
    return _HOLE.format(len(held) - 1)


def _formula(attributes: str, latex: str) -> str:
    dollars = "$$" if "block" in attributes else "$"
    return f"{dollars}{tidy(html.unescape(latex))}{dollars}" if latex.strip() else ""


def _fence(attributes: str, code: str) -> str:
    language = re.search(r"""lang\s*=\s*["']?([\w+#-]+)""", attributes)
    code = html.unescape(code).strip("\n")
    return (
        f"\n```{language[1] if language else ''}\n{code}\n```\n" if "\n" in code or language else f"`{code}`"
    )


def _elements(text: str, tag: str, replacement: Callable[[str, str], str]) -> str:
    """With each <tag ...>...</tag> replaced, by its opening and what is inside."""
    return _replaced(text, rf"<{tag}\b[^<>]*(?<!/)>", rf"</{tag}\s*>", replacement)


def _replaced(text: str, opening: str, closing: str, replacement: Callable[[str, str], str]) -> str:
    """What lies from one pattern to the next of another, replaced; stops where nothing closes any more."""
    begins, ends = re.compile(opening, re.I), re.compile(closing, re.I)
    parts, at = [], 0
    while start := begins.search(text, at):
        stop = ends.search(text, start.end())
        if stop is None:
            break
        parts += (text[at : start.start()], replacement(start[0], text[start.end() : stop.start()]))
        at = stop.end()
    return "".join([*parts, text[at:]])


def _without_pairs(text: str, opening: str, closing: str, at_line: bool = False) -> str:
    """Without what is between brackets that nest; of what is never closed only the bracket goes."""
    prefix = r"(?m:^[ \t:]*)" if at_line else ""
    pattern = re.compile(rf"(?P<open>{prefix}{re.escape(opening)})|{prefix}{re.escape(closing)}")
    stack: list[int] = []
    cuts: list[tuple[int, int]] = []
    for match in pattern.finditer(text):
        if match["open"] is not None:
            stack.append(match.start())
        elif stack:
            start = stack.pop()
            while cuts and cuts[-1][0] >= start:
                cuts.pop()
            cuts.append((start, match.end()))
    parts, at = [], 0
    for start, stop in cuts:
        kept = _template(text[start:stop]) if opening == "{{" else ""
        parts += (text[at:start], kept)
        at = stop
    return "".join([*parts, text[at:]]).replace(opening, "")


def _template(whole: str) -> str:
    """What is left of a template: the words of a few that only dress them, the formula in {{math|...}}."""
    name, _, rest = whole[2:-2].partition("|")
    kind = name.strip().lower()
    if kind in _SIGNS:
        return _SIGNS[kind]
    if "{{" in rest or not rest:
        return ""
    fields = [field for field in rest.split("|") if "=" not in field.split("<")[0]]
    if kind in ("lang", "transl", "transliteration") and len(fields) >= 2:
        return fields[-1]
    if kind in _DRESSING and fields:
        return fields[0].strip()
    if kind in ("convert", "cvt") and len(fields) >= 2:
        return f"{fields[0].strip()} {fields[1].strip()}"
    return ""


def _links(text: str) -> str:
    """[[target|words]] as its words; pictures and categories go, with the links in their captions."""
    out: list[list[str]] = [[]]
    at = 0
    for match in re.finditer(r"\[\[|\]\]", text):
        out[-1].append(text[at : match.start()])
        at = match.end()
        if match[0] == "[[":
            out.append([])
        elif len(out) > 1:
            inner = "".join(out.pop())
            out[-1].append(_words(inner))
    out[-1].append(text[at:])
    return "".join("".join(level) for level in out)


def _words(inner: str) -> str:
    target, bar, words = inner.partition("|")
    if _MEDIA.match(target) or _CATEGORY.match(target):
        return ""
    return (words if bar else target.lstrip(":")).strip()


def _lines(text: str) -> str:
    """Headings as their words, list items with a dash; sections that nothing is in, and the apparatus, go."""
    kept: list[str] = []
    headings: list[tuple[int, str]] = []
    skipping = False
    for line in text.split("\n"):
        line = re.sub(r"[ \t]+", " ", line).strip()
        if heading := re.fullmatch(r"(={1,6})\s*(.+?)\s*\1", line):
            level = len(heading[1])
            skipping = bool(_LAST.match(line)) or (skipping and level > 2)
            headings = [] if skipping else [h for h in headings if h[0] < level] + [(level, heading[2])]
            continue
        if skipping or (line and not re.search(r"\w|\ue000", line)):
            continue
        if line:
            kept += [piece for _, words in headings for piece in ("", words, "")]
            headings = []
            line = re.sub(r"^[*#]+[:;]*\s*", "- ", line)
            line = re.sub(r"^[:;]+\s*", "", line)
        kept.append(line)
    text = re.sub(
        r"\((?:[,;]|\s)*(?=\))\)|(?<=\()[,; ]+", "", "\n".join(kept)
    )  # what templates leave of brackets
    return re.sub(r" +([,.;:])", r"\1", re.sub(r"\n{3,}", "\n\n", re.sub(r" {2,}", " ", text))).strip()

"""Bytes of a web page or of a file to text: byte-order mark, header, meta tag, detection (uchardet by resiliparse), in
this order, where what is declared is believed only as far as the bytes agree.
"""

from __future__ import annotations

import codecs
import re

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_META = re.compile(
    rb"""<(?:meta|\?xml)\b[^>]{0,300}?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I
)
_HEAD = 4096  # bytes in which a declaration is looked for; HTML asks for 1024, pages do not keep to it
_SAMPLE = 1 << 16  # bytes that detection looks at, of lines that are not ASCII
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]")
_LATIN = re.compile(r"iso8859-(?:1|2|3|4|9|10|13|14|15|16)|cp125[0247]")
_EASTERN = (
    "pl",
    "cs",
    "sk",
    "hu",
    "hr",
    "sl",
    "ro",
    "sq",
    "tr",
    "lt",
    "lv",
    "et",
    "mt",
    "eo",
    "bs",
    "sh",
    "az",
)


def decode(raw: bytes, declared: str | None = None) -> tuple[str, str]:
    """(text, encoding). `declared` is what a header said. Never raises: bytes that mean nothing become U+FFFD."""
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding, "replace"), encoding
    if encoding := _wide_without_mark(raw):
        return raw.decode(encoding, "replace"), encoding
    claims = [name for name in map(_known, (declared, _declared_in(raw))) if name and _possible(name, raw)]
    if not raw.isascii():
        claims.insert(0, "utf-8")  # other encodings give valid UTF-8 by accident about never
    for encoding in claims:
        try:
            return raw.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    encoding = "utf-8" if raw.isascii() or _nearly_utf8(raw) else _detected(raw)
    return raw.decode(encoding, "replace"), encoding


def decode_file(raw: bytes) -> str:
    """The text of a file. Raises ValueError for bytes that are no text in any encoding."""
    return _decode_text(raw)[0]


def encoding_of(raw: bytes) -> str:
    """The encoding of a file by a piece of it. Raises ValueError for bytes that are no text in any."""
    return _decode_text(raw[: raw.rfind(b"\n") + 1] or raw)[1]  # the piece may end inside of a character


def _decode_text(raw: bytes) -> tuple[str, str]:
    text, encoding = decode(raw)
    if len(_CONTROLS.findall(text)) * 200 > len(text):
        raise ValueError(f"no text: one character in 200 or more means nothing in {encoding}")
    return text, encoding


def _wide_without_mark(raw: bytes) -> str | None:
    """UTF-16 without a byte-order mark, of a text that is mostly Latin: every second byte is zero."""
    head = raw[:_HEAD]
    even, odd = head[::2].count(0), head[1::2].count(0)
    half = len(head) // 2
    if half < 8 or abs(even - odd) < 0.6 * half or min(even, odd) > 0.05 * half:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _declared_in(raw: bytes) -> str | None:
    found = _META.search(raw[:_HEAD])
    return found[1].decode("ascii", "ignore") if found else None


def _known(name: str | None) -> str | None:
    """The codec that browsers take for this name (latin-1 is windows-1252 there), None for one that is no text's."""
    if not name:
        return None
    from resiliparse.parse.encoding import map_encoding_to_html5

    try:
        encoding = codecs.lookup(map_encoding_to_html5(name.strip().lower(), fallback_utf8=False) or "").name
        "".encode(encoding)  # base64, rot13 and their like are codecs, but not from text
    except (LookupError, ValueError, TypeError):
        return None
    return (
        None
        if encoding in ("utf-7", "idna", "punycode", "unicode_escape", "raw_unicode_escape")
        else encoding
    )


def _possible(encoding: str, raw: bytes) -> bool:
    """A declaration of UTF-16 that could be read as ASCII is wrong."""
    return not encoding.startswith(("utf-16", "utf-32")) or b"\0" in raw[:_HEAD]


def _nearly_utf8(raw: bytes) -> bool:
    """One bad byte in a hundred that are no ASCII: a page that was cut or pasted together."""
    bad = raw.decode("utf-8", "replace").count("\ufffd")
    high = len(raw.translate(None, bytes(range(128))))
    return bad * 100 <= high + 100 and bad * 4 < high


def _detected(raw: bytes) -> str:
    from resiliparse.parse.encoding import detect_encoding

    lines, size = [], 0
    for line in raw.splitlines(keepends=True):
        if not line.isascii():
            lines.append(line)
            size += len(line)
            if size >= _SAMPLE:
                break
    sample = b"".join(lines)
    found = detect_encoding(sample, max_len=_SAMPLE, html5_compatible=False)
    guess = (
        "cp949" if found in ("cp949", "uhc") else _known(found) or "windows-1252"
    )  # HTML has no name for it
    # What is not UTF-8 is no UTF-8; and by letters alone the Latin encodings are as good as alike.
    if guess == "utf-8" or (_LATIN.fullmatch(guess) and not _is_eastern(raw, guess)):
        return "windows-1252"
    return guess


def _is_eastern(raw: bytes, encoding: str) -> bool:
    """Whether a text that could be in one of the Latin encodings is in a language of Eastern Europe."""
    from data.filters.language import identify

    return identify(raw[:_SAMPLE].decode(encoding, "replace")).language in _EASTERN

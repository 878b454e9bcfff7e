"""Bytes of a web page to text: byte-order mark, header, meta tag, detection (uchardet by resiliparse), in this order,
where what is declared is believed only as far as the bytes agree.
"""

from __future__ import annotations

import codecs
import re

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_META = re.compile(
    rb"""<(?:meta|\?xml)\b[^>]{0,300}?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I
)
_HEAD = 4096  # bytes in which a declaration is looked for; HTML asks for 1024, pages do not keep to it
_SAMPLE = 1 << 16  # bytes that detection looks at


def decode(raw: bytes, declared: str | None = None) -> tuple[str, str]:
    """(text, encoding). `declared` is what a header said. Never raises: bytes that mean nothing become U+FFFD."""
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding, "replace"), encoding
    claims = [name for name in map(_known, (declared, _declared_in(raw))) if name and _possible(name, raw)]
    if not raw.isascii():
        claims.insert(0, "utf-8")  # other encodings give valid UTF-8 by accident about never
    for encoding in claims:
        try:
            return raw.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    guess = _detected(raw)
    encoding = "utf-8" if raw.isascii() or _nearly_utf8(raw) else guess
    return raw.decode(encoding, "replace"), encoding


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

    return _known(detect_encoding(raw, max_len=_SAMPLE)) or "windows-1252"

"""Limits on a tokenizer.json, checked before the library reads it.

A file of a few KB could make the library take all memory, which aborts the process, or panic, which no
`except Exception` catches.
"""

from __future__ import annotations

import base64
import contextlib
import math
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

LONGEST_GROWTH = 64  # characters that one character of a text may become
LONGEST_AROUND = 64  # ids that may stand around a text

_UNICODE = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "BertNormalizer")
_UNICODE_GROWTH = 18  # U+FDFA in NFKC, the longest of all
_BYTE_GROWTH = 4  # bytes of a character, each of which becomes a character


def check_limits(spec: dict[str, Any], where: str) -> None:
    """Raises ValueError for a tokenizer.json, parsed, that makes texts longer than the limits above."""
    try:
        growth = _growth([*_steps(spec.get("normalizer")), *_steps(spec.get("pre_tokenizer"))])
        decoded = _growth([step for step in _steps(spec.get("decoder")) if _kind(step) == "Replace"])
        around = _around(spec.get("post_processor"))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a tokenizer that `tokenizers` can read: {error!r}") from error
    if growth > LONGEST_GROWTH:
        raise ValueError(
            f"{where}: the normalizer and pre_tokenizer can make {growth:.3g} characters of one; at most "
            f"{LONGEST_GROWTH} are read. Take away what repeats: Replace and Prepend with long contents, ByteLevel."
        )
    if decoded > LONGEST_GROWTH:
        raise ValueError(
            f"{where}: the decoder can make {decoded:.3g} characters of one; at most {LONGEST_GROWTH} are read. Take "
            "away the steps of Replace with long contents."
        )
    if around > LONGEST_AROUND:
        raise ValueError(
            f"{where}: the post_processor puts {around} ids around a text; at most {LONGEST_AROUND} are read. Shorten "
            "its template."
        )


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Within it a panic of the library is a ValueError. It is a BaseException, as are KeyboardInterrupt and the like,
    which go on as they are."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the library does not export it
            raise
        raise ValueError(
            f"the `tokenizers` library gave up: {error}. Most often a pattern in tokenizer.json takes too many steps "
            "on a text, such as (a+)+$; write it without repetitions inside repetitions."
        ) from error


def _steps(node: Any) -> list[dict[str, Any]]:
    """The steps of a section of tokenizer.json, in order, those of sequences among them."""
    if isinstance(node, list):
        return [step for item in node for step in _steps(item)]
    if not isinstance(node, dict):
        return []
    inner = [node[key] for key in ("normalizers", "pretokenizers", "processors", "decoders") if key in node]
    return _steps(inner) if inner else [node]


def _kind(step: dict[str, Any]) -> str | None:
    """The step's type, which the oldest files leave out, and the library then takes from its keys."""
    if "type" in step:
        return step["type"]
    marks = {"prepend": "Prepend", "pattern": "Replace", "precompiled_charsmap": "Precompiled"}
    marks |= {"trim_offsets": "ByteLevel"}
    return next((kind for key, kind in marks.items() if key in step), None)


def _growth(steps: list[dict[str, Any]]) -> float:
    """Characters that a text of one may become. Unicode's forms count only after a step whose content they lengthen:
    what they have lengthened once they leave as it is, and every real tokenizer has some of them."""
    growth, lengthens = 1.0, False
    for step in steps:
        kind = _kind(step)
        if kind in _UNICODE:
            growth *= _UNICODE_GROWTH if lengthens else 1
            lengthens = False
        elif kind == "Precompiled":
            longest = _longest_of_map(step.get("precompiled_charsmap"))
            growth *= longest if lengthens or longest > _UNICODE_GROWTH else 1
            lengthens = True  # a map may be anything, so a second one counts
        elif kind == "ByteLevel":
            growth *= _BYTE_GROWTH
        elif kind in ("Replace", "Prepend"):
            content = str(step.get("content" if kind == "Replace" else "prepend"))
            shortest = _shortest_match(step.get("pattern")) if kind == "Replace" else 0
            growth *= max(1.0, len(content) / shortest if shortest else 1 + len(content))
            lengthens |= len(unicodedata.normalize("NFKD", content.lower())) > len(content)
    return growth


def _shortest_match(pattern: Any) -> int:
    """Characters that a match has at least; 0 for an expression that Python's `re` can't read."""
    if not isinstance(pattern, dict):
        return 0
    if "String" in pattern:
        return len(str(pattern["String"]))
    one_character = re.sub(r"\\[pP]\{[^{}]*\}", "a", str(pattern.get("Regex")))
    try:
        return re._parser.parse(one_character).getwidth()[0]  # type: ignore[attr-defined]
    except (re.error, OverflowError, RecursionError):
        return 0


def _longest_of_map(charsmap: Any) -> int:
    """Characters of the longest replacement in SentencePiece's map: the size of a trie, the trie, strings that end in a
    zero. A map that is not so is for the library to refuse."""
    try:
        raw = base64.b64decode(charsmap) if isinstance(charsmap, str) else bytes(charsmap or ())
    except (TypeError, ValueError):
        return 1
    texts = raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")
    return max(len(text.decode("utf-8", "replace")) for text in texts) or 1


def _around(post_processor: Any) -> float:
    """Ids that are put around a text at most; endless where a template holds the text itself more than once, so
    that templates one after the other double it."""
    count = 0
    for step in _steps(post_processor):
        if "single" not in step:
            count += 2  # of BERT's and RoBERTa's; ByteLevel has none
            continue
        known = {
            name: len(token.get("ids") or ())
            for name, token in dict(step.get("special_tokens") or {}).items()
        }
        pieces = list(step.get("single") or ())
        named = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
        count += sum(known.get(name, 1) for name in named)
        if len(pieces) - len(named) > 1:
            return math.inf
    return count

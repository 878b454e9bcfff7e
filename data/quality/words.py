"""Text as the words that models of quality count: small letters, marks apart, and each letter of a script that is
written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) a word of its own."""

from __future__ import annotations

import re

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[^\W{UNSPACED}]+|[{UNSPACED}]|[^\w\s]")


def words_of(text: str) -> list[str]:
    """The words and marks of a text, in small letters."""
    return _WORD.findall(text.lower())

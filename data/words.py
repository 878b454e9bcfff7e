"""What a word is, for all of data/: a run of letters and digits, or one letter of a script that is written without
spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese).

So near copies, contamination and quality are seen in every script. Filters whose thresholds come from a paper count
words as that paper does: see data/filters/words.py.
"""

from __future__ import annotations

import re

# Thai and Lao, Burmese, Khmer, Kana, Han with its extensions
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[^\W{UNSPACED}]+|[{UNSPACED}]")
WORD_OR_MARK = re.compile(rf"{WORD.pattern}|[^\w\s]")


def words(text: str) -> list[str]:
    """The words of a text as they are written."""
    return WORD.findall(text)


def words_and_marks(text: str) -> list[str]:
    """The words and marks of punctuation of a text, in small letters."""
    return WORD_OR_MARK.findall(text.lower())

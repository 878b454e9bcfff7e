"""What counts as a word. The references differ, and thresholds were set with theirs: name yours.

white_space   what white space separates, punctuation attached (Gopher, C4)
tokens        words and marks of punctuation apart, as spaCy's tokenizers do that datatrove calls (FineWeb)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

WordKind = Literal["white_space", "tokens"]
_TOKEN = re.compile(r"\w+(?:[.,:](?=\d)\d+)*|[^\w\s]", re.UNICODE)

WORDS: dict[str, Callable[[str], list[str]]] = {"white_space": str.split, "tokens": _TOKEN.findall}


def has_letter(word: str) -> bool:
    """Whether there is a letter of any script in it."""
    return word.isalpha() or any(map(str.isalpha, word))

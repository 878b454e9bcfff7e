"""What counts as a word. The references differ, and thresholds were set with theirs: name yours.

white_space   what white space separates, punctuation attached (Gopher, C4)
tokens        words and marks of punctuation apart, nearly as spaCy's tokenizer for English does it, which datatrove
              calls (FineWeb): addresses, "U.S.", "..." and the "'s" of "it's" are one each
spacy         that tokenizer itself, for pip install "crucible-lm[spacy]": some times slower
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any, Literal

from configs.typed import ConfigError

WordKind = Literal["white_space", "tokens", "spacy"]
_TOKEN = re.compile(
    r"""https?://[^\s<>"]+[\w/] | (?:\w[\w-]{0,62}\.){1,8}(?:com|org|net|edu|gov|io|co|uk)(?:/[^\s<>"]*\w)?\b
    | [\w.+-]{1,64}@\w[\w-]{0,62}(?:\.\w[\w-]{0,62}){1,8} | @\w+ | [A-Z]{1,3}\$
    | (?:[A-Za-z]\.)+(?![A-Za-z]) | (?:Mrs?|Ms|Dr|Prof|Inc|Co|Corp|Ltd|St|Jr|Sr|vs|Gen|Gov|Rep|Sen|Mt|Ave)\.
    | [A-Za-z]+(?=n['\u2019]t\b) | n['\u2019]t\b | ['\u2019](?:s|re|ve|ll|d|m|t)\b
    | \d[\d.,]{0,20}(?=(?:[kcmn\u00b5]?m|ha|yd|in|ft|[km\u00b5]?g|lb|oz|mph|km/h|[kmgtKMGT][bB]|[ap]m|[TGMK])\b)
    | \w+(?:(?:[.,:](?=\d)|/(?=\d)|(?<=[A-Za-z])-(?=\d))\d\w*|&(?=\w)\w+|\.(?=[a-z])\w+)*
    | (?:\.|-){2,} | [^\w\s]""",
    re.X,
)


CLOSING = ("\u300d", "\u300f", "\u201d", "\u00bb")  # quotation marks after a sentence
_MARKS = (
    "\"#$%&'()*+,-/:;<=>@[\\]^_`{|}~"
    "\xab\xb4\xbb\u17d6\u17d9\u17da\u2013\u2014\u2019\u201c\u201d\u201e\u2026\u2236\u2501\u25ba\u3001\u3008\u3009\u300a\u300b\u300c\u300d\u3010\u3011\uff05\uff08\uff09\uff0c\uff11\uff1a\uff1b\uff5e"
)


@functools.cache
def _spacy() -> Callable[[str], Any]:
    try:
        spacy: Any = importlib.import_module("spacy")
    except ImportError as error:
        raise ConfigError('words="spacy" needs spaCy: pip install "crucible-lm[spacy]"') from error
    tokenizer = spacy.blank("en")
    tokenizer.max_length = 1 << 30
    return tokenizer.tokenizer


def _spacy_words(text: str) -> list[str]:
    return [word for token in _spacy()(text) if (word := token.text.strip())]


WORDS: dict[str, Callable[[str], list[str]]] = {
    "white_space": str.split,
    "tokens": _TOKEN.findall,
    "spacy": _spacy_words,
}


@functools.cache
def sentence_terminals() -> tuple[str, ...]:
    """The characters with Unicode's property Sentence_Terminal."""
    import regex

    planes = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x20000))))
    return tuple(regex.findall(r"\p{Sentence_Terminal}", planes))


@functools.cache
def datatrove_punctuation() -> frozenset[str]:
    """What datatrove takes for punctuation: marks and controls, and what ends a sentence in any script."""
    controls = map(chr, (*range(9), *range(11, 32), *range(127, 160)))
    return frozenset((*_MARKS, *controls, *sentence_terminals()))


def has_letter(word: str) -> bool:
    """Whether there is a letter of any script in it."""
    return word.isalpha() or any(map(str.isalpha, word))

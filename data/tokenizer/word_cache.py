"""Byte-level BPE word by word: text is cut by the tokenizer's own pattern, and each word is merged once and remembered.

The ids are those of `encode`. The pattern is run by another library than the tokenizer's, so only text of letters on
which both agree is cut here (tests/data/test_tokenize.py looks at every one of them); the lines with others go to the
tokenizer.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from data.tokenizer import pretokenizers
from data.tokenizer.interface import Tokenizer
from data.tokenizer.pretokenizers import PATTERNS

# Latin, Greek, Cyrillic, Armenian, punctuation, signs, Kana, Han, Hangul: letters that are older than both libraries
_RANGES = (
    "\t\n\r\u0020-\u007e\u00a0-\u017e\u0180-\u024f\u0391-\u03a1\u03a3-\u03cd\u0400-\u0481\u048c-\u04c4\u0531-\u0556"
    "\u0561-\u0586\u2010-\u2027\u2030-\u2046\u20a0-\u20af\u2190-\u21f3\u2200-\u22f1\u2500-\u2595\u3001-\u3020"
    "\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3\uff01-\uff5d\ufeff\ufffd"
)
PLAIN = re.compile(f"[{_RANGES}]*")
_MOST = 1 << 20  # words that are remembered


# Where no word of the patterns below goes on: between two lines with a letter at the beginning of the second one.
_LINE = re.compile(r"(?<=\S\n)(?=[A-Za-z])")
_KNOWN = frozenset(
    known
    for name in PATTERNS
    for digits in (None, 1, 2, 3)
    for known in pretokenizers.pattern(name, digits).patterns
)


class WordCache:
    """The ids of words that were met before."""

    def __init__(self, pattern: str, tokenizer: Tokenizer, backend: Any, added: list[str]):
        import regex

        self._words = regex.compile(pattern)
        self._lines = pattern in _KNOWN
        self._added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        self._tokenizer, self._ids = tokenizer, _Words(backend.model)

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [n]."""
        ids = self._encode_plain(text)
        if ids is not None:
            return ids
        parts = [text]
        if self._lines and not self._added.search(text):
            parts = _LINE.split(text)
        found = [self._encode_plain(part) for part in parts]
        others = iter(self._tokenizer.encode_batch([p for p, ids in zip(parts, found) if ids is None]))
        return np.concatenate([np.asarray(next(others), "<i4") if ids is None else ids for ids in found])

    def _encode_plain(self, text: str) -> np.ndarray | None:
        if not PLAIN.fullmatch(text) or self._added.search(text):
            return None
        words = self._words.findall(text)
        if sum(map(len, words)) != len(text):
            return None
        if len(self._ids) > _MOST:
            self._ids.clear()
        ids = self._ids
        return np.frombuffer(b"".join([ids[word] for word in words]), "<i4")


class _Words(dict):
    """The ids of a word, as bytes of int32; merged when it is first asked for."""

    def __init__(self, model: Any):
        super().__init__()
        self._model = model

    def __missing__(self, word: str) -> bytes:
        spelled = "".join(map(_LETTERS.__getitem__, word.encode("utf-8")))
        ids = [token.id for token in self._model.tokenize(spelled)]
        packed = self[word] = np.asarray(ids, "<i4").tobytes()
        return packed


def word_cache(tokenizer: Tokenizer) -> WordCache | None:
    """For a tokenizer that cuts words by one pattern and merges bytes; None for others."""
    from data.tokenizer.huggingface import HuggingFaceTokenizer

    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    spec = json.loads(tokenizer.backend.to_str())
    steps = spec["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    model = spec["model"]
    plain = model["type"] == "BPE" and not any(
        model.get(key)
        for key in (
            "dropout",
            "continuing_subword_prefix",
            "end_of_word_suffix",
            "byte_fallback",
            "unk_token",
        )
    )
    if (
        spec["normalizer"] is not None
        or not plain
        or [step.get("type") for step in steps] != ["Split", "ByteLevel"]
    ):
        return None
    split, spell = steps
    whole = split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]
    if not whole or spell["add_prefix_space"] or spell["use_regex"]:
        return None
    added = [token["content"] for token in spec["added_tokens"]]
    return WordCache(split["pattern"]["Regex"], tokenizer, tokenizer.backend, added)


def _letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte (GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in shown}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(shown))
    return [letters[byte] for byte in range(256)]


_LETTERS = _letters()

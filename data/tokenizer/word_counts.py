"""How often each word of a stream of texts occurs, in bounded memory.

Most text is the same few words over and over, so the regular expression of a pre-tokenizer, which is slow, looks at
each different stretch between two spaces once. That changes nothing: in the patterns that tokenizers are trained
with, a word begins at every space that something other than white space follows.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

SPACE_BEFORE_TEXT = re.compile(r" (?=\S)")
SPACE_WITHIN_TEXT = re.compile(r"(?<=\S) (?=\S)")
_STRETCHES = 1 << 20  # different stretches that are kept before they are cut into words
_TOGETHER = 1 << 14  # of which so many are cut at a time
_PIECE = 1 << 20  # characters of a text that are cut at a time


@dataclasses.dataclass
class WordCounts:
    """Words with their counts, in the order in which they came, and what was not counted."""

    words: Counter[str]
    bytes: int = 0  # of the texts read, UTF-8
    texts: int = 0
    rare: int = 0  # different words that were dropped because there were too many
    bad: int = 0  # texts with lone surrogates, which no UTF-8 can carry


def count_words(
    texts: Iterable[str],
    cut: Callable[[str], list[str]],
    border: re.Pattern = SPACE_BEFORE_TEXT,
    max_bytes: int | None = None,
    max_words: int = 1 << 23,
    progress: Callable[[int], None] = lambda done: None,
) -> WordCounts:
    """Counts the words of texts as they come.

    Args:
        cut: text to words; a word begins at every space that `border` finds, whatever stands before it.
        border: finds single spaces.
        max_bytes: texts after so many bytes of UTF-8 are not read; the text that goes beyond is left out.
        max_words: when there are more different words, those that came least often so far are dropped. What a rare
            word counts is then a lower bound; a word that makes up more than one in `max_words` always stays.
        progress: called with the bytes read so far, text by text.
    """
    counts = WordCounts(Counter())
    stretches: Counter[str] = Counter()
    floor = 0
    for text in texts:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:
            counts.bad += 1
            continue
        if max_bytes is not None and counts.bytes + size > max_bytes:
            break
        counts.bytes, counts.texts = counts.bytes + size, counts.texts + 1
        for first, rest in _stretches(text, border):
            counts.words.update(cut(first))
            stretches.update(rest)
            if len(stretches) > _STRETCHES:
                _into_words(stretches, cut, counts.words)
        while len(counts.words) > max_words:
            floor += 1
            kept = Counter({word: count for word, count in counts.words.items() if count > floor})
            counts.rare += len(counts.words) - len(kept)
            counts.words = kept
        progress(counts.bytes)
    _into_words(stretches, cut, counts.words)
    return counts


def _stretches(text: str, border: re.Pattern) -> Iterator[tuple[str, list[str]]]:
    """What stands before the first such space, and after each of them, for pieces of a text.

    A piece that begins with such a space has nothing before it.
    """
    start = 0
    while start < len(text):
        stop = start + _PIECE
        if stop < len(text):
            space = border.search(text, stop)
            stop = space.start() if space else len(text)
        first, *rest = border.split(text[start:stop])
        yield first, rest
        start = stop


def _into_words(stretches: Counter[str], cut: Callable[[str], list[str]], words: Counter[str]) -> None:
    """Cuts stretches that came equally often together: one long text is cut faster than many short ones."""
    groups: dict[int, list[str]] = {}
    for stretch, count in stretches.items():
        groups.setdefault(count, []).append(stretch)
    stretches.clear()
    for count, group in groups.items():
        for start in range(0, len(group), _TOGETHER):
            found = cut(" " + " ".join(group[start : start + _TOGETHER]))
            if count == 1:
                words.update(found)
            else:
                for word, times in Counter(found).items():
                    words[word] += times * count

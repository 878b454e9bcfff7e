"""How often each word of a stream of texts occurs, in bounded memory and on all cores.

Most text is the same few words over and over, so the regular expression of a pre-tokenizer, which is slow, looks at
each different stretch between two spaces once a batch. That changes nothing: in the patterns that tokenizers are
trained with, a word begins at every space that something other than white space follows.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SPACE_BEFORE_TEXT = r" (?=\S)"
SPACE_WITHIN_TEXT = r"(?<=\S) (?=\S)"
_BATCH = 1 << 24  # bytes of text that are counted at a time
_TOGETHER = 1 << 14  # stretches that are cut at a time
_PIECE = 1 << 20  # characters of a text that are looked at at a time


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
    pattern: str,
    border: str = SPACE_BEFORE_TEXT,
    max_bytes: int | None = None,
    max_words: int = 1 << 23,
    progress: Callable[[int], None] = lambda done: None,
    workers: int | None = None,
) -> WordCounts:
    """Counts the words of texts as they come; the result does not depend on the number of workers.

    Args:
        pattern: finds the words (of the package `regex`); one begins at every space that `border` finds.
        border: finds single spaces.
        max_bytes: texts after so many bytes of UTF-8 are not read; the text that goes beyond is left out.
        max_words: when there are more different words, those that came least often so far are dropped. What a rare
            word counts is then a lower bound.
        progress: called with the bytes read so far.
        workers: processes that count; by default one a core, and none for less than two batches.
    """
    counts = WordCounts(Counter())
    floor = 0
    batches = _batches(texts, counts, max_bytes, progress)
    for words in _counted(batches, pattern, border, workers or os.cpu_count() or 1):
        for word, count in words.items():
            counts.words[word] += count
        while len(counts.words) > max_words:
            floor += 1
            kept = Counter({word: count for word, count in counts.words.items() if count > floor})
            counts.rare += len(counts.words) - len(kept)
            counts.words = kept
    return counts


def count_batch(texts: list[str], pattern: str, border: str) -> dict[str, int]:
    """The words of some texts with their counts."""
    import regex

    cut, spaces = regex.compile(pattern).findall, re.compile(border)
    stretches: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for text in texts:
        for first, rest in _stretches(text, spaces):
            words.update(cut(first))
            stretches.update(rest)
    groups: dict[int, list[str]] = {}  # one long text is cut faster than many short ones
    for stretch, count in stretches.items():
        groups.setdefault(count, []).append(stretch)
    for count, group in groups.items():
        for start in range(0, len(group), _TOGETHER):
            found = cut(" " + " ".join(group[start : start + _TOGETHER]))
            if count == 1:
                words.update(found)
            else:
                for word, times in Counter(found).items():
                    words[word] += times * count
    return dict(words)


def serve() -> None:
    """Counts the batches that come on standard input until it ends; what a worker process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(count_batch(*job), sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
        sys.stdout.buffer.flush()


def _batches(
    texts: Iterable[str], counts: WordCounts, max_bytes: int | None, progress: Callable[[int], None]
) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for text in texts:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:
            counts.bad += 1
            continue
        if max_bytes is not None and counts.bytes + size > max_bytes:
            break
        counts.bytes, counts.texts = counts.bytes + size, counts.texts + 1
        batch.append(text)
        held += size
        if held >= _BATCH:
            yield batch
            batch, held = [], 0
        progress(counts.bytes)
    if batch:
        yield batch


def _counted(
    batches: Iterator[list[str]], pattern: str, border: str, workers: int
) -> Iterator[dict[str, int]]:
    """The words of each batch, in the order of the batches."""
    first = list(itertools.islice(batches, 2))
    if len(first) < 2 or workers == 1:
        for batch in itertools.chain(first, batches):
            yield count_batch(batch, pattern, border)
        return
    with _Workers(workers) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for batch in itertools.chain(first, batches):
            waiting.append(pool.submit((batch, pattern, border)))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Workers:
    """Python processes that run `serve`.

    Not multiprocessing's: those run the caller's script again, or copy a process with threads in it.
    """

    def __init__(self, count: int):
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-c", "from data.tokenizer.word_counts import serve; serve()"]
        self._processes = [
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(count)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = concurrent.futures.ThreadPoolExecutor(count)

    def submit(self, job: tuple) -> concurrent.futures.Future:
        return self._threads.submit(self._ask, job)

    def _ask(self, job: tuple) -> dict[str, int]:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(job, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError("a process that counts words ended; its message is above") from error
        finally:
            self._idle.put(process)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for process in self._processes:
            if kind is not None:
                process.kill()
        self._threads.shutdown()
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.wait()


def _stretches(text: str, spaces: re.Pattern) -> Iterator[tuple[str, list[str]]]:
    """What stands before the first such space, and after each of them, for pieces of a text.

    A piece that begins with such a space has nothing before it.
    """
    start = 0
    while start < len(text):
        stop = start + _PIECE
        if stop < len(text):
            space = spaces.search(text, stop)
            stop = space.start() if space else len(text)
        first, *rest = spaces.split(text[start:stop])
        yield first, rest
        start = stop

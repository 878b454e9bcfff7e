"""A text as a bag of hashed words and pairs of words, as fastText has it (Joulin et al. 2016, arXiv:1607.01759)."""

# N texts, K different features of all of them together

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from data.words import words_and_marks

_KNOWN = 1 << 20  # words whose hashes are kept in memory
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def features(text: str, bits: int, max_words: int) -> tuple[np.ndarray, np.ndarray]:
    """(buckets, ascending, int32 [K]; values, float32 [K]) of the first `max_words` words.

    A bucket, of 2^bits, is that of a word or of two neighbours; its value is the root of its share of all, so that
    the vector has length 1 and a word that is repeated does not drown the others.
    """
    words = words_and_marks(text)[:max_words]
    if len(_HASHES) > _KNOWN:
        _HASHES.clear()
    single = np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))
    with np.errstate(over="ignore"):
        pairs = (single[:-1] * _GOLDEN) ^ (single[1:] + np.uint64(1))
        every = np.concatenate([single, pairs]) * _GOLDEN
    buckets, counts = np.unique((every >> np.uint64(64 - bits)).astype(np.int32), return_counts=True)
    return buckets, np.sqrt(counts / max(len(every), 1)).astype(np.float32)


def bucket_of(word: str, bits: int, following: str | None = None) -> int:
    """Where `features` counts a word, or two neighbours."""
    value = np.array([_HASHES[word]], np.uint64)
    with np.errstate(over="ignore"):
        if following is not None:
            value = (value * _GOLDEN) ^ (np.array([_HASHES[following]], np.uint64) + np.uint64(1))
        return int((value * _GOLDEN >> np.uint64(64 - bits))[0])


def matrix(texts: Sequence[str], bits: int, max_words: int):
    """The texts as a sparse float32 matrix [N, 2^bits]."""
    from scipy.sparse import csr_matrix

    found = [features(text, bits, max_words) for text in texts]
    ends = np.concatenate([[0], np.cumsum([len(buckets) for buckets, _ in found])])
    columns = np.concatenate([np.zeros(0, np.int32), *(buckets for buckets, _ in found)])
    values = np.concatenate([np.zeros(0, np.float32), *(values for _, values in found)])
    return csr_matrix((values, columns, ends), shape=(len(texts), 1 << bits))


class _Hashes(dict):
    """Hashes of words, each made once."""

    def __missing__(self, word: str) -> int:
        self[word] = value = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return value


_HASHES = _Hashes()

"""Pages of the cache, shared by reference count and found again by what they hold (prefix cache).

A full page is a block. Its hash is that of the block before it and of its own tokens, so equal hashes mean equal
tokens from the first one on. Kwon et al. 2023, arXiv:2309.06180; the hash is SHA-256, since tenants must not be able to
find two prefixes of one hash.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np


def chain_root(*parts: object) -> bytes:
    """The start of a hash chain. Blocks of other parts (salt, adapter, version of the parameters) are never found."""
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).digest()


def block_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a block of tokens after the block, or root, `before`."""
    return hashlib.sha256(before + np.asarray(tokens, "<i4").tobytes()).digest()


class BlockPool:
    """Page numbers 0 to `total` - 1. Each is free, held by one or more rows, or cached: held by none, and found by its
    hash until it is needed for something else. Free + cached + held is always all."""

    def __init__(self, total: int):
        self.total = total
        self._free = list(range(total - 1, -1, -1))  # a stack: the page freed last is warm
        self._rows_of: dict[int, int] = {}  # held page -> how many rows hold it
        self._cached: collections.OrderedDict[int, None] = (
            collections.OrderedDict()
        )  # least recently used first
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def held(self) -> int:
        return len(self._rows_of)

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._cached)

    def take(self, count: int) -> list[int]:
        """`count` pages of no content, evicting the cached ones used least recently.

        RuntimeError when fewer are available, which the scheduler must have made sure of.
        """
        if count > self.available:
            raise RuntimeError(
                f"{count} cache pages were asked for and {self.available} of {self.total} are free."
            )
        while len(self._free) < count:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
            self._free.append(page)
        pages = [self._free.pop() for _ in range(count)]
        self._rows_of.update(dict.fromkeys(pages, 1))
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """One row less holds each; RuntimeError for a page that none holds.

        Call with a row's pages in order: the last are evicted first, because a block without those before it is
        never found.
        """
        for page in reversed(list(pages)):
            if page not in self._rows_of:
                raise RuntimeError(f"cache page {page} was given back but is not held.")
            self._rows_of[page] -= 1
            if self._rows_of[page]:
                continue
            del self._rows_of[page]
            if page in self._hash_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def share(self, hashes: Iterable[bytes]) -> list[int]:
        """The pages of the longest run of these blocks, from the first on, that is known; one row more holds each."""
        pages = []
        for hash in hashes:
            page = self._page_of.get(hash)
            if page is None:
                break
            self._cached.pop(page, None)
            self._rows_of[page] = self._rows_of.get(page, 0) + 1
            pages.append(page)
        return pages

    def register(self, page: int, hash: bytes) -> None:
        """Let a held page be found by the hash of its block, unless another page holds the same block."""
        if page not in self._rows_of:
            raise RuntimeError(f"cache page {page} was registered but is not held.")
        if hash not in self._page_of and page not in self._hash_of:
            self._page_of[hash], self._hash_of[page] = page, hash

    def is_registered(self, page: int) -> bool:
        return page in self._hash_of

    def forget_all(self) -> None:
        """No block is found any more; cached pages are free."""
        self._page_of, self._hash_of = {}, {}
        self._free += reversed(self._cached)
        self._cached.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._hash_of.pop(page)]

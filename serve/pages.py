"""The free list of cache pages (Kwon et al. 2023, arXiv:2309.06180)."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Page numbers 0 to `total` - 1, each either free or held by one row. Free + held is always all."""

    def __init__(self, total: int):
        self.total = total
        self._free = list(range(total - 1, -1, -1))  # a stack: the page freed last is warm
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        return len(self._held)

    def take(self, count: int) -> list[int]:
        """`count` pages; RuntimeError when fewer are free, which the scheduler must have made sure of."""
        if count > len(self._free):
            raise RuntimeError(
                f"{count} cache pages were asked for and {len(self._free)} of {self.total} are free."
            )
        pages = [self._free.pop() for _ in range(count)]
        self._held.update(pages)
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """Free these; RuntimeError for a page that is not held, since two rows would then share it."""
        for page in pages:
            if page not in self._held:
                raise RuntimeError(f"cache page {page} was given back but is not held.")
            self._held.remove(page)
            self._free.append(page)

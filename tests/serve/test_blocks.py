"""Pages of the cache: shared by reference count, found by hash, evicted least recently used first."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from serve.blocks import BlockPool, block_hash, chain_root


def test_pages_are_handed_out_once_and_only_held_ones_come_back():
    pool = BlockPool(5)
    first, second = pool.take(2), pool.take(3)
    assert sorted(first + second) == list(range(5)) and pool.available == 0
    with pytest.raises(RuntimeError, match="0 of 5 are free"):
        pool.take(1)
    pool.give_back(first)
    with pytest.raises(RuntimeError, match="is not held"):
        pool.give_back(first)
    assert (pool.free, pool.held) == (2, 3)


def test_a_hash_is_that_of_all_tokens_from_the_first_on_and_of_the_root():
    root = chain_root("", None, 0)
    chain = lambda tokens, root: block_hash(block_hash(root, tokens[:2]), tokens[2:])
    assert chain([1, 2, 3, 4], root) == chain([1, 2, 3, 4], root)
    others = [
        chain([1, 2, 3, 5], root),
        chain([9, 2, 3, 4], root),
        chain([1, 2, 3, 4], chain_root("a", None, 0)),
    ]
    others += [chain([1, 2, 3, 4], chain_root("", "a", 0)), chain([1, 2, 3, 4], chain_root("", None, 1))]
    assert len({chain([1, 2, 3, 4], root), *others}) == 6


def test_the_block_used_least_recently_is_evicted_and_of_one_row_the_last():
    pool = BlockPool(4)
    old, new = pool.take(2), pool.take(2)
    for page, hash in zip(old + new, [b"a", b"b", b"c", b"d"], strict=True):
        pool.register(page, hash)
    pool.give_back(old)
    pool.give_back(new)
    assert (pool.free, pool.cached) == (0, 4)
    assert pool.share([b"a"]) == old[:1]  # used again
    pool.give_back(old[:1])
    pool.take(1)
    assert pool.share([b"b"]) == []
    pool.take(2)  # d before c
    assert pool.share([b"d"]) == pool.share([b"c"]) == [] and pool.share([b"a"]) == old[:1]


class PoolMachine(RuleBasedStateMachine):
    """Against a model that keeps, for each page, the rows that hold it and the content that it may be found by."""

    total = 7

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(self.total)
        self.rows: list[list[int]] = []  # pages that each row holds
        self.content: dict[int, bytes] = {}  # of registered pages

    def held(self):
        return {page for row in self.rows for page in row}

    @rule(count=st.integers(1, 3))
    def take(self, count):
        if count > self.total - len(self.held()):
            with pytest.raises(RuntimeError):
                self.pool.take(count)
            return
        pages = self.pool.take(count)
        assert len(set(pages)) == count and not set(pages) & self.held()
        for page in pages:
            self.content.pop(page, None)
        self.rows.append(pages)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), hash=st.sampled_from([b"a", b"b", b"c"]))
    def register(self, data, hash):
        page = data.draw(st.sampled_from(sorted(self.held())))
        self.pool.register(page, hash)
        if page not in self.content and hash not in self.content.values():
            self.content[page] = hash

    @rule(hashes=st.lists(st.sampled_from([b"a", b"b", b"c"]), unique=True))
    def share(self, hashes):
        pages = self.pool.share(hashes)
        found = {hash: page for page, hash in self.content.items()}
        expected = []
        for hash in hashes:
            if hash not in found:
                break
            expected.append(found[hash])
        assert pages == expected
        if pages:
            self.rows.append(pages)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def give_back(self, data):
        row = data.draw(st.sampled_from(range(len(self.rows))))
        self.pool.give_back(self.rows.pop(row))

    @rule()
    def forget_all(self):
        self.pool.forget_all()
        self.content.clear()

    @invariant()
    def free_cached_and_held_are_all(self):
        pool, held = self.pool, self.held()
        assert pool.held == len(held)
        assert pool.cached == len(set(self.content) - held)
        assert pool.free + pool.cached + pool.held == pool.total == self.total
        assert all(pool.is_registered(page) == (page in self.content) for page in range(self.total))


def test_any_order_of_taking_sharing_and_returning_keeps_every_page_once():
    run_state_machine_as_test(
        PoolMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )

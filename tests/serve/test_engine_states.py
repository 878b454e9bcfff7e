"""Whatever is added, cancelled, preempted, updated and finished, in any order: pages and answers stay whole."""

import jax
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from serve import Request, SamplingParams


class EngineMachine(RuleBasedStateMachine):
    """Drives `engine`; `expected(request)` gives the tokens that the request gets when served alone."""

    engine = None
    expected = None

    def __init__(self):
        super().__init__()
        self.live: dict[str, Request] = {}
        self.cancelled: set[str] = set()
        self.tokens: dict[str, list[int]] = {}

    @rule(
        length=st.integers(1, 40),
        max_tokens=st.integers(1, 20),
        kind=st.integers(0, 5),
        first=st.integers(4, 90),
    )
    def add(self, length, max_tokens, kind, first):
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=[0.0, 1.0, 0.7][kind % 3],
            seed=kind,
            top_k=7 * (kind // 3),
            ignore_eos=kind % 2 == 0,
        )
        request = Request([(first + 7 * i) % 320 for i in range(length)], sampling)
        id = self.engine.submit(request)
        assert id not in self.tokens
        self.live[id], self.tokens[id] = request, []

    @rule()
    def step(self):
        for out in self.engine.step():
            self.tokens[out.id] += out.new_tokens
            assert self.tokens[out.id] == out.tokens
            if out.finished:
                self.check_end(out, self.live.pop(out.id))

    def check_end(self, out, request):
        if out.id in self.cancelled:
            assert out.finish_reason == "cancelled"
            assert out.tokens == self.expected(request)[: len(out.tokens)]
        else:
            assert out.tokens == self.expected(request)
            assert out.finish_reason in ("stop", "length")

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data):
        id = data.draw(st.sampled_from(sorted(self.live)))
        assert self.engine.cancel(id) == (id not in self.cancelled)
        self.cancelled.add(id)

    @precondition(lambda self: self.engine._scheduler.active)
    @rule()
    def preempt(self):
        self.engine._scheduler.preempt(self.engine._scheduler.active[-1])

    @rule()
    def update_params(self):
        self.engine.update_params(self.engine._params, self.engine.version + 1)
        assert self.engine.stats.pages_free == self.engine.stats.pages

    @invariant()
    def pages_are_free_cached_or_held(self):
        scheduler = self.engine._scheduler
        pool = scheduler.pool
        held = [page for answer in scheduler.active for page in answer.pages]
        assert len(set(held)) == pool.held and all(
            len(set(a.pages)) == len(a.pages) for a in scheduler.active
        )
        assert all(pool.is_registered(page) for page in held if held.count(page) > 1)
        assert pool.free + pool.cached + pool.held == pool.total
        assert all(not answer.pages and answer.row < 0 for answer in scheduler.waiting)
        rows = [answer.row for answer in scheduler.active]
        assert len(rows) == len(set(rows)) <= self.engine.config.max_rows
        for answer in scheduler.active:
            size = self.engine.config.page_size
            assert answer.computed <= len(answer.pages) * size and answer.computed <= answer.length
            table = scheduler._table.page_table[answer.row]
            assert table[: len(answer.pages)].tolist() == answer.pages
            assert set(table[len(answer.pages) :].tolist()) <= {scheduler.pool.total}

    @invariant()
    def queue_and_batch_are_in_order_of_arrival(self):
        for sequences in (self.engine._scheduler.active, self.engine._scheduler.waiting):
            assert [a.number for a in sequences] == sorted(a.number for a in sequences)

    def teardown(self):
        for _ in range(1000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.live and not self.engine.has_work
        assert self.engine.stats.pages_free == self.engine.stats.pages


@pytest.fixture(scope="module")
def expected(make_engine):
    engine, known = make_engine(), {}

    def tokens(request):
        key = (request.prompt, request.sampling)
        if key not in known:
            known[key] = engine.generate([request])[0].tokens
        return known[key]

    return tokens


def test_any_order_of_adding_cancelling_preempting_and_updating_keeps_the_invariants(engine, expected):
    assert jax.tree.leaves(engine._params)
    machine = type("Machine", (EngineMachine,), {"engine": engine, "expected": staticmethod(expected)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

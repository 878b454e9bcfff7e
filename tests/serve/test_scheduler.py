"""The parts of scheduling that need no model."""

import numpy as np
import pytest

from serve import Request, SamplingParams
from serve.engine_config import EngineConfig
from serve.plan import chunk_of
from serve.scheduler import Scheduler
from serve.sequence import Sequence


def sequence(number, prompt_tokens, max_tokens=8):
    request = Request([1 + number] * prompt_tokens, SamplingParams())
    return Sequence(request, f"a{number}", number, number, max_tokens, (), None)


@pytest.fixture
def scheduler(cfg):
    config = EngineConfig(
        max_rows=3, page_size=4, num_pages=16, max_length=64, prefill_chunk=16, chunk_buckets=(4,)
    )
    return Scheduler(config.resolve(cfg), cfg.vocab_size)


@pytest.mark.parametrize("buckets", [(32, 256), (32, 256, 2048), (16,), (8, 64, 100)])
def test_chunks_cover_a_prompt_and_pad_it_to_less_than_twice_its_length(buckets):
    for tokens in range(1, 3 * buckets[-1]):
        left, computed = tokens, 0
        while left > 0:
            chunk = chunk_of(left, buckets)
            assert chunk in buckets
            left, computed = left - chunk, computed + chunk
        assert tokens <= computed <= max(2 * tokens, buckets[0])


def test_a_request_that_does_not_fit_is_not_overtaken_by_one_that_would(scheduler):
    first, large, small = sequence(0, 40), sequence(1, 30), sequence(2, 4)
    for one in (first, large, small):
        scheduler.add(one)
    scheduler.admit()
    assert scheduler.active == [first] and scheduler.waiting == [large, small]
    scheduler.remove(first)
    scheduler.admit()
    assert scheduler.active == [large, small]


def test_prefill_batches_many_rows_in_chunks_and_decode_takes_those_that_are_done(scheduler):
    long, short = sequence(0, 21), sequence(1, 3)
    scheduler.add(long)
    scheduler.add(short)
    scheduler.admit()
    batch = scheduler.next_prefill()
    assert batch.sequences == [long, short] and batch.counts == [16, 3]
    assert batch.tokens.shape == (3, 16) and batch.count.tolist() == [16, 3, 0]
    np.testing.assert_array_equal(batch.rows.length, [0, 0, 0])
    long.computed, short.computed = 16, 3
    short.tokens.append(7)
    assert scheduler.catching_up() == [long]
    decode = scheduler.next_decode(scheduler.decoding(), 4)
    assert decode.sequences == [short] and decode.token[0] == 7 and decode.budget[0] == 4
    assert scheduler.next_prefill().counts == [4]


def test_a_burst_ends_at_max_tokens_and_at_the_last_free_page(scheduler):
    one, two = sequence(0, 4, max_tokens=3), sequence(1, 52, max_tokens=60)
    for each in (one, two):
        scheduler.add(each)
    scheduler.admit()
    assert scheduler.pool.available == 2
    for each in (one, two):
        each.computed = each.length
        each.tokens.append(5)
    batch = scheduler.next_decode(scheduler.decoding(), 8)
    assert batch.budget[:2].tolist() == [2, 4] and batch.steps == 4 and scheduler.pool.available == 0

"""Requests that begin with the same tokens share pages, and get the tokens that they would get alone."""

import dataclasses

import jax
import numpy as np
import pytest

from model import Block, RMSNorm, init
from model.blocks.latent_attention import LatentAttention
from model.blocks.mamba2 import Mamba2
from serve import Engine, Request, SamplingParams

PREFIX = np.random.default_rng(1).integers(4, 320, 22).tolist()  # five whole pages of 4, and half of one
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)


def ask(engine, *tails, **options):
    before = engine.stats
    outputs = engine.generate([Request([*PREFIX, *tail], GREEDY, **options) for tail in tails])
    after = engine.stats
    return outputs, after.prefix_hits - before.prefix_hits, after.prefix_queries - before.prefix_queries


@pytest.fixture(scope="module")
def uncached(make_engine):
    """Answers of an engine that caches no prefix, each alone."""
    engine = make_engine(prefix_cache=False)

    def serve(*tails):
        outputs = [engine.generate([Request([*PREFIX, *tail], GREEDY)])[0] for tail in tails]
        assert engine.stats.prefix_hits == engine.stats.prefix_queries == engine.stats.pages_cached == 0
        return outputs

    return serve


def same(found, wanted):
    assert [out.tokens for out in found] == [out.tokens for out in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-6)


def test_a_prefix_is_computed_once_and_changes_no_answer(make_engine, uncached):
    engine, tails = make_engine(), [[7], [8, 9, 10], [7, 8], []]
    first, hits, queries = ask(engine, tails[0])
    assert (hits, queries) == (0, 23) and first[0].cached_tokens == 0
    others, hits, queries = ask(engine, *tails[1:])
    assert (hits, queries) == (3 * 20, 25 + 24 + 22)
    assert [out.cached_tokens for out in others] == [20, 20, 20]
    same(first + others, uncached(*tails))
    assert engine.stats.pages_free == engine.stats.pages and engine.stats.pages_cached > 5


def test_requests_that_come_together_wait_for_the_one_that_computes_their_prefix(make_engine, uncached):
    engine, tails = make_engine(), [[7], [8], [9], [10]]
    outputs, hits, _ = ask(engine, *tails)
    assert hits == 3 * 20
    same(outputs, uncached(*tails))


def test_a_prompt_of_whole_pages_still_computes_its_last_token(make_engine, uncached):
    engine = make_engine()
    for hits in (0, 20):  # the sixth page has the token with the logits of the answer
        outputs, found, _ = ask(engine, [5, 6])
        assert found == hits
    same(outputs, uncached([5, 6]))


def test_an_answer_is_part_of_the_prefix_of_the_next_turn(make_engine, uncached):
    engine = make_engine()
    [[out], _, _] = ask(engine, [])
    tail = [*out.tokens, 11, 12]
    [again, hits, _] = ask(engine, tail)
    assert hits == (22 + 7) // 4 * 4  # the last token of an answer is never computed
    same(again, uncached(tail))


def test_another_salt_or_new_parameters_find_nothing(make_engine, uncached, params):
    engine = make_engine()
    ask(engine, [7])
    assert ask(engine, [7], cache_salt="tenant")[1] == 0
    assert ask(engine, [7], cache_salt="tenant")[1] == ask(engine, [7])[1] == 20
    engine.update_params(params, 1)
    assert engine.stats.pages_cached == 0
    outputs, hits, _ = ask(engine, [7])
    assert hits == 0
    same(outputs, uncached([7]))


def test_a_preempted_request_finds_its_own_pages_again(make_engine, uncached):
    engine = make_engine()
    id, outputs = engine.submit(Request(PREFIX, GREEDY)), []
    for _ in range(3):
        outputs += engine.step()
    [sequence] = engine._scheduler.active
    computed = sequence.computed
    engine._scheduler.preempt(sequence)
    engine._scheduler.admit()
    assert sequence.computed == computed // 4 * 4 >= 20
    while engine.has_work:
        outputs += engine.step()
    assert outputs[-1].id == id
    same(outputs[-1:], uncached([]))


def test_pages_whose_logits_were_not_finite_are_never_found(make_engine, params):
    engine = make_engine(params | {"embedding": params["embedding"].at[99].set(np.nan)})
    for _ in range(2):
        [outputs, hits, _] = ask(engine, [99] * 6)
        assert outputs[0].finish_reason == "error" and hits in (0, 16)
    outputs, _, _ = ask(engine, [98] * 6)
    assert outputs[0].finish_reason == "length" and np.all(np.isfinite(outputs[0].logprobs))


def test_a_full_cache_evicts_and_goes_on(make_engine, uncached):
    engine = make_engine()
    rng = np.random.default_rng(2)
    for _ in range(12):
        engine.generate([Request(rng.integers(4, 320, 40).tolist(), GREEDY)])
        assert engine.stats.pages_free == engine.stats.pages
    same(ask(engine, [7])[0], uncached([7]))


def test_states_of_whole_rows_are_not_shared(cfg, tokenizer):
    recurrent = Block(Mamba2(4, 6, 5), cfg.blocks[0].ffn, RMSNorm())
    cfg = cfg.replace(blocks=(recurrent, cfg.blocks[1]))
    params = init(cfg, jax.random.key(1))
    with pytest.raises(ValueError, match="prefix_cache=True.*recurrent"):
        Engine(cfg, params, tokenizer, prefix_cache=True)
    assert not Engine(cfg, params, tokenizer, max_rows=1).config.prefix_cache


@pytest.mark.parametrize("kind", ["window", "latent"])
def test_pages_of_windows_and_latent_attention_are_shared_too(cfg, tokenizer, kind):
    block = cfg.blocks[0]
    mixer = (
        LatentAttention(4, 6, 4, 5, kv_rank=12)
        if kind == "latent"
        else dataclasses.replace(block.mixer, window=9)
    )
    cfg = cfg.replace(blocks=(dataclasses.replace(block, mixer=mixer), cfg.blocks[1]))
    params = init(cfg, jax.random.key(2))
    sizes = {"max_rows": 4, "page_size": 4, "row_buckets": (4,), "chunk_buckets": (16,), "prefill_chunk": 16}
    engines = [Engine(cfg, params, tokenizer, **sizes, prefix_cache=cached) for cached in (True, False)]
    tails = [[7], [8, 9, 10], [11] * 9]
    found, hits, _ = ask(engines[0], *tails)
    assert hits == 2 * 20
    wanted = [ask(engines[1], tail)[0][0] for tail in tails]
    assert [out.tokens for out in found] == [out.tokens for out in wanted]


def test_a_hit_changes_no_bit_where_the_programs_are_the_same(make_engine):
    """One bucket of rows and of context. With other shapes a product may add up in another order."""
    sizes = {"row_buckets": (4,), "context_buckets": (64,), "chunk_buckets": (16,)}
    cached, plain = make_engine(**sizes), make_engine(**sizes, prefix_cache=False)
    tails = [[7], [8, 9, 10], [7, 8], [11] * 9]
    found, hits, _ = ask(cached, *tails)
    assert hits == 3 * 20
    for tail, ours in zip(tails, found, strict=True):
        theirs = plain.generate([Request([*PREFIX, *tail], GREEDY)])[0]
        assert (ours.tokens, ours.logprobs, ours.top_logprobs) == (
            theirs.tokens,
            theirs.logprobs,
            theirs.top_logprobs,
        )

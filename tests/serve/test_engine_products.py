"""Whatever is switched on together, greedy tokens are those of the request alone.

Prefix hits, chunks, preemptions, drafts, adapters, grammars and quantized weights, drawn together by hypothesis and
compared with an engine that has none of them and serves one request at a time.
"""

import json

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import quantize
from model.adapters import add_adapters
from model.blocks.lora import LoRA
from model.formats.peft import save_adapter
from serve import Engine, Grammar, Request, SamplingParams

SIZES = {"max_rows": 4, "page_size": 4, "decode_steps": 5, "row_buckets": (4,), "context_buckets": (64,)}
SCHEMA = {"type": "object", "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 999}}}
SCHEMA |= {"required": ["count"], "additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
GRAMMARS = (
    None,
    None,
    Grammar("regex", "([abc]{2} ){3,9}"),
    Grammar("json_schema", json.dumps(SCHEMA)),
)
ADAPTERS = (None, "low", "high")
DRAFTS = ("lookup", "right", "wrong", "half")
# Repeats, so that lookup finds drafts.
PREFIX = np.random.default_rng(3).integers(4, 320, 6).tolist() * 3


@pytest.fixture(scope="module")
def folders(cfg, params, tmp_path_factory):
    found = {}
    for rank, name in ((2, "low"), (5, "high")):
        adapted_cfg, adapted = add_adapters(cfg, params, LoRA(rank, 4.0), jax.random.key(rank))
        noise = lambda path, x, s=rank: (
            x + 0.3 * np.random.default_rng(s).normal(size=x.shape).astype(x.dtype)
            if str(path[-1].key).endswith("_lora_b")
            else x
        )
        found[name] = tmp_path_factory.mktemp(name)
        save_adapter(found[name], adapted_cfg, jax.tree_util.tree_map_with_path(noise, adapted))
    return found


@pytest.fixture(scope="module")
def engines(cfg, params, tokenizer, folders):
    """{quantized: (plain engine, engine with everything)}; both have the adapters."""
    found = {}
    for quantized in (False, True):
        weights = quantize(cfg, params, "int8", 16) if quantized else params
        adapters = {"adapter_slots": 2, "adapter_rank": 5}
        plain = Engine(cfg, weights, tokenizer, **SIZES, **adapters, prefix_cache=False, chunk_buckets=(64,))
        full = Engine(
            cfg,
            weights,
            tokenizer,
            **SIZES | {"num_pages": 26},
            **adapters,
            draft_tokens=3,
            chunk_buckets=(8,),
            prefill_chunk=8,
        )
        for name, folder in folders.items():
            plain.load_adapter(name, folder)
            full.load_adapter(name, folder)
        found[quantized] = plain, full
    return found


@pytest.fixture(scope="module")
def alone(engines):
    known = {}

    def tokens(quantized, request):
        key = quantized, request
        if key not in known:
            known[key] = engines[quantized][0].generate([request])[0]
        return known[key]

    return tokens


@st.composite
def a_request(draw):
    shared = draw(st.integers(0, len(PREFIX)))
    tail = draw(st.lists(st.integers(4, 12), min_size=0 if shared else 1, max_size=8))
    sampling = SamplingParams(
        temperature=0,
        max_tokens=draw(st.integers(1, 16)),
        ignore_eos=True,
        grammar=draw(st.sampled_from(GRAMMARS)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.4])),
    )
    return Request((*PREFIX[:shared], *tail), sampling, adapter=draw(st.sampled_from(ADAPTERS)))


def draft_as(sequence, kind, wanted):
    """Replace the drafts of a sequence by the right tokens, by wrong ones, or by one right and then wrong ones."""

    def propose(count):
        right = wanted[len(sequence.tokens) :][:count]
        keep = {"right": count, "wrong": 0, "half": 1}[kind]
        return [token if i < keep else (token + 1) % 320 for i, token in enumerate(right)]

    sequence.draft_index.propose = propose


SEEN = {"hits": 0, "preemptions": 0, "accepted": 0, "rejected": 0}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(st.tuples(a_request(), st.sampled_from(DRAFTS)), min_size=1, max_size=7),
    quantized=st.booleans(),
)
def check_products(engines, alone, requests, quantized):
    kinds, requests = [kind for _, kind in requests], [request for request, _ in requests]
    engine = engines[quantized][1]
    before, ids, done, steps = engine.stats, [engine.submit(request) for request in requests], {}, 0
    engine._speculation.payoff.pays = lambda *_: True
    for id, kind, request in zip(ids, kinds, requests, strict=True):
        if kind != "lookup":
            draft_as(engine._sequences[id], kind, alone(quantized, request).tokens)
    while len(done) < len(ids):
        done |= {out.id: out for out in engine.step() if out.finished}
        steps += 1
        if steps % 3 == 0 and engine._scheduler.active:
            engine._scheduler.preempt(engine._scheduler.active[-1])
        pool = engine._scheduler.pool
        assert pool.free + pool.cached + pool.held == pool.total
    for id, request in zip(ids, requests, strict=True):
        wanted = alone(quantized, request)
        assert (done[id].tokens, done[id].finish_reason) == (wanted.tokens, wanted.finish_reason)
        np.testing.assert_allclose(done[id].logprobs, wanted.logprobs, atol=2e-4)
    after = engine.stats
    assert after.pages_free == after.pages
    SEEN["hits"] += after.prefix_hits - before.prefix_hits
    SEEN["preemptions"] += after.preemptions - before.preemptions
    accepted = after.accepted_tokens - before.accepted_tokens
    SEEN["accepted"] += accepted
    SEEN["rejected"] += after.draft_tokens - before.draft_tokens - accepted


def test_greedy_tokens_are_those_of_the_request_alone_whatever_is_switched_on(engines, alone):
    check_products(engines, alone)
    assert all(SEEN.values()), SEEN

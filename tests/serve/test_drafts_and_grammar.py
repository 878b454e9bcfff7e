"""Drafts change no greedy token, and constrained output matches, alone and with others, with drafts and without."""

import json
import re

import numpy as np
import pytest

from serve import Request, RequestError, SamplingParams
from serve.grammar import GrammarCompiler
from serve.logits import all_allowed
from serve.request import Grammar

RNG = np.random.default_rng(0)
REPEATING = [[*RNG.integers(4, 320, 6).tolist() * 3, *tail] for tail in ([9], [10, 11], [])]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Paris", "page"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # a random model would write spaces for ever
}


@pytest.fixture(scope="module")
def drafting(make_engine):
    return make_engine(draft_tokens=3)


def test_greedy_tokens_with_drafts_are_those_without(make_engine, drafting):
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    requests = [Request(prompt, greedy) for prompt in REPEATING]
    plain = make_engine()
    alone = [plain.generate([request])[0] for request in requests]
    together = drafting.generate(requests)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    stats = drafting.stats
    assert stats.drafts > 0 and stats.draft_tokens >= stats.drafts
    assert sum(stats.accepted_per_position) == stats.accepted_tokens <= stats.draft_tokens


def test_drafts_that_are_all_wrong_change_nothing(make_engine, monkeypatch):
    engine = make_engine(draft_tokens=3)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    wanted = make_engine().generate([Request(REPEATING[0], greedy)])[0].tokens
    monkeypatch.setattr("serve.drafters.NgramIndex.propose", lambda self, count: [7] * count)
    assert 7 not in wanted
    found = engine.generate([Request(REPEATING[0], greedy)])[0]
    assert found.tokens == wanted and engine.stats.drafts > 0 and engine.stats.accepted_tokens == 0


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("drafts", [0, 3])
def test_what_a_grammar_constrains_matches_it_in_a_batch_with_others(
    make_engine, tokenizer, temperature, drafts
):
    engine = make_engine(draft_tokens=drafts)
    grammars = [
        Grammar("json_schema", json.dumps(SCHEMA)),
        Grammar("regex", "[ab]{3,5}-[0-9]"),
        Grammar("choice", ("yes", "no", 'it "depends"')),
        None,
    ]
    ask = lambda grammar, seed: Request(
        tokenizer.encode("What is it? "),
        SamplingParams(temperature=temperature, max_tokens=40, seed=seed, grammar=grammar),
        detokenize=True,
    )
    for seed in range(3):
        told = engine.generate([ask(grammar, seed) for grammar in grammars])
        assert [out.finish_reason for out in told[:3]] == ["stop"] * 3
        found = json.loads(told[0].text)
        assert (
            set(found) == {"name", "count"}
            and found["name"] in ("Paris", "page")
            and 0 <= found["count"] <= 99
        )
        assert re.fullmatch("[ab]{3,5}-[0-9]", told[1].text)
        assert told[2].text in ("yes", "no", 'it "depends"')
        alone = engine.generate([ask(grammars[0], seed)])[0]
        assert alone.tokens == told[0].tokens


@pytest.mark.parametrize("vocab_size", [320, 321, 324, 352])
def test_a_mask_has_a_bit_for_each_token_of_the_model_whatever_their_number(tokenizer, vocab_size):
    assert tokenizer.vocab_size <= 320
    matcher = GrammarCompiler(tokenizer, vocab_size).compile(Grammar("choice", ("a",)))
    for after in ([], tokenizer.encode("a")):
        mask = matcher.mask(after)
        assert mask.shape == all_allowed(vocab_size=vocab_size).shape
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        assert set(allowed.tolist()) == (set(tokenizer.eos_ids) if after else set(tokenizer.encode("a")))


def test_grammars_that_are_wrong_or_too_large_are_refused_and_the_engine_lives(engine, tokenizer):
    ask = lambda kind, source: Request(
        tokenizer.encode("x"), SamplingParams(max_tokens=4, grammar=Grammar(kind, source))
    )
    for kind, source in (
        ("json_schema", "{not json"),
        ("json_schema", '{"type": "unheard of"}'),
        ("regex", "(" * 50),
        ("lark", "start: missing"),
        ("regex", "a" * 300_000),
    ):
        with pytest.raises(RequestError, match="can't be compiled|at most 262144"):
            engine.submit(ask(kind, source))
    with pytest.raises(RequestError, match="min_tokens"):
        sampling = SamplingParams(min_tokens=2, grammar=Grammar("choice", ("yes",)))
        engine.submit(Request(tokenizer.encode("x"), sampling))
    bomb = engine.generate([ask("regex", "((((a{1,1000}){1,1000}){1,1000}){1,1000})")])[
        0
    ]  # compiled as far as it is read
    assert set(tokenizer.decode(bomb.tokens[:1])) == {"a"}
    out = engine.generate([ask("choice", ("a",))])[0]
    assert out.finish_reason in ("stop", "length")

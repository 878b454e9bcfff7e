"""What outputs say beside their tokens: log-probabilities of prompts, of the distribution drawn from, and several
outputs to one prompt; and how drafts fare when tokens are drawn."""

import threading
import time

import jax
import numpy as np
import pytest

from model import apply
from serve import Request, RequestError, SamplingParams
from serve.request import choices

RNG = np.random.default_rng(4)
PROMPT = RNG.integers(4, 320, 30).tolist()


@pytest.fixture(scope="module")
def logits_of(cfg, params):
    forward = jax.jit(lambda tokens: apply(cfg, params, tokens).logits)

    def logits(tokens):
        padded = np.zeros((1, cfg.max_length), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(padded))[0, : len(tokens)].astype(np.float64)

    return logits


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def scoring(make_engine):
    return make_engine(prompt_logprobs=True)


def test_log_probabilities_of_a_prompt_are_those_of_the_full_forward_pass(scoring, logits_of):
    """In several chunks, beside requests that want none, again with its prefix in the cache, and without an answer."""
    wanted = log_softmax(logits_of(PROMPT))
    for max_tokens in (3, 3, 0):
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=2)
        other = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        out, beside = scoring.generate([Request(PROMPT, sampling), Request(PROMPT[:9], other)])
        assert len(out.tokens) == max_tokens and out.finish_reason == "length"
        place = np.arange(len(PROMPT) - 1)
        np.testing.assert_allclose(out.prompt_logprobs, wanted[place, PROMPT[1:]], atol=1e-5)
        for alternatives, row in zip(out.prompt_top_logprobs, wanted[:-1], strict=True):
            assert [token for token, _ in alternatives] == np.argsort(-row)[:2].tolist()
        assert beside.prompt_logprobs == beside.prompt_top_logprobs == [] and len(beside.tokens) == 3
    with pytest.raises(RequestError, match="max_tokens"):
        SamplingParams(max_tokens=0)


def test_a_preempted_prompt_is_scored_once(scoring, logits_of):
    sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=0)
    scoring.submit(Request(PROMPT, sampling))
    scoring.step()  # the first of two chunks
    scoring._scheduler.preempt(scoring._scheduler.active[0])
    outputs = []
    while scoring.has_work:
        outputs += scoring.step()
    wanted = log_softmax(logits_of(PROMPT))[np.arange(29), PROMPT[1:]]
    np.testing.assert_allclose(outputs[-1].prompt_logprobs, wanted, atol=1e-5)


def processed(logits, sampling, prompt, output):
    """(log-probabilities of the distribution to draw from, mass that filters keep), by definition."""
    x = logits.copy()
    for token in {*prompt, *output}:
        x[token] = (
            x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
        )
    for token in set(output):
        x[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    for token, bias in sampling.logit_bias:
        x[token] += bias
    x[320:] = -np.inf
    logprobs = log_softmax(x / (sampling.temperature or 1.0))
    if sampling.temperature == 0:
        kept = logprobs == logprobs.max()
    else:
        order = np.argsort(-logprobs)
        kept = np.zeros(len(x), bool)
        kept[order[: sampling.top_k or None]] = True
        renormalized = np.where(kept, np.exp(logprobs), 0) / np.exp(logprobs[kept]).sum()
        kept[order[int(np.sum(np.cumsum(renormalized[order]) < sampling.top_p)) + 1 :]] = False
    mass = np.exp(logprobs[kept]).sum()
    return np.where(kept, logprobs - np.log(mass), -np.inf), mass


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.7, "seed": 1},
        {"temperature": 1.2, "repetition_penalty": 1.7, "frequency_penalty": 0.4, "seed": 2},
        {"temperature": 1.0, "presence_penalty": 5.0, "top_k": 4, "logit_bias": {7: 3.0, 8: 4.0}, "seed": 3},
    ],
)
def test_processed_log_probabilities_and_kept_mass_are_those_of_the_distribution_drawn_from(
    engine, logits_of, options
):
    sampling = SamplingParams(max_tokens=16, ignore_eos=True, **options)
    out = engine.generate([Request(PROMPT, sampling)])[0]
    logits = logits_of([*PROMPT, *out.tokens])[len(PROMPT) - 1 : -1]
    for i, token in enumerate(out.tokens):
        logprobs, mass = processed(logits[i], sampling, PROMPT, out.tokens[:i])
        assert out.processed_logprobs[i] == pytest.approx(logprobs[token], abs=2e-4)
        assert out.kept_mass[i] == pytest.approx(mass, abs=2e-4)
    assert out.cumulative_logprob == pytest.approx(sum(out.logprobs))


def test_choices_are_the_requests_of_consecutive_seeds_and_share_the_prompt(make_engine):
    engine = make_engine()
    request = Request(PROMPT, SamplingParams(max_tokens=6, seed=2**64 - 2, ignore_eos=True), id="x")
    several = choices(request, 3)
    assert [(one.id, one.sampling.seed) for one in several] == [
        ("x-0", 2**64 - 2),
        ("x-1", 2**64 - 1),
        ("x-2", 0),
    ]
    outputs = engine.generate(several)
    assert engine.stats.prefix_hits == 2 * 28 and len({tuple(out.tokens) for out in outputs}) == 3
    for one, out in zip(several, outputs, strict=True):
        alone = make_engine(prefix_cache=False).generate([one])[0]
        assert alone.tokens == out.tokens


def test_the_least_length_and_forbidden_words_hold_for_every_token(engine):
    greedy = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    free = engine.generate([Request(PROMPT, SamplingParams(**greedy))])[0].tokens
    least = SamplingParams(**greedy, stop_token_ids=(free[1],), min_tokens=6)
    out = engine.generate([Request(PROMPT, least)])[0]
    assert len(out.tokens) >= 6 and free[1] not in out.tokens[:6]
    pair = (free[2], free[3])
    out = engine.generate([Request(PROMPT, SamplingParams(**greedy, bad_words_ids=(pair, (free[0],))))])[0]
    assert free[0] not in out.tokens and pair not in list(zip(out.tokens, out.tokens[1:], strict=False))


def test_drawn_tokens_are_the_same_with_drafts_which_are_accepted_as_often_as_the_model_says(
    make_engine, params, monkeypatch
):
    """The rule of speculative decoding accepts a named token with its probability, 1 minus the total variation between
    it and the model."""
    sharp = params | {"head": params["head"] * 6}
    engines = make_engine(sharp), make_engine(sharp, draft_tokens=3)
    requests = [
        Request(PROMPT[:9], SamplingParams(max_tokens=3, seed=seed, ignore_eos=True, logprobs=1))
        for seed in range(300)
    ]
    plain = engines[0].generate(requests)
    likeliest = {out.id: out.top_logprobs[1][0] for out in plain}
    monkeypatch.setattr("serve.drafters.Payoff.pays", lambda *_: True)
    monkeypatch.setattr("serve.drafters.NgramIndex.record", lambda *_: None)
    ids = []
    for request in requests:
        ids.append(engines[1].submit(request))
        guess = likeliest[plain[len(ids) - 1].id][0]
        index = engines[1]._sequences[ids[-1]].draft_index
        monkeypatch.setattr(index, "propose", lambda count, guess=guess: [guess][:count])
    done = {}
    while engines[1].has_work:
        done |= {out.id: out.tokens for out in engines[1].step() if out.finished}
    assert [done[id] for id in ids] == [out.tokens for out in plain]
    p = np.exp([logprob for _, logprob in likeliest.values()])
    accepted = engines[1].stats.accepted_tokens
    assert accepted == sum(out.tokens[1] == likeliest[out.id][0] for out in plain)
    assert abs(accepted - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum()) and 30 < accepted < 270


def test_a_chunk_is_as_long_as_a_burst_may_be_while_others_wait_for_their_next_token(make_engine):
    engine = make_engine(burst_seconds=0.05, chunk_buckets=(4,), prefill_chunk=16)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine.submit(Request([5, 6, 7], sampling, id="stream"))
    engine.step()
    engine._seconds_per_token = 0.01  # 5 tokens in the time of a burst
    engine.submit(Request(PROMPT, sampling, id="long"))
    computed = []
    while (long := engine._sequences["long"]).computed < 28:
        new = {out.id: len(out.new_tokens) for out in engine.step()}
        assert new == {"stream": 1}
        computed.append(long.computed)
        engine._seconds_per_token = 0.01
    assert computed == [4, 8, 12, 16, 20, 24, 28]
    assert engine._most_prefill_tokens(False) == 25  # with nobody to wait, five times as long
    engine.abort("done")


def test_the_first_answer_needs_one_program_while_others_compile_behind_it(make_engine, monkeypatch):
    """The programs of this size are this test's own, so that none is compiled before."""
    sizes = {
        "max_rows": 2,
        "row_buckets": (1,),
        "num_pages": 23,
        "chunk_buckets": (4,),
        "context_buckets": (64,),
    }
    sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    requests = [Request(PROMPT[:n], sampling) for n in (6, 30, 3)]
    wanted = [out.tokens for out in make_engine().generate(requests)]
    engine, go_on, compiled = make_engine(**sizes), threading.Event(), []
    steps = engine._runner._steps
    lower = steps.lower

    def slow_lower(kind, *shape):
        if (
            kind,
            *shape,
        ) != engine.config.first_shape and threading.current_thread() is not threading.main_thread():
            assert go_on.wait(60)
        compiled.append((kind, *shape))
        return lower(kind, *shape)

    monkeypatch.setattr(steps, "lower", slow_lower)
    engine.warmup(wait=False)
    assert [out.tokens for out in engine.generate(requests)] == wanted
    assert compiled == [engine.config.first_shape] == [("prefill", 1, 4, 16)]
    go_on.set()
    while engine._runner._warming:
        time.sleep(0.01)
    assert sorted(compiled) == sorted(engine.config.shapes())
    assert [out.tokens for out in engine.generate(requests)] == wanted and engine._runner._sealed

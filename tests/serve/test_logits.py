"""Edits of logits are a brute force's, token by token."""

import jax
import numpy as np
import pytest

from serve import Request, RequestError, SamplingParams
from serve.logits import RowEdits, all_allowed, edit_logits, ends_of_bad_words, forbid

V, R, H = 70, 5, 12


def drawn(rng, row, history):
    if row == 0:
        return SamplingParams(temperature=0)
    bias = {int(t): float(rng.normal()) for t in rng.choice(V, 3, replace=False)}
    return SamplingParams(
        repetition_penalty=float(rng.uniform(0.5, 2)),
        presence_penalty=float(rng.normal()),
        frequency_penalty=float(rng.normal()),
        logit_bias=bias,
        min_tokens=int(rng.integers(0, 6)),
        bad_words_ids=((5,), (int(history[-1]), 9)),
    )


def brute_force(logits, sampling, prompt, written, stop):
    """float64 logits of one row, a token at a time."""
    wanted = logits.astype(np.float64)
    for token in {*prompt, *written}:
        penalty = sampling.repetition_penalty
        wanted[token] = wanted[token] / penalty if wanted[token] > 0 else wanted[token] * penalty
    for token in set(written):
        wanted[token] -= sampling.frequency_penalty * written.count(token) + sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        wanted[token] += bias
    if len(written) < sampling.min_tokens:
        wanted[stop] = -np.inf
    for word in sampling.bad_words_ids:
        if len(word) == 1 or (written and written[-1] == word[0]):
            wanted[word[-1]] = -np.inf
    return wanted


@pytest.fixture(scope="module")
def edit():
    return jax.jit(edit_logits)


@pytest.mark.parametrize("seed", range(12))
def test_penalties_bias_forbidden_words_and_least_lengths_are_those_of_a_brute_force(edit, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (R, V)).astype(np.float32)
    history = rng.integers(0, V, (R, H)).astype(np.int32)
    if seed % 2:
        history[:, 3:] = history[:, :1]  # tokens again and again
    length, stop = rng.integers(2, H + 1, R).astype(np.int32), np.full((R, 16), -1, np.int32)
    stop[:, 0] = rng.integers(0, V, R)
    edits, allowed, wanted = RowEdits.none(R), all_allowed(R, vocab_size=V), []
    for row in range(R):
        n, prompt = int(length[row]), int(rng.integers(1, length[row] + 1))
        sampling = drawn(rng, row, history[row, :n])
        edits.set(row, sampling, prompt)
        written = history[row, prompt:n].tolist()
        forbid(allowed[row], ends_of_bad_words(sampling.bad_words_ids, written))
        wanted.append(
            brute_force(logits[row], sampling, history[row, :prompt].tolist(), written, stop[row, 0])
        )
    found = np.asarray(edit(logits, edits, stop, history, length, allowed))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_array_equal(found[0], logits[0])


def test_what_names_no_token_or_needs_what_the_engine_lacks_is_refused(engine):
    for options, field in (
        ({"logit_bias": {320: 1.0}}, "logit_bias"),
        ({"bad_words_ids": ((4, 999),)}, "bad_words_ids"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ):
        with pytest.raises(RequestError, match=field):
            engine.submit(Request([5, 6], SamplingParams(**options)))
    with pytest.raises(RequestError, match="no adapter named 'pirate'"):
        engine.submit(Request([5, 6], SamplingParams(), adapter="pirate"))
    assert not engine.has_work

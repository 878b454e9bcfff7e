"""Sampling on the device against sorting in numpy and against the distribution itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.sampling import RowSampling, _draw, _filter, sample

V = 50


def row_sampling(
    rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, seeds=None, alternatives=0
):
    full = lambda value, dtype: np.full(rows, value, dtype)
    seeds = np.arange(rows) if seeds is None else seeds
    return RowSampling(
        full(temperature, np.float32),
        full(top_k, np.int32),
        full(top_p, np.float32),
        full(min_p, np.float32),
        full(typical_p, np.float32),
        np.stack([np.zeros(rows), seeds], axis=1).astype(np.uint32),
        full(alternatives, np.int32),
    )


def kept_by_sorting(logits, top_k, top_p, min_p):
    """What the three filters keep of one row, by their definitions."""
    logits = logits.astype(np.float64)
    order = np.argsort(-logits, kind="stable")
    keep = order[: top_k or None]
    probs = np.exp(logits[keep] - logits.max())
    mass = np.cumsum(probs / probs.sum())
    if top_p < 1:
        keep = keep[: int(np.sum(mass < top_p)) + 1]
    probs = np.exp(logits - logits.max())
    return {int(token) for token in keep if probs[token] >= min_p}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.sampled_from([0, 1, 2, 7, V, 1000]),
    top_p=st.sampled_from([0.01, 0.3, 0.72, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.41, 1.0]),
    scale=st.sampled_from([0.1, 2.0, 30.0]),
)
def test_filters_keep_what_sorting_keeps(seed, top_k, top_p, min_p, scale):
    logits = np.random.default_rng(seed).normal(size=(4, V)).astype(np.float32) * scale
    filtered = np.asarray(jax.jit(_filter)(logits, row_sampling(4, 1.0, top_k, top_p, min_p)))
    for row, result in zip(logits, filtered, strict=True):
        assert set(np.flatnonzero(np.isfinite(result)).tolist()) == kept_by_sorting(row, top_k, top_p, min_p)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    typical_p=st.sampled_from([0.05, 0.4, 0.9]),
    top_k=st.sampled_from([0, 9]),
    scale=st.sampled_from([0.3, 3.0]),
)
def test_typical_sampling_keeps_the_tokens_closest_to_the_entropy(seed, typical_p, top_k, scale):
    logits = np.random.default_rng(seed).normal(size=(1, V)).astype(np.float32) * scale
    found = np.isfinite(np.asarray(_filter(logits, row_sampling(1, top_k=top_k, typical_p=typical_p))[0]))
    kept = sorted(kept_by_sorting(logits[0], top_k, 1.0, 0.0))
    logprobs = logits[0, kept].astype(np.float64)
    logprobs -= np.log(np.exp(logprobs).sum())
    order = np.argsort(np.abs(-logprobs - -(np.exp(logprobs) * logprobs).sum()))
    count = int(np.sum(np.cumsum(np.exp(logprobs[order])) < typical_p)) + 1
    assert set(np.flatnonzero(found)) == {kept[i] for i in order[:count]}


def test_filters_are_those_of_each_row():
    logits = np.tile(np.linspace(0, 5, V, dtype=np.float32), (3, 1))
    rows = row_sampling(3).replace(
        top_k=np.array([0, 3, 0], np.int32), top_p=np.array([1, 1, 0.2], np.float32)
    )
    kept = np.isfinite(np.asarray(_filter(logits, rows))).sum(axis=1)
    assert kept.tolist() == [V, 3, len(kept_by_sorting(logits[2], 0, 0.2, 0))]


@pytest.mark.parametrize("size", [2, 7, V])
def test_draws_follow_the_distribution(size):
    draws = 20_000
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32) * 1.5
    logits[0] = -np.inf if size > 2 else logits[0]
    seeds = np.stack([np.zeros(draws), np.arange(draws)], axis=1).astype(np.uint32)
    tokens = np.asarray(jax.jit(_draw)(jnp.tile(logits, (draws, 1)), seeds, jnp.arange(draws) % 13))
    probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    counts = np.bincount(tokens, minlength=size)
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * draws
    chi_squared = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert chi_squared < degrees + 4 * np.sqrt(2 * degrees)  # beyond that once in some ten thousand


@pytest.fixture(scope="module")
def sampler():
    """`sample` of up to 400 rows, one compiled shape for all."""
    compiled = jax.jit(sample, static_argnums=3)

    def run(logits, rows, positions, vocab_size=V - 3):
        R = len(logits)
        grown = jax.tree.map(
            lambda x: np.concatenate([x, np.zeros((400 - R, *x.shape[1:]), x.dtype)]),
            (logits, rows, positions),
        )
        return jax.tree.map(lambda x: np.asarray(x)[:R], compiled(*grown, vocab_size))

    return run


def test_noise_depends_on_seed_and_position_alone(sampler):
    logits = np.random.default_rng(0).normal(size=(6, V)).astype(np.float32)
    rows, positions = row_sampling(6, seeds=np.array([5, 5, 5, 6, 7, 8])), np.array([3, 4, 3, 3, 3, 3])
    together = sampler(logits, rows, positions)
    for i in range(6):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], (logits, rows, positions))
        assert sampler(*one).token[0] == together.token[i]
    same = np.tile(logits[:1], (400, 1))
    by_position = sampler(same, row_sampling(400, seeds=np.full(400, 5)), np.arange(400)).token
    by_seed = sampler(same, row_sampling(400), np.full(400, 3)).token
    assert len(set(by_position.tolist())) > 20 and len(set(by_seed.tolist())) > 20


def test_greedy_takes_the_likeliest_of_the_vocabulary_whatever_the_filters(sampler):
    logits = np.random.default_rng(1).normal(size=(5, V)).astype(np.float32)
    logits[:, V - 3 :] = 50.0
    rows = row_sampling(5, temperature=0.0, top_k=3, top_p=0.1, alternatives=2)
    out = sampler(logits, rows, np.zeros(5, int), V - 3)
    assert out.token.tolist() == logits[:, : V - 3].argmax(1).tolist()
    np.testing.assert_array_equal(out.logprob, out.model_logprob)

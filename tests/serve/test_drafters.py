"""Prompt lookup finds what followed before, and speculation is used where it pays."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve.drafters import NgramIndex, Payoff


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5))
def test_a_guess_is_what_followed_the_last_occurrence_of_the_longest_known_ngram(tokens, count):
    index = NgramIndex()
    index.extend(tokens)
    wanted = []
    for n in (5, 3):
        ends = [i for i in range(n, len(tokens)) if tokens[i - n : i] == tokens[-n:]]
        if len(tokens) >= n and ends:
            longer = list(tokens)
            while len(longer) < ends[-1] + count:  # a period that reaches the end goes on
                longer.append(longer[len(longer) - (len(tokens) - ends[-1])])
            wanted = longer[ends[-1] : ends[-1] + count]
            break
    assert index.propose(count) == wanted


def test_drafts_that_fail_pause_longer_each_time_and_right_ones_end_that():
    index = NgramIndex()
    index.extend([1, 2, 3, 4] * 3)
    pauses = []
    for _ in range(4):
        while index.propose(2):
            index.record(0)
        start = len(index)
        while not index.propose(2):
            index.extend([[1, 2, 3, 4][len(index) % 4]])
        pauses.append(len(index) - start)
    assert pauses == [8, 16, 32, 64]
    for _ in range(3):
        index.record(2)
    assert index.propose(2) and index.mean_accepted > 1


def test_drafts_pay_where_rows_gain_by_the_geometric_mean():
    payoff = Payoff()
    for _ in range(50):
        payoff.record("decode", 4, 1.0)
        payoff.record("verify", 4, 2.0)
    assert payoff.pays(4, [3.0] * 4) and not payoff.pays(4, [1.0] * 4)
    assert not payoff.pays(4, [9.0, 0, 0, 0])  # one row would slow down three
    for seed in range(50):
        expected = np.random.default_rng(seed).uniform(0, 5, 4)
        wanted = np.prod((1 + expected) / 2.0) ** 0.25 > 1.1
        assert payoff.pays(4, expected.tolist()) == wanted


def test_one_slow_step_does_not_end_speculation():
    payoff = Payoff()
    for _ in range(20):
        payoff.record("decode", 1, 1.0)
    payoff.record("verify", 1, 30.0)  # other work ran beside it
    assert payoff.pays(1, [3.0])
    for _ in range(4):
        payoff.record("verify", 1, 2.0)
    assert payoff.pays(1, [3.0]) and not payoff.pays(1, [1.0])


def test_what_did_not_pay_is_tried_again_now_and_then():
    payoff = Payoff()
    for _ in range(9):
        payoff.record("decode", 1, 1.0)
        payoff.record("verify", 1, 9.0)
    tried = []
    for step in range(100):
        assert not payoff.pays(1, [3.0])
        if payoff.tries_again(1):
            tried.append(step)
            payoff.record("verify", 1, 9.0)
    assert tried == [23, 47, 71, 95]

"""Deduplication: true similarity decides, and neither order nor hash luck does."""

import numpy as np
import pytest

from data.dedup import ExactDedup, MinHashDedup, jaccard


def base_text(rng, words=300):
    return [f"w{i}" for i in rng.integers(0, 5000, words)]


def corpus(seed=0, groups=12, copies=4):
    """Texts, some with words changed: a true pair has few changes, a false friend many."""
    rng = np.random.default_rng(seed)
    texts = {}
    for g in range(groups):
        words = base_text(rng)
        for c in range(copies):
            changed = list(words)
            for at in rng.integers(0, len(words), [0, 2, 6, 40][c % 4]):
                changed[at] = f"x{rng.integers(9999)}"
            texts[f"{g:02d}-{c}"] = " ".join(changed)
    return texts


def run(stage, texts):
    return stage.duplicates(
        {k: stage.feature(v) for k, v in texts.items()}, lambda ids: {i: texts[i] for i in ids}
    )


def brute_force(stage, texts):
    """Connected components of all pairs whose shingle sets are similar, by the definition."""

    def shingles(text):
        words = text.lower().split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    sets = {k: shingles(v) for k, v in texts.items()}
    root = {k: k for k in texts}
    changed = True
    while changed:
        changed = False
        for a in texts:
            for b in texts:
                similar = len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= stage.min_jaccard
                low = min(root[a], root[b])
                if a < b and similar and (root[a], root[b]) != (low, low):
                    root[a] = root[b] = low
                    changed = True
    return {k: r for k, r in root.items() if k != r}


@pytest.mark.parametrize("seed", [0, 1])
def test_near_duplicates_equal_a_brute_force_over_all_pairs(seed):
    stage, texts = MinHashDedup(rows=4), corpus(seed)
    assert run(stage, texts) == brute_force(stage, texts)
    assert len(run(stage, texts)) >= 12


def test_neither_order_nor_other_documents_change_the_result():
    stage, texts = MinHashDedup(), corpus()
    wanted = run(stage, texts)
    for seed in range(3):
        names = np.random.default_rng(seed).permutation(sorted(texts)).tolist()
        assert run(stage, {name: texts[name] for name in names}) == wanted
    with_more = texts | {"99-0": "something else entirely, said once"}
    assert run(stage, with_more) == wanted


def test_a_candidate_that_is_not_similar_stays():
    rng = np.random.default_rng(0)
    words = base_text(rng, 400)
    texts = {"a": " ".join(words), "b": " ".join(words[:260] + base_text(rng, 140))}
    eager = MinHashDedup(bands=64, rows=1)
    shared = set(np.frombuffer(eager.feature(texts["a"]), "<u8")) & set(
        np.frombuffer(eager.feature(texts["b"]), "<u8")
    )
    assert shared and run(eager, texts) == {}
    assert run(MinHashDedup(bands=64, rows=1, min_jaccard=0.2), texts) == {"b": "a"}


def test_the_share_of_equal_minima_estimates_jaccard():
    stage = MinHashDedup(bands=2000, rows=1)
    rng = np.random.default_rng(3)
    words = base_text(rng, 500)
    for cut in (50, 200, 400):
        a, b = " ".join(words), " ".join(words[cut:] + base_text(rng, cut))
        equal = np.frombuffer(stage.feature(a), "<u8") == np.frombuffer(stage.feature(b), "<u8")
        assert abs(equal.mean() - jaccard(stage.shingles(a), stage.shingles(b))) < 0.04


def test_long_documents_keep_the_same_shingles_as_their_twins():
    stage = MinHashDedup(max_shingles=200)
    words = base_text(np.random.default_rng(0), 3000)
    texts = {"a": " ".join(words), "b": " ".join([*words[:1500], "new", *words[1500:]])}
    assert len(stage.shingles(texts["a"])) == 200 and run(stage, texts) == {"b": "a"}


def test_short_and_wordless_texts_are_handled():
    texts = {"a": "one two", "b": "One, two!", "c": "...", "d": "???", "e": ""}
    assert run(MinHashDedup(), texts) == {"b": "a"}
    assert run(MinHashDedup(), {}) == {}


def test_exact_duplicates_differ_only_in_white_space():
    texts = {"c": "a  b\n", "b": "a b", "a": "a\tb", "d": "a B", "e": "ab"}
    assert run(ExactDedup(), texts) == {"b": "a", "c": "a"}

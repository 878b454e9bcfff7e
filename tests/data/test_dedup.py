"""Deduplication: true similarity decides, and neither order nor hash luck does."""

import numpy as np
import pytest

from data.dedup import ExactDedup, MinHashDedup, jaccard
from tests.data.made_corpus import duplicates as run


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
    a, b = eager.bands_of(list(texts.values()))[:, :-1]
    assert set(a) & set(b) and run(eager, texts) == {}
    assert run(MinHashDedup(bands=64, rows=1, min_jaccard=0.2), texts) == {"b": "a"}


def test_the_share_of_equal_minima_estimates_jaccard():
    stage = MinHashDedup(bands=2000, rows=1)
    rng = np.random.default_rng(3)
    words = base_text(rng, 500)
    for cut in (50, 200, 400):
        a, b = " ".join(words), " ".join(words[cut:] + base_text(rng, cut))
        keys = stage.bands_of([a, b])[:, :-1]
        equal = keys[0] == keys[1]
        assert abs(equal.mean() - jaccard(stage.shingles(a), stage.shingles(b))) < 0.04


def test_the_best_of_a_cluster_stays_by_the_stated_rule():
    words = base_text(np.random.default_rng(0), 300)
    texts = {"a": " ".join(words), "b": " ".join([*words, "and", "more"]), "c": " ".join(words[:-1])}
    scores = {name: {"tags": {"Quality": {"score": s}}} for name, s in (("a", 0.1), ("b", 0.2), ("c", 0.9))}
    for rule, best in (("first", "a"), ("longest", "b"), ("best", "c")):
        stage = MinHashDedup(keep=rule, score="tags.Quality.score")
        assert run(stage, texts, metadata=scores) == {name: best for name in texts if name != best}


def test_a_later_crawl_loses_what_an_earlier_one_has(tmp_path):
    texts = corpus()
    first = {name: text for name, text in texts.items() if name < "06"}
    gone = run(MinHashDedup(save_index=str(tmp_path / "index")), first)
    second = {f"new-{name}": text for name, text in texts.items() if "04" <= name < "09"}
    dropped = run(MinHashDedup(index=(str(tmp_path / "index"),)), second)
    both = run(MinHashDedup(), first | second)
    assert gone == {name: kept for name, kept in both.items() if name in first}
    assert dropped == {name: kept for name, kept in both.items() if name in second} and len(dropped) > 12


def test_addresses_are_the_same_but_for_scheme_www_and_a_closing_slash():
    urls = ["http://www.a.org/x/", "https://a.org/x#top", "https://a.org/x?q=1", "", ""]
    texts = {name: f"text {name}" for name in "abcde"}
    metadata = {name: {"url": url} for name, url in zip("abcde", urls)}
    assert run(ExactDedup(by="url"), texts, metadata=metadata) == {"b": "a"}


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

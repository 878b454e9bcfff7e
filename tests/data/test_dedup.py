"""Deduplication: true similarity decides, and neither order nor hash luck does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dedup import (
    BloomDedup,
    ExactDedup,
    LineDedup,
    MinHashDedup,
    SemanticDedup,
    SubstringDedup,
    jaccard,
    minhash,
)
from data.dedup.lines import Bloom
from data.dedup.semantic import clusters
from data.dedup.substring import window_hashes
from tests.data.made_corpus import duplicates as run
from tests.data.made_corpus import left


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


def templated(pages, copies, seed=0, pool=None):
    """{name: text} of pages of one template, two of them at 0.78 by their own words; of every tenth one or more copies
    with a few words changed. `pool`: own parts are drawn from so many blocks, so that no shingle is rare."""
    rng = np.random.default_rng(seed)
    template, own = [f"t{i}" for i in range(300)], 33
    blocks = [[f"b{b}-{i}" for i in range(own // 3)] for b in range(pool or 0)]
    texts = {}
    for page in range(pages):
        words = list(template)
        chosen = [w for b in rng.choice(pool, 3, replace=False) for w in blocks[b]] if pool else []
        words[100 : 100 + own] = chosen or [f"w{i}" for i in rng.integers(0, 50_000, own)]
        texts[f"{page:05d}"] = words
        for copy in range(copies if page % 10 == 0 else 0):
            changed = list(words)
            for at in rng.choice(300, rng.integers(0, 7), replace=False):
                changed[at] = f"x{rng.integers(50_000)}"
            texts[f"{page:05d}-{copy}"] = changed
    return {name: " ".join(words) for name, words in texts.items()}


def similar_to_any(stage, texts):
    """Names of texts that are similar to another one, by all pairs."""
    sets = {name: set(stage.shingles(text).tolist()) for name, text in texts.items()}
    names, found = sorted(sets), set()
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            shared = len(sets[a] & sets[b])
            if shared >= stage.min_jaccard * (len(sets[a]) + len(sets[b]) - shared):
                found |= {a, b}
    return found


def count_verified(monkeypatch):
    """A list of how many pairs each call of the verification gets."""
    counts, real = [], minhash.verify_some

    def counted(item):
        counts.append(len(item[2]))
        return real(item)

    monkeypatch.setattr(minhash, "verify_some", counted)
    return counts


@pytest.mark.parametrize("copies, pool", [(1, None), (40, None), (1, 60)])
def test_pages_of_one_template_take_linear_work_and_keep_their_recall(monkeypatch, copies, pool):
    """All pages share bands with all others, and are just below the threshold."""
    counts, work = count_verified(monkeypatch), {}
    for pages in (300, 600):
        texts = templated(pages if copies == 1 else pages // 5, copies, pool=pool)
        del counts[:]
        gone = run(MinHashDedup(), texts)
        work[pages] = sum(counts) / len(texts)
        wanted, found = similar_to_any(MinHashDedup(), texts), {*gone, *gone.values()}
        assert found <= wanted and len(found) >= 0.99 * len(wanted) > 25
    assert max(work.values()) < 60 and work[600] < 1.3 * work[300]


def test_a_bucket_of_thousands_of_unlike_pages_takes_linear_work(monkeypatch):
    """Also with one large cluster, several small ones and pairs inside."""
    rng = np.random.default_rng(0)
    texts = {f"{i:04d}": base_text(rng, 60) for i in range(3000)}
    wanted = {}
    for page, copies in ((0, 1), (7, 1), (2999, 3), (50, 400), (60, 30), (61, 1)):
        for copy in range(copies):
            texts[f"{page:04d}-{copy}"] = [*texts[f"{page:04d}"], f"end{copy}"]
            wanted[f"{page:04d}-{copy}"] = f"{page:04d}"
    texts = {name: " ".join(words) for name, words in texts.items()}
    monkeypatch.setattr(MinHashDedup, "bands_of", lambda self, texts: np.ones((len(texts), 2), np.uint64))
    counts = count_verified(monkeypatch)
    assert run(MinHashDedup(bands=1), texts) == wanted
    assert sum(counts) < 12 * len(texts)


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


def sentences(rng, count=6):
    return ["".join(f"{word} " for word in base_text(rng, 12)).strip() + "." for _ in range(count)]


def test_repeated_paragraphs_go_from_all_but_the_first_document():
    rng = np.random.default_rng(0)
    own = {name: sentences(rng) for name in "abcd"}
    shared = "This paragraph stands on every page of the site, as such paragraphs do."
    texts = {name: "\n\n".join([*lines[:3], shared, *lines[3:]]) for name, lines in own.items()}
    texts["c"] = texts["c"].replace("This paragraph", "this  PARAGRAPH")
    after = left(LineDedup(), texts)
    assert after["a"] == texts["a"]
    for name in "bcd":
        assert after[name] == "\n\n".join(own[name][:3]) + "\n\n" + "\n\n".join(own[name][3:])
    twice = left(LineDedup(max_copies=2, unit="line"), texts)
    assert twice["b"] == texts["b"] and shared.lower() not in twice["c"].lower()
    short = {"a": "yes\nno\nyes", "b": "yes"}
    assert left(LineDedup(unit="line"), short) == short
    assert left(LineDedup(max_cut=0.01), texts) == {"a": texts["a"]}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cut_passages_are_those_that_a_brute_force_over_all_windows_finds(seed):
    rng, n = np.random.default_rng(seed), 5
    texts = {f"{i:02d}": " ".join(rng.choice(list("abc"), rng.integers(3, 40))) for i in range(12)}
    seen, wanted = set(), {}
    for name, text in texts.items():
        words = text.split()
        gone = set()
        for i in range(len(words) - n + 1):
            window = tuple(words[i : i + n])
            if window in seen:
                gone |= set(range(i, i + n))
            seen.add(window)
        wanted[name] = [w for i, w in enumerate(words) if i not in gone]
    after = left(SubstringDedup(min_tokens=n), texts)
    assert {name: text.split() for name, text in after.items()} == wanted
    assert any(len(after[name]) < len(texts[name]) for name in texts)


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40), size=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_equal_windows_have_equal_hashes_and_others_have_not(tokens, size):
    if size > len(tokens):
        return
    random = np.random.default_rng(0).integers(0, 2**63, 4).astype(np.uint64)
    hashes = window_hashes(random[tokens], size).tolist()
    windows = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    assert len(hashes) == len(windows)
    assert len(set(zip(hashes, windows))) == len(set(hashes)) == len(set(windows))


def test_a_bloom_filter_forgets_nothing_and_errs_as_rarely_as_it_says():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**63, 40_000).astype(np.uint64)
    seen = Bloom(20_000, 0.01)
    seen.add(values[:20_000])
    assert seen.has(values[:20_000]).all()
    assert 0.004 < seen.has(values[20_000:]).mean() < 0.016


def test_pages_mostly_seen_before_go_and_others_lose_their_repeated_paragraphs():
    rng = np.random.default_rng(0)
    own = {name: [" ".join(base_text(rng, 40)) for _ in range(4)] for name in "abc"}
    texts = {name: "\n\n".join(paragraphs) for name, paragraphs in own.items()}
    texts["b"] = "\n\n".join([*own["b"][:2], own["a"][0], *own["b"][2:]])
    texts["c"] = "\n\n".join([*own["a"], own["c"][0]])
    after = left(BloomDedup(), texts)
    assert after == {"a": texts["a"], "b": "\n\n".join(own["b"])}


@pytest.mark.parametrize("seed", range(4))
def test_repeated_paragraphs_are_those_that_a_plain_loop_with_a_set_finds(seed):
    """The steps of BFF (process_line in DCLM's dedup/bff), paragraph by paragraph, also within one document."""
    rng, n = np.random.default_rng(seed), 3
    texts = {}
    for i in range(30):
        paragraphs = [" ".join(rng.choice(list("abcd"), rng.integers(1, 7))) for _ in range(6)]
        texts[f"{i:02d}"] = "\n".join([*paragraphs, *paragraphs[:2]])
    seen, wanted = set(), {}
    for name, text in texts.items():
        grams_of, stays = [], []
        for line in text.split("\n"):
            words = line.split()
            size = min(n, len(words))
            short = len(words) < 2
            grams_of.append(
                [] if short else [tuple(words[k : k + size]) for k in range(len(words) - size + 1)]
            )
        before = [gram in seen for grams in grams_of for gram in grams]
        if before and sum(before) / len(before) >= 0.8:
            continue
        for line, grams in zip(text.split("\n"), grams_of):
            if grams and sum(gram in seen for gram in grams) / len(grams) >= 0.8:
                continue
            seen.update(grams)
            stays.append(line)
        wanted[name] = stays
    stage = BloomDedup(unit="line", ngram_words=n, min_words=2, false_positives=1e-9)
    after = left(stage, texts)
    assert {name: text.split("\n") for name, text in after.items()} == {
        name: lines + [""] * (len(after[name].split("\n")) - len(lines)) for name, lines in wanted.items()
    }
    assert len(wanted) < 30 and any(len(lines) < 8 for lines in wanted.values())


def test_a_paragraph_that_fills_a_document_stays_once():
    paragraph = "one two three four five six seven eight nine ten"
    assert left(BloomDedup(), {"a": "\n\n".join([paragraph] * 20)}) == {"a": paragraph + "\n\n"}


def rotated(rng, vector, cosine):
    other = rng.normal(size=len(vector))
    other -= other @ vector * vector
    other /= np.linalg.norm(other)
    return cosine * vector + np.sqrt(1 - cosine**2) * other


VECTORS = {}


def vectors_of(model):
    return lambda texts: np.array([VECTORS[text] for text in texts], np.float32)


def test_documents_that_say_the_same_keep_one():
    rng = np.random.default_rng(0)
    for i in range(40):
        vector = rng.normal(size=16)
        VECTORS[f"{i:02d}-a"] = vector / np.linalg.norm(vector)
        VECTORS[f"{i:02d}-b"] = rotated(rng, VECTORS[f"{i:02d}-a"], 0.97 if i % 2 else 0.9)
    stage = SemanticDedup(embedder="tests.data.test_dedup:vectors_of", model="", cluster_documents=100)
    gone = run(stage, {name: name for name in VECTORS})
    assert gone == {f"{i:02d}-b": f"{i:02d}-a" for i in range(1, 40, 2)}
    many = SemanticDedup(embedder="tests.data.test_dedup:vectors_of", model="", cluster_documents=10)
    assert len(set(run(many, {name: name for name in VECTORS})) - set(gone)) == 0


def test_clusters_of_separate_bunches_are_those_bunches():
    rng = np.random.default_rng(0)
    centres = np.eye(8, dtype=np.float32)[:5]
    wanted = rng.integers(0, 5, 300)
    vectors = centres[wanted] + rng.normal(size=(300, 8)).astype(np.float32) * 0.05
    found = clusters(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 5, 20)
    assert len(set(zip(wanted.tolist(), found.tolist()))) == len(set(found.tolist()))


SCRIPTS = {  # letters of scripts that are written without spaces
    "Japanese": (0x3041, 0x30FF),
    "Chinese": (0x4E00, 0x9FFF),
    "Thai": (0x0E01, 0x0E2E),
    "Burmese": (0x1000, 0x102A),
    "Khmer": (0x1780, 0x17B3),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_near_copies_are_found_in_scripts_without_spaces(script):
    """And texts of the same letters that are no copies stay."""
    rng = np.random.default_rng(0)
    low, high = SCRIPTS[script]
    letters = rng.integers(low, high, (12, 400))
    texts = ["".join(map(chr, row)) for row in letters]
    near = [list(text) for text in texts[:9]]
    for copy in near:
        for place in rng.choice(400, 3, replace=False):
            copy[place] = chr(int(rng.integers(low, high)))
    documents = {f"a{i}": text for i, text in enumerate(texts)}
    documents |= {f"b{i}": "".join(copy) for i, copy in enumerate(near)}
    assert run(MinHashDedup(), documents) == {f"b{i}": f"a{i}" for i in range(9)}
    for stage in (BloomDedup(min_overlap=0.6), SubstringDedup(min_tokens=40, min_left=0.9)):
        stays = left(stage, documents)
        assert {name for name, text in stays.items() if text == documents[name]} == set(documents) - {
            f"b{i}" for i in range(9)
        }, type(stage).__name__

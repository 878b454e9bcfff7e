"""Judging text by models: against brute force, closed forms and a server of the test's own."""

import collections
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from configs import ConfigError, build, to_dict
from data.curation import CurationConfig, curate
from data.documents import make_document
from data.endpoint import Endpoint
from data.quality import (
    CruciblePerplexity,
    EducationalScore,
    HarmClassifier,
    NgramPerplexity,
    QualityClassifier,
    UrlList,
    WordList,
    curves,
)
from data.quality.__main__ import main
from data.quality.educational import last_score
from data.quality.features import features, matrix
from data.quality.harm import names_of
from data.quality.ngram_lm import END, START, NgramConfig, load_ngrams, save_ngrams, train_ngrams
from data.quality.perplexity import measure
from data.quality.training import ClassifierConfig, train_classifier
from data.shards import open_dataset
from data.sources import Jsonl
from data.words import words_and_marks
from tests.data.served import served


def document(text, **metadata):
    return make_document("a", text, "made", "CC0", {"type": "prose", **metadata})


def made(seed, words, length=30):
    return " ".join(np.random.default_rng(seed).choice(words, length))


GOOD, BAD = ["theorem", "proof", "lemma", "the", "of"], ["buy", "cheap", "click", "the", "of"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    positive, negative = ([made(i, words) for i in range(150)] for words in (GOOD, BAD))
    config = ClassifierConfig(bits=12, held_out=0.4)
    report = train_classifier(positive, negative, folder, config, log=lambda line: None)
    return folder, report


# the classifier


@given(st.lists(st.sampled_from("a b c d".split()), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_a_text_is_the_roots_of_the_shares_of_its_words_and_pairs(words):
    _, values = features(" ".join(words), 24, 1000)
    counts = collections.Counter([*words, *zip(words, words[1:])])
    total = sum(counts.values())
    assert sorted(values.tolist()) == pytest.approx(sorted(math.sqrt(c / total) for c in counts.values()))
    assert float(values @ values) == pytest.approx(1)


def test_chinese_and_japanese_are_letters_and_others_words():
    assert words_and_marks("Naïve don't 東京タワー x1") == ["naïve", "don", "'", "t", *"東京タワー", "x1"]


scores_and_labels = st.integers(2, 40).flatmap(
    lambda n: st.tuples(
        hnp.arrays(float, n, elements=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        hnp.arrays(bool, n),
    )
)


@given(scores_and_labels)
def test_the_area_under_the_curve_is_the_chance_that_a_positive_scores_higher(pair):
    scores, labels = pair
    positives, negatives = scores[labels], scores[~labels]
    if not len(positives) or not len(negatives):
        return
    wins = [(p > n) + 0.5 * (p == n) for p, n in itertools.product(positives, negatives)]
    assert curves.area(scores, labels) == pytest.approx(np.mean(wins))


def test_calibration_error_is_nothing_for_scores_that_are_shares():
    scores = np.repeat([0.25, 0.75], 4)
    labels = np.array([1, 0, 0, 0, 1, 1, 1, 0], bool)
    assert curves.calibration_error(scores, labels) == 0
    assert curves.calibration_error(scores, ~labels) == 0.5


def test_a_classifier_tells_two_sets_apart_and_says_so_with_probabilities(classifier):
    folder, report = classifier
    assert report["area_under_roc"] > 0.99
    assert report["calibration_error"] < 0.1
    assert {"theorem", "proof", "lemma"} <= set(report["words_for"])
    assert {"buy", "cheap", "click"} <= set(report["words_against"])
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_texts_give_the_same_bytes(classifier, tmp_path):
    positive, negative = ([made(i, words) for i in range(150)] for words in (GOOD, BAD))
    config = ClassifierConfig(bits=12, held_out=0.4)
    train_classifier(positive, negative, tmp_path, config, log=lambda line: None)
    held = (np.load(folder / "model.npz") for folder in (tmp_path, classifier[0]))
    one, two = ({name: file[name] for name in file.files} for file in held)
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)


def test_the_fit_is_the_minimum_that_another_method_finds():
    """Gradient descent with small steps on the same loss."""
    from data.quality.training import _fit

    texts = [made(i, GOOD[:4] + BAD[:2], 6) for i in range(30)]
    labels = np.arange(30) % 3 == 0
    config = ClassifierConfig(bits=8, l2=0.01, iterations=1000)
    model = _fit(texts, labels, config, lambda line: None)
    rows = matrix(texts, 8, 100).toarray().astype(float)
    weights = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    w, b = np.zeros(256), 0.0
    for _ in range(20_000):
        slope = weights * (1 / (1 + np.exp(-(rows @ w + b))) - labels)
        w, b = w - 2 * (rows.T @ slope + 0.01 * w), b - 2 * slope.sum()
    np.testing.assert_allclose(model.weights, w, atol=5e-3)
    assert model.bias == pytest.approx(b, abs=5e-3)


def test_a_set_that_is_too_small_to_hold_out_is_an_error_with_the_mend(tmp_path):
    with pytest.raises(ConfigError, match="no positive text fell into the .* Give more texts"):
        train_classifier(["a"], ["b"] * 99, tmp_path, log=lambda line: None)


def test_the_filter_keeps_what_scores_high_and_the_harm_filter_drops_it(classifier):
    texts = [made(999, GOOD), made(998, BAD)]
    quality, harm = QualityClassifier(model=str(classifier[0])), HarmClassifier(model=str(classifier[0]))
    signals = quality.signals_of([document(text) for text in texts])
    assert [quality.signals(text) for text in texts] == signals
    assert [quality.reason(s) for s in signals] == [None, "quality: low score"]
    assert [harm.reason(s) for s in signals] == ["harm: high score", None]


def test_a_missing_model_is_an_error_that_names_the_command(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "words"}) + "\n")
    for stage in (QualityClassifier(), NgramPerplexity(), HarmClassifier(), WordList(), EducationalScore()):
        with pytest.raises(ConfigError, match="give|Set"):
            curate(CurationConfig(sources=(Jsonl(str(rows)),), stages=(stage,)), tmp_path / "w")


def test_a_curation_takes_these_stages_and_their_configs_survive_json(classifier, tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = [made(i, words) for words in (GOOD, BAD) for i in range(500, 510)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    listed = tmp_path / "list.txt"
    listed.write_text("# words\nlemma\n")
    stages = (
        QualityClassifier(model=str(classifier[0])),
        WordList(words=(str(listed),), max_per_thousand=900.0),
    )
    config = CurationConfig(
        sources=(Jsonl(str(rows)),), stages=stages, validation_fraction=0.0, test_fraction=0.0
    )
    assert build(CurationConfig, to_dict(config)) == config
    datasets = curate(config, tmp_path / "w", log=lambda line: None)
    assert sorted(d["text"] for d in datasets["train"]) == sorted(texts[:10])


# n-grams


WORDS = st.lists(st.sampled_from("a b c".split()), max_size=12).map(" ".join)


@given(
    st.lists(WORDS, min_size=1, max_size=12).filter(lambda texts: any(texts)),
    st.integers(1, 4),
    st.sampled_from([3, 1000]),
    st.lists(st.sampled_from([0, 3, 4, 5]), max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_probabilities_sum_to_one_after_every_context_pruned_or_not(texts, order, most, context):
    model = train_ngrams(lambda: texts, NgramConfig(order=order, max_ngrams=most, vocabulary=100))
    context = [symbol for symbol in context if symbol < len(model.symbols) + 3]
    found = model.probabilities(context)
    assert found.sum() == pytest.approx(1, abs=1e-6)
    assert found[START] == 0 and (np.delete(found, START) > 0).all()


def by_hand(texts, order):
    """Interpolated modified Kneser-Ney from Chen and Goodman's formulas, with dictionaries: p(word, context)."""
    sentences = [["<s>"] * (order - 1) + words_and_marks(text) + ["</s>"] for text in texts]
    runs = [s[i - n + 1 : i + 1] for n in [order] for s in sentences for i in range(order - 1, len(s))]
    counts = {order: collections.Counter(map(tuple, runs))}
    for n in range(order - 1, 0, -1):
        before = collections.defaultdict(set)
        for gram in counts[n + 1]:
            before[gram[1:]].add(gram[0])
        counts[n] = collections.Counter({gram: len(firsts) for gram, firsts in before.items()})
        for gram, count in counts[n + 1].items():
            if gram[1] == "<s>":
                counts[n][gram[1:]] += count - 1
    vocabulary = {word for s in sentences for word in s} - {"<s>"} | {"<unk>"}
    discounts = {}
    for n, grams in counts.items():
        n1, n2, n3, n4 = (max(sum(c == i for c in grams.values()), 1e-9) for i in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        discounts[n] = [0, *(found if all(0 < d < i for i, d in enumerate(found, 1)) else [0.5] * 3)]

    def p(word, context):
        if len(context) == order:
            raise AssertionError
        n = len(context) + 1
        lower = p(word, context[1:]) if context else 1 / len(vocabulary)
        after = {gram: c for gram, c in counts[n].items() if gram[:-1] == context}
        total = sum(after.values())
        if not total:
            return lower
        taken = sum(discounts[n][min(c, 3)] for c in after.values())
        count = counts[n].get((*context, word), 0)
        return (count - discounts[n][min(count, 3)]) / total + taken / total * lower

    return p


def test_probabilities_are_those_of_chen_and_goodmans_formulas():
    rng = np.random.default_rng(3)
    words = np.array([f"w{i}" for i in range(40)])
    shares = 1 / np.arange(1, 41)
    texts = [" ".join(rng.choice(words, 12, p=shares / shares.sum())) for _ in range(60)]
    for order in (2, 3):
        model = train_ngrams(lambda: texts, NgramConfig(order=order, vocabulary=100))
        p = by_hand(texts, order)
        for text in [*texts[:5], "w1 w39 w2 w1", "w0 w0 w0"]:
            padded = ["<s>"] * (order - 1) + words_and_marks(text) + ["</s>"]
            wanted = [
                -math.log(p(padded[i], tuple(padded[i - order + 1 : i])))
                for i in range(order - 1, len(padded))
            ]
            np.testing.assert_allclose(model.nats([text])[0], wanted, rtol=1e-5)


def test_a_model_of_bytes_knows_no_unknown_and_survives_its_file(tmp_path):
    model = train_ngrams(lambda: ["abab abab", "abba"], NgramConfig(unit="bytes", order=4))
    save_ngrams(dataclasses.replace(model, percentiles=(1.0, 2.0)), tmp_path / "ngrams.npz")
    again = load_ngrams(str(tmp_path / "ngrams.npz"))
    texts = ["abab", "größe", ""]
    assert [a.tolist() for a in model.nats(texts)] == [a.tolist() for a in again.nats(texts)]
    assert again.percentiles == (1.0, 2.0)
    assert [m["unknown"] for m in measure(again, texts)] == [0, 0, 0]
    assert model.encode("")[-1] == END


def test_texts_like_those_it_was_trained_on_are_likelier(tmp_path):
    model = train_ngrams(lambda: (made(i, GOOD) for i in range(200)), NgramConfig(order=3))
    good, bad = measure(model, [made(999, GOOD), made(998, BAD)])
    assert good["perplexity"] == pytest.approx(len(GOOD), rel=0.15)  # words are drawn evenly
    assert bad["perplexity"] > 3 * good["perplexity"] and bad["unknown"] > 0.4


def test_too_many_symbols_for_the_order_are_an_error_with_the_mend():
    with pytest.raises(ValueError, match="wanted an order of 1 to 4, or fewer symbols"):
        NgramConfig(order=5, vocabulary=60_000)


def test_the_command_trains_and_the_filter_takes_thirds(tmp_path, capsys):
    train, web = tmp_path / "train.jsonl", tmp_path / "web.jsonl"
    train.write_text("".join(json.dumps({"text": made(i, GOOD)}) + "\n" for i in range(100)))
    mixed = [made(i, GOOD[: 5 - i % 3] + BAD[: i % 3]) for i in range(300)]
    web.write_text("".join(json.dumps({"text": text}) + "\n" for text in mixed))
    command = ["train-ngram", str(train), "--calibrate", str(web), "--out", str(tmp_path / "n")]
    assert main(command) == 0 and "head: perplexity" in capsys.readouterr().out
    stage = NgramPerplexity(model=str(tmp_path / "n"), keep=("head",))
    signals = stage.signals_of([document(text) for text in mixed])
    thirds = collections.Counter(stage.third(s["perplexity"]) for s in signals)
    assert thirds == {"head": 90, "middle": 90, "tail": 120}
    assert sum(stage.reason(s) is None for s in signals) == 90
    assert dataclasses.replace(stage, head=math.inf, tail=math.inf).reason(signals[0]) is None


def test_a_scorer_is_asked_by_name(monkeypatch, tmp_path):
    import data.quality.perplexity as module

    monkeypatch.setattr(
        module, "named", lambda name: lambda model: lambda texts: [len(t) / 10 for t in texts]
    )
    stage = CruciblePerplexity(model=str(tmp_path), scorer="x:a", max_bits_per_byte=1.0, max_characters=8)
    signals = stage.signals_of([document("abc"), document("abcdefghijkl")])
    assert [s["nats_per_byte"] for s in signals] == [0.3, 0.8]
    assert [stage.reason(s) for s in signals] == [None, "perplexity: too unlikely"]


# harm


@pytest.mark.parametrize(
    ("url", "listed"),
    [
        ("http://evil.org/x", "evil.org"),
        ("https://www.EVIL.org:8080/x?y=1", "evil.org"),
        ("evil.org", "evil.org"),
        ("http://notevil.org/", ""),
        ("http://evil.org.example.com/", ""),
        ("http://good.org/evil.org", ""),
        ("http://good.org/bad/page.html", "good.org/bad"),
        ("http://good.org/badge", ""),
        ("http://10.0.0.1/", "10.0.0.1"),
        ("http://0.1/", ""),
        ("http://[::1", ""),
        ("http://shop.net/casino-royale", "casino"),
    ],
)
def test_a_listed_domain_is_it_and_what_lies_below(url, listed, tmp_path):
    domains, parts = tmp_path / "domains", tmp_path / "parts"
    domains.write_text("# a list\nevil.org\n\nhttp://good.org/bad/\n10.0.0.1\n")
    parts.write_text("casino\n")
    stage = UrlList(domains=(str(domains),), substrings=(str(parts),))
    (signals,) = stage.signals_of([document("x", url=url)])
    assert signals["listed"] == listed
    assert stage.reason(signals) == ("url: listed" if listed else None)


def test_names_of_an_address_go_from_the_whole_to_the_last_label():
    assert names_of("http://a.b.org/x/y")[:4] == ["a.b.org/x/y", "a.b.org/x", "a.b.org", "b.org/x/y"]


def test_a_document_without_an_address_stays_unless_one_is_required(tmp_path):
    (tmp_path / "list").write_text("evil.org\n")
    stage = UrlList(domains=(str(tmp_path / "list"),))
    (signals,) = stage.signals_of([document("x")])
    assert stage.reason(signals) is None
    assert dataclasses.replace(stage, require_url=True).reason(signals) == "url: none"


def test_listed_words_are_whole_words_phrases_and_parts_of_unspaced_text(tmp_path):
    (tmp_path / "list").write_text("ass\nbad thing\nバカ\n")
    stage = WordList(words=(str(tmp_path / "list"),))
    texts = {"classic assets": 0, "an ASS, ass!": 2, "A bad  thing; bad\nthing": 2, "あのバカと": 1, "bad": 0}
    assert {text: stage.signals(text)["listed"] for text in texts} == texts
    assert stage.reason(stage.signals("an ass")) == "words: listed"
    assert stage.reason(stage.signals("fine")) is None
    mild = dataclasses.replace(stage, max_per_thousand=600.0)
    assert mild.reason(stage.signals("an ass")) is None  # 500 in a thousand


# a served model


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("It teaches.\nScore: 4", 4),
        ("4/5", 4),
        ("3 out of 5.", 3),
        ("Score: 7", None),
        ("none", None),
        ("0", 0),
    ],
)
def test_the_last_whole_number_is_the_score(answer, score):
    assert last_score(answer) == score


def test_a_served_model_scores_each_text_once(tmp_path):
    failing = iter([(429, "busy")])

    def answer(request):
        shown = request["messages"][0]["content"]
        if "broken" in shown:
            return 400, "no"
        return next(failing, None) or f"Well. Score: {shown.count('theorem')}"

    texts = ["theorem " * 4, "theorem", "theorem " * 4, "broken", "theorem " * 9]
    with served(answer) as (url, seen):
        endpoint = Endpoint(base_url=url, model="m", concurrency=1, retries=1)
        stage = EducationalScore(endpoint=endpoint, cache=str(tmp_path / "cache"))
        first = stage.signals_of([document(text) for text in texts])
        asked = len(seen)
        again = stage.signals_of([document(text) for text in texts])
    assert [s["score"] for s in first] == [4, 1, 4, None, None]
    assert "HTTP 400" in first[3]["failure"] and "no score" in first[4]["failure"]
    assert first == again
    assert (
        asked == 5 and len(seen) == 6
    )  # one was told to come again, two are equal; the broken one is asked again
    verdicts = [stage.reason(s) for s in first]
    low, lost = "educational: low score", "educational: not judged"
    assert verdicts == [None, low, None, lost, lost]


def test_an_outage_of_the_endpoint_decides_nothing(tmp_path):
    """The run ends with an error; given again when the server is back, it keeps every document."""
    rows = [{"text": f"A theorem and its proof, number {i}. " * 8} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(url):
        stage = EducationalScore(
            endpoint=Endpoint(base_url=url, model="m", retries=0), min_score=1, cache=str(tmp_path / "cache")
        )
        splits = {"validation_fraction": 0.2, "test_fraction": 0.2}
        sources = (Jsonl(str(tmp_path / "rows.jsonl")),)
        curate(CurationConfig(sources, (stage,), **splits), tmp_path / "out", log=lambda line: None)

    down = iter([(503, "down")] * 100)
    with (
        served(lambda request: next(down)) as (url, _),
        pytest.raises(ConfigError, match="HTTP 503[^$]*again"),
    ):
        run(url)
    with pytest.raises(ConfigError, match="did not answer 30 of 30 requests: URLError"):
        run("http://127.0.0.1:9/v1")
    with served(lambda request: (401, "no key")) as (url, _), pytest.raises(ConfigError, match="HTTP 401"):
        run(url)
    with served(lambda request: "Score: 4") as (url, _):
        run(url)
    assert sum(len(open_dataset(split)) for split in (tmp_path / "out" / "text").iterdir()) == 30


# real texts


@pytest.mark.slow
def test_books_are_told_from_their_shuffled_words(shared, tmp_path):
    import gzip

    rng, sets = np.random.default_rng(0), ([], [])
    for file in ("great-expectations", "dracula", "frankenstein"):
        raw = gzip.decompress((shared / f"data/pretrain-text/gutenberg/{file}.txt.gz").read_bytes())
        paragraphs = raw.decode("utf-8", "replace").replace("\r", "").split("\n\n")
        pieces = [" ".join(paragraphs[i : i + 5]).split() for i in range(30, len(paragraphs) - 60, 5)]
        for piece in pieces:
            sets[0].append(" ".join(piece))
            sets[1].append(" ".join(rng.permutation(piece)))
    report = train_classifier(*sets, tmp_path, log=lambda line: None)
    assert report["area_under_roc"] > 0.95

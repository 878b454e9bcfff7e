"""Planted items are found, near misses are not, and everything equals brute force."""

import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import ConfigError, build, to_dict
from data.curation import CurationConfig, curate
from data.decontaminate import Decontaminate, DecontaminateSpans
from data.decontaminate.__main__ import main
from data.decontaminate.index import Benchmark, open_index, read_items, read_words
from data.decontaminate.report import corpus_report, membership_report, min_k
from data.sources import Jsonl

LONG = "A farmer has twelve hens, and each of them lays three eggs a week; how many eggs are there after two weeks?"
SHORT = "Name the largest moon of the planet Saturn."
AROUND = "It was a fine day in the village and nobody thought of anything in particular. "


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bench(tmp_path):
    path = tmp_path / "bench.jsonl"
    rows = [{"question": LONG, "answer": "72"}, {"question": SHORT, "answer": "Titan"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Benchmark(str(path), ("question",))


def test_planted_items_are_found_whatever_their_case_and_marks(bench):
    stage = Decontaminate(benchmarks=(bench,))
    planted = AROUND + LONG.upper().replace(" ", "  ").replace(";", " -- ") + AROUND
    signals = stage.signals(planted)
    assert signals["hits"] == len(LONG.split()) - 12
    (span,) = json.loads(signals["spans"])
    assert planted[span["start"] : span["stop"]] == planted[len(AROUND) : len(planted) - len(AROUND) - 1]
    assert stage.reason(signals) == "decontaminate: benchmark: bench.jsonl"
    assert stage.reason(stage.signals(AROUND + SHORT.lower() + AROUND))


def test_near_misses_are_not_found(bench):
    stage = Decontaminate(benchmarks=(bench,))
    words = LONG.split()
    words[10] = "other"  # leaves twelve words at most together
    for text in (
        AROUND,
        " ".join(words),
        "the largest moon of the planet Saturn",
        " ".join(LONG.split()[:12]),
        "",
    ):
        assert stage.reason(stage.signals(text)) is None


def test_items_below_the_least_words_are_found_as_lines_and_not_inside_other_sentences(tmp_path):
    path = tmp_path / "short.jsonl"
    rows = [{"q": "Who wrote Hamlet?", "a": "Shakespeare"}, {"q": "What is 7 times 8?", "a": "56"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    stage = Decontaminate(benchmarks=(Benchmark(str(path)),))
    for line in ("Who wrote Hamlet?", "Question 3: who wrote  HAMLET", "What is 7 times 8?\n56"):
        assert stage.reason(stage.signals(f"{AROUND}\n{line}\n{AROUND}")) is not None, line
        assert stage.reason(stage.signals(line)) is not None
    for line in (
        "They asked me who wrote Hamlet and more of that.",
        "Who wrote it? Hamlet",
        "Shakespeare",
        "56",
    ):
        assert stage.reason(stage.signals(f"{AROUND}\n{line}\n{AROUND}")) is None, line
    assert stage.notes() == (
        "short.jsonl: 2 items; 1 lines are broken and not read; 2 texts of fewer than 3 words are not looked for",
    )
    cut = DecontaminateSpans(benchmarks=(Benchmark(str(path)),), margin=0, min_characters=10)
    assert cut.apply(f"{AROUND}\nWho wrote Hamlet?\n{AROUND}") == (f"{AROUND}\n?\n{AROUND}", None)


def test_a_benchmark_file_that_is_cut_is_an_error(tmp_path):
    lines = "".join(json.dumps({"q": f"{i} {LONG}"}) + "\n" for i in range(999)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-99])
    with pytest.raises(ConfigError, match="can't be read to its end"):
        Decontaminate(benchmarks=(Benchmark(str(tmp_path / "a.jsonl.gz")),)).notes()


WORDS = st.lists(st.sampled_from("a b c".split()), max_size=14)


@given(st.lists(WORDS, min_size=1, max_size=4), WORDS, st.integers(2, 5), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_hits_are_those_of_brute_force(tmp_path_factory, items, words, n, least):
    if not any(len(item) >= least for item in items):
        return
    path = tmp_path_factory.mktemp("b") / "items.txt"
    path.write_text("".join(" ".join(item) + "\n" for item in items))
    index = open_index([Benchmark(str(path))], n, least)
    wanted = set()
    for number, item in enumerate(items):
        length = min(n, len(item))
        runs = {tuple(item[i : i + length]) for i in range(len(item) - length + 1)} if length >= least else ()
        for at in range(len(words)):
            if tuple(words[at : at + length]) in runs:
                wanted.add((at, length, number))
    found = index.hits(read_words(" ".join(words)))
    assert {(at, length, int(i)) for at, length, which in found for i in which} == wanted


def test_items_are_read_from_every_format(tmp_path):
    rows = [{"q": "one two", "more": {"deep": ["three"]}}, {"q": "four", "more": {"deep": ["five", "six"]}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (tmp_path / "a.json").write_text(json.dumps({"canary": "x", "examples": rows}))
    (tmp_path / "a.csv").write_text("q,more\none two,three\n")
    (tmp_path / "a.txt").write_text("one two\nfour\n")
    pq.write_table(pa.table({"q": ["one two", "four"]}), tmp_path / "a.parquet")

    def texts(name, *fields):
        return [item.text for item in read_items(Benchmark(str(tmp_path / name), fields))]

    for name in ("a.jsonl", "a.json"):
        assert texts(name) == ["one two", "three", "four", "five", "six"]
        assert texts(name, "more.deep") == ["three", "five", "six"]
    assert texts("a.csv") == ["one two", "three"]
    assert texts("a.txt") == texts("a.parquet") == ["one two", "four"]
    with pytest.raises(ConfigError, match="no item has a text under absent"):
        texts("a.csv", "absent")


def test_canaries_drop_a_document(bench):
    stage = Decontaminate(benchmarks=(bench,), canaries=("MY-MARK",))
    guid = "26b5c67b-86ad-4e3e-8f7c-0123456789ab"
    texts = [f"BENCHMARK DATA ... canary GUID {guid}", "here is my-mark", "a canary sang"]
    reasons = [stage.reason(stage.signals(text)) for text in texts]
    assert reasons == ["decontaminate: canary", "decontaminate: canary", None]


def test_spans_are_cut_with_their_margin_and_what_is_left_too_short_goes(bench):
    stage = DecontaminateSpans(benchmarks=(bench,), margin=5, min_characters=100)
    text = AROUND * 3 + LONG + " " + AROUND * 3
    left, reason = stage.apply(text)
    end = len(AROUND) * 3 + len(LONG) - 1  # the last mark is no part of a word
    assert reason is None and left == text[: len(AROUND) * 3 - 5] + text[end + 5 :]
    assert stage.apply(AROUND) == (AROUND, None)
    assert stage.apply(LONG)[1] == "decontaminate: little left"


def test_a_curation_drops_contaminated_documents_and_shows_why(bench, tmp_path):
    texts = [AROUND * 2 + str(i) for i in range(5)] + [AROUND + LONG]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = CurationConfig(
        sources=(Jsonl(str(tmp_path / "rows.jsonl")),),
        stages=(Decontaminate(benchmarks=(bench,)),),
        validation_fraction=0.0,
        test_fraction=0.0,
    )
    assert build(CurationConfig, to_dict(config)) == config
    datasets = curate(config, tmp_path / "w", log=lambda line: None)
    assert sorted(d["text"] for d in datasets["train"]) == texts[:5]
    assert datasets["train"].manifest["dropped"] == {"decontaminate: benchmark": 1}
    with pytest.raises(ConfigError, match="give benchmarks="):
        Decontaminate().files()


def test_the_report_says_which_items_stand_in_the_corpus(bench, tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    half = " ".join(LONG.split()[:15])
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in (AROUND, half + "<b>", AROUND)))
    scores = tmp_path / "scores.jsonl"
    rows = [{"benchmark": "bench.jsonl", "item": i, "score": 1 - i} for i in range(2)]
    scores.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["report", "--corpus", str(corpus), "--benchmarks", f"{bench.path}:question"]
    assert main([*command, "--scores", str(scores), "--out", str(tmp_path / "out")]) == 0
    assert "1 of 2 items hit (50.00%), 0 for the most part" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = report["benchmarks"]
    assert (row["items_hit"], row["dirty_score"], row["clean_score"]) == ([0], 1.0, 0.0)
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<mark>{half}</mark>&lt;b&gt;" in page and not re.search(r"<b>(?!item)", page)


def test_a_whole_item_is_covered(bench):
    report = corpus_report([{"id": "x", "text": LONG}, {"id": "y", "text": SHORT}], [bench])
    assert (report["benchmarks"][0]["hit"], report["benchmarks"][0]["covered"]) == (2, 2)


def test_min_k_is_the_mean_of_the_unlikeliest_tokens():
    assert min_k(np.array([-1.0, -9.0, -3.0, -5.0]), 0.5) == -7
    assert min_k(np.array([-4.0]), 0.2) == -4


def test_a_model_that_knows_the_items_is_found_out():
    def knows(texts):
        return [np.full(10, -0.1 if "known" in text else -3.0) for text in texts]

    assert membership_report(knows, ["known 1", "known 2"], ["new 1", "new 2"])["area_under_roc"] == 1
    assert membership_report(knows, ["a", "b"], ["c", "d"])["area_under_roc"] == 0.5

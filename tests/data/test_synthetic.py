"""Synthetic data with a model that is a function: what is asked, what is taken, and that nothing is asked twice."""

import dataclasses
import json

import pyarrow.parquet as pq
import pytest

from configs import ConfigError
from data import open_dataset, write_dataset
from data.endpoint import Endpoint
from data.synthetic.accept import Accept, copied, diversity, unlike
from data.synthetic.config import Mix, SyntheticConfig
from data.synthetic.documents import Rephrase, Textbook
from data.synthetic.instructions import Backtranslate, EvolInstruct, QuestionAnswer, SelfInstruct
from data.synthetic.run import synthesise
from data.synthetic.sandbox import run_python, without_bodies
from data.synthetic.verified import Code, Reasoning
from data.tasks import TaskSpec
from tests.data.served import served

ASKED = []
WORDS = [f"{a}{b}" for a in ("stone", "river", "cloud", "field", "light", "grain") for b in "abcdefghij"]


def words_of(seed, count=60):
    """Words that depend on a number alone."""
    return " ".join(WORDS[(seed * 7919 + i * (seed % 13 + 1)) % len(WORDS)] for i in range(count))


def writer(model):
    """A model that answers by the request's own seed, in the form that the last message asks for."""

    def answer(request):
        ASKED.append(request)
        asked, seed = request["messages"][-1]["content"], request["seed"]
        if model == "failing" and seed % 3 == 0:
            raise RuntimeError("overloaded")
        if "Question:" in asked and "Answer:" in asked or 'begins with "Question:"' in asked:
            return f"Question: What is {words_of(seed, 5)}?\nAnswer: It is {words_of(seed)}."
        if "from 1 (not at all) to 5" in asked:
            return f"It fits.\n{seed % 5 + 1}"
        if model == "refusing" and seed % 2:
            return "I'm sorry, but I cannot help with that request, as it is not for me."
        return f"{words_of(seed)}."

    return answer


def solver(model):
    """Right on every second sample, and without the form on some."""

    def answer(request):
        total = eval(request["messages"][-1]["content"].split("problem: ")[-1].split(" =")[0])
        kind = request["seed"] % 3
        return [f"I add. <answer>{total}</answer>", f"Wrong. <answer>{total + 1}</answer>", f"{total}"][kind]

    return answer


FUNCTION = "def double(x):\n    return 2 * x"


def coder(model):
    tests = {
        "good": "assert double(2) == 4",
        "wrong": "assert double(2) == 5",
        "empty": "assert True",
        "none": "print(double(2))",
        "endless": "assert double(2) == 4\nwhile True: pass",
    }

    def answer(request):
        kind = request["messages"][-1]["content"].split("kind ")[1].split()[0]
        return f"Doubles a number.\n```python\n{FUNCTION}\n```\n```python\n{tests[kind]}\n```"

    return answer


@pytest.fixture
def corpus(tmp_path):
    rows = [
        {
            "id": f"d{i}",
            "text": f"Document {i} tells of {words_of(i, 80)}.",
            "source": "made",
            "licence": "CC0",
            "metadata": {},
        }
        for i in range(12)
    ]
    size = sum(len(row["text"]) for row in rows)
    return write_dataset(tmp_path / "real", rows, "text", {"characters": size}).folder


def config(corpus, recipe, model="plain", function="writer", **changes):
    endpoint = Endpoint(generate=f"tests.data.test_synthetic:{function}", model=model, retries=0)
    return SyntheticConfig(recipe=recipe, seeds=str(corpus), endpoint=endpoint, **changes)


def test_rephrased_rows_say_where_they_are_from(corpus, tmp_path):
    report = synthesise(config(corpus, Rephrase(), mix=Mix(max_share=1.0)), tmp_path / "w")
    rows = list(open_dataset(tmp_path / "w" / "text"))
    assert report["jobs"] == 24 and report["taken"] == len(rows) > 15
    for row in rows:
        made = row["metadata"]["synthetic"]
        seed, variant = row["id"].split("#")
        assert (made["recipe"], made["model"], made["seed"], made["variant"]) == (
            "Rephrase",
            "plain",
            seed,
            int(variant),
        )
        assert row["metadata"]["group"] == seed and row["licence"] == "CC0" and len(made["requests"]) == 1
    total = report["taken"] + sum(report["rejected"].values())
    assert total == 24 and pq.read_table(tmp_path / "w" / "rejected.parquet").num_rows == 24 - len(rows)


def test_a_second_run_asks_nothing_and_a_killed_one_goes_on_to_the_same_bytes(corpus, tmp_path, monkeypatch):
    made = config(corpus, Textbook(variants=2))
    synthesise(made, tmp_path / "whole")
    ASKED.clear()
    again = synthesise(made, tmp_path / "whole")
    assert ASKED == [] and again["from_cache"] == again["requests"] == 24
    real, answers = Textbook.answered, []

    def dying(self, *args):
        answers.append(args)
        if len(answers) > 7:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Textbook, "answered", dying)
    with pytest.raises(KeyboardInterrupt):
        synthesise(made, tmp_path / "cut")
    monkeypatch.setattr(Textbook, "answered", real)
    ASKED.clear()
    report = synthesise(made, tmp_path / "cut")
    assert report["from_cache"] >= 8 and len(ASKED) == 24 - report["from_cache"]
    whole, cut = (open_dataset(tmp_path / name / "text").manifest["sha256"] for name in ("whole", "cut"))
    assert whole == cut


def test_refusals_and_failures_are_rejected_with_their_reason(corpus, tmp_path):
    refused = synthesise(config(corpus, Rephrase(styles=("easy",)), "refusing"), tmp_path / "a")
    assert refused["rejected"]["refusal"] > 2
    failed = synthesise(config(corpus, Rephrase(styles=("easy", "hard")), "failing"), tmp_path / "b")
    reason = next(name for name in failed["rejected"] if name.startswith("failed"))
    assert failed["failed"] == failed["rejected"][reason] > 2
    ASKED.clear()
    synthesise(config(corpus, Rephrase(styles=("easy", "hard")), "failing"), tmp_path / "b")
    assert len(ASKED) == failed["failed"]  # what failed is asked again, and nothing else


def test_synthetic_text_stays_within_its_share_and_real_text_stays(corpus, tmp_path):
    recipe = Rephrase(styles=("easy", "medium", "hard"))
    report = synthesise(config(corpus, recipe, mix=Mix(max_share=0.25)), tmp_path / "w")
    share = report["share"]
    assert 0.1 < share["synthetic_share"] <= 0.25 and report["rejected"]["share: beyond max_share"] > 0
    weights = json.loads((tmp_path / "w" / "mixture.json").read_text())
    assert weights == {
        str(corpus): 1 - share["synthetic_share"],
        str(tmp_path / "w" / "text"): share["synthetic_share"],
    }
    replaced = config(corpus, Rephrase(styles=("easy",)), mix=Mix(max_share=0.9, mode="replace"))
    synthesise(replaced, tmp_path / "r")
    left = {row["id"] for row in open_dataset(tmp_path / "r" / "real")}
    used = {row["metadata"]["synthetic"]["seed"] for row in open_dataset(tmp_path / "r" / "text")}
    assert left | used == {f"d{i}" for i in range(12)} and not left & used


@pytest.mark.parametrize(
    "recipe, rounds", [(QuestionAnswer(), 1), (SelfInstruct(variants=1), 2), (EvolInstruct(rounds=2), 3)]
)
def test_recipes_of_dialogues_ask_in_rounds_and_answer_what_they_ended_with(corpus, tmp_path, recipe, rounds):
    ASKED.clear()
    report = synthesise(config(corpus, recipe), tmp_path / "w")
    rows = [json.loads(line) for line in (tmp_path / "w" / "chat.jsonl").read_text().splitlines()]
    assert report["requests"] == len(ASKED) == 12 * rounds and len(rows) == report["taken"] > 5
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert len(row["metadata"]["synthetic"]["requests"]) == rounds
    if rounds > 1:  # the last request is the question of the row, bare
        asked = {request["messages"][-1]["content"] for request in ASKED}
        assert all(row["messages"][0]["content"] in asked for row in rows)


def test_backtranslated_instructions_are_kept_by_their_score_with_the_document_as_answer(corpus, tmp_path):
    similar = Accept(max_similarity=1.0)
    every = synthesise(config(corpus, Backtranslate(min_score=0), accept=similar), tmp_path / "a")
    some = synthesise(config(corpus, Backtranslate(min_score=4), accept=similar), tmp_path / "b")
    assert 0 < some["taken"] < every["taken"] == 12 and some["rejected"]["judged: a score of 1"] > 0
    texts = {row["text"] for row in open_dataset(corpus)}
    for line in (tmp_path / "b" / "chat.jsonl").read_text().splitlines():
        assert json.loads(line)["messages"][1]["content"] in texts


def test_only_traces_that_the_verifier_accepts_are_kept_one_of_a_problem(tmp_path):
    task = TaskSpec("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2})
    recipe = Reasoning((task,), problems=10, variants=4, instruction="End with <answer>...</answer>.")
    made = config("", recipe, function="solver", accept=Accept(min_characters=1, max_similarity=1.0))
    report = synthesise(made, tmp_path / "w")
    rows = [json.loads(line) for line in (tmp_path / "w" / "chat.jsonl").read_text().splitlines()]
    assert 5 < len(rows) <= 10 and len({row["metadata"]["synthetic"]["seed"] for row in rows}) == len(rows)
    for row in rows:
        question, answer = (m["content"] for m in row["messages"])
        total = eval(question.split("problem: ")[-1].split(" =")[0])
        assert f"<answer>{total}</answer>" in answer
    assert report["rejected"]["verifier: wrong"] > 0
    assert report["rejected"]["verifier: no answer in the asked form"] > 0


def test_code_is_kept_when_its_tests_pass_and_test_something(tmp_path):
    kinds = ["good", "wrong", "empty", "none", "endless"]
    (tmp_path / "s.jsonl").write_text(
        "".join(json.dumps({"text": f"of kind {kind} please"}) + "\n" for kind in kinds)
    )
    recipe = Code(seconds=3)
    made = config(tmp_path / "s.jsonl", recipe, function="coder", accept=Accept(min_characters=1))
    report = synthesise(made, tmp_path / "w")
    assert report["taken"] == 1 and report["rejected"] == {
        "tests: AssertionError": 1,
        "tests: none": 1,
        "tests: pass without the function": 1,
        "tests: timeout": 1,
    }
    row = json.loads((tmp_path / "w" / "chat.jsonl").read_text())
    assert (
        FUNCTION in row["messages"][1]["content"] and "assert double(2) == 4" in row["messages"][0]["content"]
    )


def test_given_tests_are_run_instead_of_the_models_own(tmp_path):
    rows = [
        {"text": "Double it, kind wrong .", "tests": t}
        for t in ("assert double(3) == 6", "assert double(3) == 7")
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = config(tmp_path / "s.jsonl", Code(), function="coder", tests_field="tests")
    report = synthesise(dataclasses.replace(made, accept=Accept(min_characters=1)), tmp_path / "w")
    assert report["taken"] == 1 and report["rejected"] == {"tests: AssertionError": 1}


def test_the_sandbox_bounds_time_memory_and_files(tmp_path):
    assert run_python("x = 1", 5, 512) == (True, "")
    assert run_python("while True: pass", 1, 512) == (False, "timeout")
    assert run_python("x = bytearray(10**9)", 5, 256) == (False, "MemoryError")
    assert not run_python("open('f', 'wb').write(bytes(1 << 22))", 5, 512)[0]
    assert run_python(f"open({str(tmp_path / 'seen')!r}, 'r')", 5, 512) == (False, "FileNotFoundError")
    assert without_bodies("def f(x):\n    return x\ny = 1") == "def f(x):\n    pass\ny = 1"


def test_a_served_model_is_asked_as_openai_clients_do_and_dialogues_are_tokenized(corpus, tmp_path, bpe):
    bpe.save(tmp_path / "tokenizer")
    with served(lambda request: writer("plain")(request)) as (base_url, seen):
        endpoint = Endpoint(base_url=base_url, model="m", retries=0)
        made = SyntheticConfig(
            QuestionAnswer(), str(corpus), endpoint=endpoint, tokenizer=str(tmp_path / "tokenizer")
        )
        report = synthesise(made, tmp_path / "w")
    assert len(seen) == 12 and seen[0]["model"] == "m" and report["tokens"] == 12 * 7
    assert len(open_dataset(tmp_path / "w" / "chat")) == report["taken"] > 5


def test_what_is_missing_is_an_error_with_the_mend(corpus, tmp_path):
    with pytest.raises(ConfigError, match="base_url"):
        synthesise(SyntheticConfig(seeds=str(corpus)), tmp_path / "w")
    with pytest.raises(ConfigError, match="config.seeds is not given"):
        synthesise(SyntheticConfig(), tmp_path / "w")
    with pytest.raises(ValueError, match="max_share"):
        Mix(max_share=0)


def test_near_duplicates_and_copies_are_told_by_their_words():
    a, b = words_of(3, 80), words_of(4, 80)
    near = a.replace(a.split()[10], "other", 1)
    assert [like for _, like in unlike([("a", a), ("b", b), ("c", near), ("d", a)], 0.7)] == [
        None,
        None,
        "a",
        "a",
    ]
    assert [like for _, like in unlike([("a", a), ("c", near)], 1.0)] == [None, None]
    assert copied(a, f"{b} {a}") == 1.0 and copied(a, b) < 0.2
    assert diversity(["a b c", "a b d"]) == {"distinct_2": 0.75, "first_words": 1.0}

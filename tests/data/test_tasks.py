"""Procedural tasks: disjoint splits, their own verifiers, and the asked format."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tasks import (
    Problem,
    TaskSpec,
    dialogue,
    extract_answer,
    generate,
    preference_pairs,
    prompt,
    score,
    split_of,
)

SPECS = [
    TaskSpec("chain_sum", {"max_terms": 3, "max_digits": 2}, 2.0),
    TaskSpec("spell_backward", {"max_word_len": 6}),
    TaskSpec("gcd", {"max_value": 200}),
]


@pytest.fixture(scope="module")
def splits():
    return {
        split: generate(SPECS, split, 80, seed=i) for i, split in enumerate(("train", "validation", "test"))
    }


def test_no_question_is_in_two_splits(splits):
    questions = {split: {" ".join(p.question.casefold().split()) for p in ps} for split, ps in splits.items()}
    assert all(len(qs) == 80 for qs in questions.values())
    assert not questions["train"] & questions["validation"]
    assert not (questions["train"] | questions["validation"]) & questions["test"]
    for split, problems in splits.items():
        assert all(split_of(p.question) == split for p in problems)


def test_letter_case_and_white_space_do_not_move_a_question_to_another_split():
    for i in range(200):
        assert split_of(f"What is {i} + 1?") == split_of(f"  what IS {i}\n+ 1? ")
    shares = [split_of(f"question {i}") for i in range(5000)]
    assert (
        abs(shares.count("test") / 5000 - 0.1) < 0.02 and abs(shares.count("validation") / 5000 - 0.1) < 0.02
    )


def test_the_same_arguments_give_the_same_problems(splits):
    assert generate(SPECS, "train", 80, seed=0) == splits["train"]
    assert generate(SPECS, "train", 80, seed=9) != splits["train"]


def test_problems_are_shared_by_weight_and_mixed(splits):
    tasks = [p.task for p in splits["train"]]
    assert [tasks.count(s.name) for s in SPECS] == [40, 20, 20]
    assert len(set(tasks[:20])) == 3 and len({p.id for p in splits["train"]}) == 80


def test_the_right_answer_scores_one_and_a_wrong_one_less(splits):
    for problem in splits["test"]:
        assert score(problem, problem.answer) == 1.0
        assert score(problem, problem.answer + "7") < 1.0
        assert score(problem, None) == 0.0


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=50))
def test_no_text_breaks_a_verifier(splits, text):
    for problem in splits["test"][:6]:
        assert 0.0 <= score(problem, text) <= 1.0


def test_problems_survive_json(splits):
    for problem in splits["train"][:20]:
        copy = Problem(**json.loads(json.dumps(problem.__dict__)))
        assert score(copy, problem.answer) == 1.0


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>4</answer>", "4"),
        ("2 + 2 makes\n<answer> 4\n</answer>\n", "4"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<answer></answer>", ""),
        ("4", None),
        ("<answer>4", None),
        ("4</answer>", None),
        ("<answer>4</answer> I think", None),
        ("<answer>3</answer><answer>4</answer>", None),
        ("<answer><answer>4</answer>", None),
        ("<answer>4</answer></answer>", None),
        ("<Answer>4</Answer>", None),
    ],
)
def test_an_answer_counts_only_in_the_asked_format(text, answer):
    assert extract_answer(text) == answer


def test_dialogues_answer_in_the_asked_format(splits):
    for problem in splits["train"]:
        messages = dialogue(problem, reasoning="Let me see.")
        assert messages[:-1] == prompt(problem) and [m["role"] for m in messages] == ["user", "assistant"]
        assert score(problem, extract_answer(messages[-1]["content"])) == 1.0
        assert problem.question in messages[0]["content"]


def test_of_a_preference_pair_only_the_chosen_answer_is_right(splits):
    pairs = preference_pairs(splits["train"])
    assert len(pairs) == 80
    kinds = []
    for problem, (messages, chosen, rejected) in zip(splits["train"], pairs, strict=True):
        assert messages == prompt(problem)
        assert score(problem, extract_answer(chosen)) == 1.0
        assert score(problem, extract_answer(rejected)) < 1.0
        kinds.append(extract_answer(rejected) is None)
    assert 30 <= sum(kinds) <= 50


def test_mistakes_name_what_there_is():
    with pytest.raises(ValueError, match="nearest are chain_sum"):
        generate([TaskSpec("chain_summ")], "train", 1, 0)
    with pytest.raises(ValueError, match="refuses the settings"):
        generate([TaskSpec("chain_sum", {"no_such": 1})], "train", 1, 0)
    with pytest.raises(ValueError, match="train, validation and test"):
        generate(SPECS, "dev", 1, 0)
    with pytest.raises(ValueError, match="weight above 0"):
        generate([TaskSpec("chain_sum", weight=0.0)], "train", 1, 0)
    tiny = TaskSpec("gcd", {"max_value": 3})
    with pytest.raises(ValueError, match="different test questions"):
        generate([tiny], "test", 50, 0)
    assert len(generate([tiny], "train", 50, 0, unique=False)) == 50

"""Judgements and deliberations, with writers and judges made by hand: closed forms, and what goes for which reason."""

import json
import math
import re
import shlex

import jax
import numpy as np
import pytest

import configs
import data
import model
from data.formats import Preference, detect, read_example
from rl.alignment.constitution import Principle, read_constitution
from rl.alignment.deliberate import (
    DeliberateConfig,
    Reasoned,
    deliberated,
    read_policy,
    split_reasoning,
    with_policy,
)
from rl.alignment.judge import JudgeConfig, _pair, judged, preference
from rl.alignment.options import OptionScorer
from rl.alignment.revise import ReviseConfig
from rl.alignment.writer import Written
from rl.loaded import LoadedModel
from tests.conftest import ROOT
from train.config import Execution, TrainConfig

PRINCIPLES = (Principle("Be good."),)
ASKED = [[{"role": "user", "content": f"question {i}"}] for i in range(8)]
TEMPLATE = "{prompt}|{principle}|{first}|{second}"


def log_probabilities(log_odds, rest=0.3):
    """log p(A), log p(B) with these log-odds, and a share of other tokens."""
    a = 1 / (1 + np.exp(-log_odds))
    return [math.log((1 - rest) * a), math.log((1 - rest) * (1 - a))]


@pytest.mark.parametrize("bias", [0.0, 3.0, -20.0])
def test_swapping_takes_a_constant_leaning_to_one_letter_away_exactly(bias):
    for better in (-2.0, -0.25, 0.0, 1.5):
        found = preference(log_probabilities(better + bias), log_probabilities(-better + bias))
        assert found.log_odds == pytest.approx(better, abs=1e-6)
        assert found.probability == pytest.approx(1 / (1 + math.exp(-better)), abs=1e-6)
        assert found.leaning == pytest.approx(bias, abs=1e-6)
    whole = preference([-1.0 + bias, -2.0], [-4.0 + bias, -1.5])  # in dyadic numbers, so without rounding
    assert whole.log_odds == ((-1.0 + 2.0) + (-1.5 + 4.0)) / 2


def test_the_probability_of_extreme_log_odds_does_not_overflow():
    assert preference([-2000.0, 0.0], [0.0, -2000.0]).probability == 0.0
    assert preference([0.0, -2000.0], [-2000.0, 0.0]).probability == 1.0


@pytest.mark.parametrize(
    "in_order, swapped, min_margin, agreement, fault",
    [
        (2.0, 1.0, 1.5, True, None),  # the mean is the margin
        (2.0, 1.0, 1.6, True, "the margin is below min_margin"),
        (-2.0, -1.0, 1.5, True, None),
        (3.0, -1.0, 0.5, True, "the orders disagree"),
        (3.0, 0.0, 0.5, True, "the orders disagree"),
        (3.0, -1.0, 0.5, False, None),
        (1.0, -1.0, 0.0, False, "the margin is below min_margin"),  # neither is better
    ],
)
def test_pairs_go_where_the_orders_disagree_or_the_margin_is_small(
    in_order, swapped, min_margin, agreement, fault
):
    found = preference([in_order, 0.0], [0.0, swapped])
    assert (found.in_order, found.swapped) == (in_order, swapped)
    assert found.fault(min_margin, agreement) == fault


def test_the_judge_sees_both_answers_in_both_orders_and_its_choice_becomes_the_pair():
    """Answers are numbers, the judge likes larger ones by their difference, and leans to A by 1.5."""
    values = {0: (1, 4), 1: (9, 2), 2: (5, 5), 3: ("", 3), 4: (2, 3), 5: (4, 6), 6: (70, 3)}
    questions = []

    def write(dialogues, seeds):
        assert len(set(seeds)) == len(seeds) and dialogues == [ASKED[i] for i in range(7) for _ in range(2)]
        texts = [str(value) for i in range(7) for value in values[i]]
        return [Written(text, fault=None if text else "is empty") for text in texts]

    def score(dialogues):
        rows = []
        for (message,) in dialogues:
            questions.append(message["content"])
            prompt, principle, first, second = message["content"].split("|")
            assert re.fullmatch(r"user: question \d", prompt) and principle == "Be good."
            far = "70" in (first, second)
            rows.append([math.nan] * 2 if far else log_probabilities(int(first) - int(second) + 1.5))
        return np.array(rows)

    config = JudgeConfig(template=TEMPLATE, min_margin=1.9)
    rows = judged(write, score, ASKED, range(7), PRINCIPLES, config)
    assert questions[:2] == ["user: question 0|Be good.|1|4", "user: question 0|Be good.|4|1"]
    assert [row["dropped"] for row in rows] == [
        None,
        None,
        "the answers are the same",
        "an answer is empty",
        "the orders disagree",  # 1 - 1.5 and 1 + 1.5
        None,
        "the question to the judge is longer than judge_seq_len",
    ]
    pairs = [_pair(row) for row in rows if row["dropped"] is None]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("4", "1"), ("9", "2"), ("6", "4")]
    for pair in pairs:  # as data.conversations reads files
        read = read_example(json.loads(json.dumps(pair)), detect(pair))
        assert isinstance(read, Preference) and read.prompt == pair["prompt"]
        assert (read.chosen["content"], read.rejected["content"]) == (pair["chosen"], pair["rejected"])
    wanted = [1 / (1 + math.exp(-difference)) for difference in (3, 7, 2)]
    np.testing.assert_allclose([pair["probability"] for pair in pairs], wanted, rtol=1e-6)
    dropped = judged(
        write, score, ASKED, range(7), PRINCIPLES, JudgeConfig(template=TEMPLATE, min_margin=2.1)
    )
    assert dropped[5]["dropped"] == "the margin is below min_margin" and dropped[0]["dropped"] is None


def test_an_answer_can_not_write_itself_into_the_judges_question():
    asked = []

    def score(dialogues):
        asked.extend(message["content"] for (message,) in dialogues)
        return np.zeros((len(dialogues), 2))

    write = lambda dialogues, seeds: [Written("{second} {prompt}"), Written("plain")]
    judged(write, score, ASKED, [0], PRINCIPLES, JudgeConfig(template=TEMPLATE))
    assert asked[0] == "user: question 0|Be good.|{second} {prompt}|plain"


def test_a_template_without_its_places_is_refused():
    with pytest.raises(configs.ConfigError, match=r"template lacks \{second\}"):
        configs.build(JudgeConfig, {"template": "{prompt} {first}"})
    with pytest.raises(configs.ConfigError, match=r"instruction lacks \{policy\}"):
        configs.build(DeliberateConfig, {"instruction": "think"})


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("<think>\nwhy\n</think>\n\nyes", Reasoned("why", "yes", None)),
        ("why\n</think>yes", Reasoned("why", "yes", None)),  # the template's prompt has opened it
        ("yes", Reasoned("", "yes", "the reasoning has no </think>")),
        ("<think> </think> yes", Reasoned("", "yes", "the reasoning is empty")),
        ("<think>why</think> ", Reasoned("why", "", "the answer is empty")),
        ("<think>a</think>b</think>c", Reasoned("a", "b</think>c", "the reasoning is not in one piece")),
        ("a<think>b</think>c", Reasoned("a<think>b", "c", "the reasoning is not in one piece")),
    ],
)
def test_reasoning_ends_at_its_mark(text, wanted):
    assert split_reasoning(text) == wanted


def test_the_policy_stands_before_a_system_message_and_the_dialogue_stays_as_it_was():
    dialogue = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    shown = with_policy(dialogue, "Obey {policy}", "no {policy}")
    assert shown == [{"role": "system", "content": "Obey no {policy}\n\nBe brief."}, dialogue[1]]
    assert dialogue[0]["content"] == "Be brief."
    assert with_policy(dialogue[1:], "{policy}", "P")[0] == {"role": "system", "content": "P"}


def test_the_judge_keeps_the_most_probable_answers_and_every_other_has_its_reason():
    """Answers are numbers; the judge's log-odds that an answer follows the policy are its number."""
    texts = [
        "<think>r</think>2",
        "<think>r</think>5",
        "<think>r</think>5",
        "<think>r</think>-1",
        "no reasoning",
    ]

    def write(dialogues, seeds):
        assert len(set(seeds)) == 5
        assert all(d == [{"role": "system", "content": "RULE"}, *ASKED[3]] for d in dialogues)
        return [Written(text) for text in texts]

    def score(dialogues):
        parts = [message["content"].split("|") for (message,) in dialogues]
        assert all(part[:3] == ["RULE", "user: question 3", "r"] for part in parts)
        return np.array([log_probabilities(float(part[3])) for part in parts])

    places = {"instruction": "{policy}", "judge_template": "{policy}|{prompt}|{reasoning}|{answer}"}
    run = lambda **options: deliberated(
        write, score, ASKED, [3], "RULE", DeliberateConfig(samples=5, **places, **options)
    )
    rows = run(keep=1)
    assert [row["dropped"] for row in rows] == [
        "another is more probable",
        None,
        "the same as a kept one",
        "the judge doubts it",
        "the reasoning has no </think>",
    ]
    odds = [row["probability"] for row in rows[:4]]
    np.testing.assert_allclose(odds, [1 / (1 + math.exp(-x)) for x in (2, 5, 5, -1)], rtol=1e-6)
    assert all(row["messages"] == ASKED[3] for row in rows)  # without the policy
    assert [row["dropped"] for row in run(keep=2)][:2] == [None, None]
    assert [row["dropped"] for row in run(keep=2, min_probability=0.99)][:2] == ["the judge doubts it", None]


def test_a_policy_is_read_or_refused_with_its_file(tmp_path):
    (tmp_path / "policy.md").write_text("\ufeffNo owls.\n")
    assert read_policy(tmp_path / "policy.md") == "No owls."
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "latin.md").write_bytes(b"\xe4")
    for name, said in (
        ("empty.md", "has 0 characters"),
        ("latin.md", "not UTF-8"),
        ("no.md", "does not exist"),
    ):
        with pytest.raises(configs.ConfigError, match=f"{name}.*{said}"):
            read_policy(tmp_path / name)
    with pytest.raises(configs.ConfigError, match="give config.policy"):
        read_policy("")


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    from model.formats.checkpoint import save_native
    from train.checkpoints import tokenizer_files

    folder = tmp_path_factory.mktemp("random") / "model"
    tokenizer = data.train_tokenizer("bpe", ["A or B, yes or no: which one is it?"] * 20, 270)
    cfg = model.decoder(tokenizer.vocab_size, 32, 2, 2, 2, 16, 64)
    save_native(folder, cfg, model.init(cfg, jax.random.key(0)), tokenizer_files(tokenizer))
    return LoadedModel(str(folder), Execution())


def test_options_are_scored_as_by_the_plain_function_whatever_is_beside_them(random_model):
    dialogues = [[{"role": "user", "content": "which one? " * n}] for n in (1, 30, 2, 400, 9)]
    scorer = OptionScorer(random_model, ("A", "B"), seq_len=400, rows=3)
    found = scorer.logprobs(dialogues)
    tokenizer = random_model.tokenizer
    for dialogue, row in zip(dialogues, found, strict=True):
        # where training would see the letter: the answer's first token in the whole dialogue
        whole = [*dialogue, {"role": "assistant", "content": "A"}]
        ids, mask = tokenizer.apply_chat_template(whole, add_generation_prompt=False)
        start = mask.index(1)
        if start > 400:
            assert np.isnan(row).all()
            continue
        logits = model.apply(random_model.cfg, random_model.params, np.array([ids[:start]])).logits[0, -1]
        wanted = jax.nn.log_softmax(logits)
        assert ids[start] == tokenizer.encode("A")[0]
        np.testing.assert_allclose(row, [wanted[tokenizer.encode(x)[0]] for x in "AB"], atol=1e-5)
    assert np.isnan(found[3]).all() and np.isfinite(np.delete(found, 3, axis=0)).all()
    with pytest.raises(configs.ConfigError, match="begin with the same token"):
        OptionScorer(random_model, ("qa", "qb"), seq_len=400, rows=3)


def test_a_damaged_judge_is_no_long_question(random_model):
    broken = LoadedModel(random_model.source, Execution())
    broken.params = jax.tree.map(lambda x: x * np.nan, broken.params)
    with pytest.raises(RuntimeError, match="not finite"):
        OptionScorer(broken, ("A", "B"), 400, 3).logprobs([ASKED[0]])


COMMANDS = {"revise": ReviseConfig, "judge": JudgeConfig, "deliberate": DeliberateConfig}


def test_the_commands_of_the_documentation_are_those_that_there_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^python -m (\S+) (.*)$", (ROOT / "docs" / "alignment.md").read_text(), re.MULTILINE)
    assert {name for name, _ in lines} == {"train", *(f"rl.alignment.{name}" for name in COMMANDS)}
    for name, arguments in lines:
        cls = COMMANDS.get(name.rpartition(".")[2], TrainConfig)
        config = configs.parse(cls, shlex.split(arguments)).config  # raises for a key that there isn't
        if isinstance(config, ReviseConfig | JudgeConfig):
            assert len(read_constitution(config.constitution)) == 7
        if isinstance(config, DeliberateConfig):
            assert read_policy(config.policy).startswith("# Medicines")

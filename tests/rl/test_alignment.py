"""Constitutions, prompts and revisions, with a writer made by hand."""

import dataclasses
import json
import re

import numpy as np
import pytest

import configs
import data
from data import SpecialTokens
from data.chat import DEFAULT_SPECIAL_TOKENS
from rl.alignment.constitution import CRITIQUE, Principle, draw, fill, read_constitution
from rl.alignment.revise import revised
from rl.alignment.writer import Written, text_of
from rl.prompts import read_prompts

MARKDOWN = """# Kindness

An introduction, which is
no principle.

- Answers are kind
  even where the user is not.
  - critique: What is unkind? Principle: {principle}
  - Revision: Mend it.

1. Answers are short
and to the point.

A paragraph at the end.
* Answers are {principle} true.
"""


def test_a_constitution_is_a_list_in_markdown_or_json(tmp_path):
    (tmp_path / "c.md").write_text(MARKDOWN)
    kind, short, true = read_constitution(tmp_path / "c.md")
    assert kind.text == "Answers are kind even where the user is not."
    assert kind.critique_request == f"What is unkind? Principle: {kind.text}"
    assert kind.revision_request == "Mend it."
    assert short.text == "Answers are short and to the point."
    assert short.critique == CRITIQUE and short.text in short.critique_request
    assert true.critique_request.count("{principle}") == 1  # of the principle itself: not filled in again
    rows = [{"text": kind.text, "critique": kind.critique, "revision": kind.revision}, short.text, true.text]
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    assert read_constitution(tmp_path / "c.json") == (kind, short, true)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_constitution(tmp_path / "c.jsonl") == (kind, short, true)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("c.md", "- Kind.\n- Kind.\n", r"c.md, line 2: the principle of line 1 again"),
        ("c.md", "# Title\n\n- \n", r"c.md, line 3: text is ''"),
        (
            "c.md",
            "- Kind.\n  - critic: Why?\n",
            r"line 2: an item that belongs to no principle: '- critic: Why\?'",
        ),
        (
            "c.md",
            "- Kind.\n  - critique: a\n  - critique: b\n",
            r"line 3: an item that belongs to no principle",
        ),
        ("c.md", "- Kind.\n  - critique:\n", r"c.md, line 1: critique is ''"),
        ("c.md", "Be kind.\n", r"c.md: holds no principle; wanted a list"),
        ("c.json", '[\n"Kind.",\n3]', r"c.json, line 3: 3 is no principle"),
        ("c.json", '[\n{"text": "Kind.",\n"critic": "a"}]', r"line 2: unknown key 'critic'; known are text"),
        ("c.json", '["Kind.",\n{"critique": "a"}]', r"c.json, line 2: a principle without 'text'"),
        ("c.json", '["Kind.",\n"', r"c.json, line 2: not valid JSON"),
        ("c.json", "[]", r"c.json: holds no principle; wanted an array"),
        ("c.json", json.dumps(["k" * 9000]), r"text has 9000 characters; at most 8000"),
        ("c.txt", "Kind.", r"c.txt: wanted one of .json"),
    ],
)
def test_a_constitutions_mistakes_are_named_by_file_and_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(configs.ConfigError, match=said):
        read_constitution(tmp_path / name)
    with pytest.raises(configs.ConfigError, match="does not exist"):
        read_constitution(tmp_path / f"no_{name}")


def test_a_principle_is_drawn_for_each_prompt_and_round_and_all_are_drawn():
    principles = tuple(Principle(str(i)) for i in range(4))
    drawn = [[draw(principles, 7, prompt, turn).text for turn in range(2)] for prompt in range(400)]
    assert drawn == [[draw(principles, 7, prompt, turn).text for turn in range(2)] for prompt in range(400)]
    counts = np.unique(np.array(drawn), return_counts=True)[1]
    assert counts.min() > 150  # of 200 expected; 150 lies four standard deviations below
    assert 0.15 < np.mean([a == b for a, b in drawn]) < 0.35  # rounds are drawn apart
    assert drawn != [[draw(principles, 8, p, t).text for t in range(2)] for p in range(400)]


def test_texts_are_put_into_a_template_in_one_pass():
    assert fill("{a} {b} {c}", a="{b}", b="\\1 {a}") == "{b} \\1 {a} {c}"


def test_prompts_come_from_datasets_and_from_dialogues(tmp_path):
    dialogue = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "abcd")]
    rows = [{"messages": dialogue}, {"messages": dialogue[:1]}, {"messages": dialogue[:3]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(tmp_path / "rows.jsonl") == [dialogue[:3], dialogue[:1], dialogue[:3]]
    records = [{"messages": dialogue[:n], "tools": None, "answer": None, "metadata": {}} for n in (1, 3)]
    data.write_dataset(tmp_path / "prompts", records, "prompt")
    assert read_prompts(tmp_path / "prompts") == [dialogue[:1], dialogue[:3]]
    assert read_prompts(tmp_path / "prompts", 1) == [dialogue[:1]]


@pytest.mark.parametrize(
    "row, said",
    [
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"nothing": 1}', "line 2: a row of no known format"),
        ("{", "line 2: not valid JSON"),
        ('{"prompt": "\\ud800"}', "line 2: the text is not valid Unicode"),
        (json.dumps({"prompt": "a", "tools": [{"name": "f"}]}), "line 2: a prompt with tools"),
    ],
)
def test_a_prompt_that_is_none_is_named_by_file_and_line(tmp_path, row, said):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' + row + "\n")
    with pytest.raises(configs.ConfigError, match=f"rows.jsonl, {said}"):
        read_prompts(tmp_path / "rows.jsonl")


PRINCIPLES = tuple(Principle(text, "critique by {principle}", "revise by {principle}") for text in "PQR")
ASKED = [[{"role": "user", "content": f"question {i}"}] for i in range(6)]


def scripted(dialogues, seeds):
    """Answers, critiques and revisions that say what they were made from."""
    made = []
    assert len(dialogues) == len(seeds)
    for dialogue in dialogues:
        last = dialogue[-1]["content"]
        if last.startswith("question"):
            made.append(Written(f"answer to {last}"))
        elif last.startswith("critique by"):
            made.append(Written(f"critique of <{dialogue[-2]['content']}> {last[-1]}"))
        else:
            assert last == f"revise by {dialogue[-3]['content'][-1]}"  # by the principle of the critique
            made.append(Written(f"revision of <{dialogue[-4]['content']}>"))
    return made


def test_each_round_criticises_and_revises_the_last_revision():
    rows = revised(scripted, ASKED, range(6), PRINCIPLES, rounds=2, seed=3)
    for i, row in enumerate(rows):
        first, second = row["rounds"]
        assert row["dropped"] is None and row["messages"] == ASKED[i]
        assert row["answer"] == f"answer to question {i}"
        assert first["principle"] == draw(PRINCIPLES, 3, i, 0).text
        assert first["critique"] == f"critique of <{row['answer']}> {first['principle']}"
        assert first["revision"] == f"revision of <{row['answer']}>"
        assert second["critique"] == f"critique of <{first['revision']}> {second['principle']}"
        assert second["revision"] == f"revision of <{first['revision']}>"


def test_a_prompt_is_the_same_whatever_is_beside_it():
    seeds = {}

    def write(dialogues, given):
        for dialogue, seed in zip(dialogues, given, strict=True):
            seeds.setdefault(json.dumps(dialogue), set()).add(seed)
        return scripted(dialogues, given)

    together = revised(write, ASKED, range(6), PRINCIPLES, 2, 3)
    assert [
        *revised(write, ASKED, [4, 5], PRINCIPLES, 2, 3),
        *revised(write, ASKED, [1], PRINCIPLES, 2, 3),
    ] == [
        *together[4:],
        together[1],
    ]
    assert all(len(given) == 1 for given in seeds.values()) and len(set.union(*seeds.values())) == len(seeds)


@pytest.mark.parametrize("fault", ["is empty", "never stops", "has no room in sampling.seq_len"])
def test_a_text_with_a_fault_drops_its_prompt_with_the_reason(fault):
    """The answer to question 0, the critique of question 1's, the revision of question 2's."""

    def write(dialogues, seeds):
        made = scripted(dialogues, seeds)
        for i, written in enumerate(made):
            if re.match("answer .*0|critique .*question 1|revision .*question 2", written.text):
                made[i] = dataclasses.replace(written, fault=fault)
        return made

    rows = revised(write, ASKED, range(4), PRINCIPLES, 1, 0)
    reasons = [f"the answer {fault}", f"a critique {fault}", f"a revision {fault}", None]
    assert [row["dropped"] for row in rows] == reasons
    assert [row["answer"] for row in rows] == [
        f"answer to question {i}" for i in range(4)
    ]  # kept for reading
    assert [len(row["rounds"]) for row in rows] == [0, 1, 1, 1]


def test_a_text_keeps_the_marks_of_reasoning_and_no_other_special_token():
    marked = SpecialTokens((*DEFAULT_SPECIAL_TOKENS, "<think>", "</think>"))
    for special in (marked, SpecialTokens()):
        tokenizer = data.train_tokenizer("bpe", ["why is it so? it is."] * 20, 262, special)
        begin, end = (
            [tokenizer.special_tokens[mark]] if special is marked else tokenizer.encode(mark)
            for mark in ("<think>", "</think>")
        )
        ids = [*begin, *tokenizer.encode("why?"), *end, *tokenizer.encode(" it is ")]
        ids = [tokenizer.special_tokens["<|im_start|>"], *ids, tokenizer.eos_ids[0]]
        assert text_of(tokenizer, ids) == "<think>why?</think> it is"

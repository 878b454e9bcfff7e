"""Synthetic text with a model that answers by rule: every row accounted for, kill and resume, tests that are run."""

import collections
import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import configs
from configs import ConfigError, build, to_dict
from data import open_dataset
from data.endpoint import Cache, Endpoint, Reply, append_line, ask_all
from data.synthetic import SyntheticConfig, synthesise
from data.synthetic.accept import Accepted, rouge_l
from data.synthetic.config import Accept
from data.synthetic.recipes import (
    Backtranslate,
    Code,
    EvolInstruct,
    Made,
    QuestionAnswer,
    Reasoning,
    Refused,
    Rephrase,
    Seed,
    SelfInstruct,
    Textbook,
)
from data.synthetic.sandbox import Sandbox, run_python
from tests.data import fake_model
from tests.data.served import served

FAKE = Endpoint(generate="tests.data.fake_model:generate", model="fake", concurrency=3)
EVERY = (
    Rephrase(styles=("easy", "qa")),
    Textbook(),
    QuestionAnswer(),
    Backtranslate(),
    SelfInstruct(),
    EvolInstruct(rounds=3),
    Reasoning(problems=6, samples=3),
)


@pytest.fixture
def seeds(tmp_path):
    path = tmp_path / "seeds.jsonl"
    texts = [f"Seed number {i} speaks about the matter {i * i} at some length." for i in range(5)]
    rows = [{"text": text} for text in [*texts, "Please refuse this.", "This one fails."]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(seeds, **changes):
    return SyntheticConfig(**({"seeds": str(seeds or ""), "endpoint": FAKE, "recipes": EVERY} | changes))


def run(config, workdir):
    return synthesise(config, workdir, log=lambda line: None)


def written(workdir):
    files = (p for p in workdir.rglob("*") if p.is_file() and "cache" not in p.parts)
    return {p.relative_to(workdir).as_posix(): p.read_bytes() for p in files}


def test_every_answer_is_a_row_or_rejected_with_its_reason(seeds, tmp_path):
    report = run(config(seeds), tmp_path / "w")
    texts = list(open_dataset(tmp_path / "w" / "text" / "train"))
    dialogues = [json.loads(line) for line in (tmp_path / "w" / "dialogues.jsonl").read_text().splitlines()]
    rejected = [json.loads(line) for line in (tmp_path / "w" / "rejected.jsonl").read_text().splitlines()]
    counts = collections.Counter()
    for recipe in report["recipes"].values():
        counts.update(recipe)
    assert counts.pop("accepted") == len(texts) + len(dialogues) == report["texts"] + report["dialogues"]
    assert counts.total() == len(rejected) == report["rejected"]
    assert {"refusal", "request: RuntimeError", "verifier: wrong answer"} <= set(counts)
    rows = [row["metadata"]["synthetic"] for row in texts] + [row["synthetic"] for row in dialogues]
    assert all(
        set(row) == {"recipe", "model", "prompt_sha256", "seed_id", "sampling"}
        for row in rows + [rejected[0]["synthetic"]]
    )
    assert {row["recipe"] for row in rows} == {type(recipe).__name__ for recipe in EVERY}
    names = [row["id"] for row in [*texts, *dialogues]]
    assert len(set(names)) == len(names)
    evolved = [row for row in dialogues if row["synthetic"]["recipe"] == "EvolInstruct"]
    assert len(evolved) == 15  # five good seeds, three rounds


def test_a_second_run_asks_only_what_failed_and_writes_the_same(seeds, tmp_path):
    run(config(seeds), tmp_path / "w")
    before = written(tmp_path / "w")
    fake_model.CALLS.clear()
    report = run(config(seeds), tmp_path / "w")
    assert all("fails" in call["messages"][-1]["content"] for call in fake_model.CALLS)
    assert report["requests_asked"] == len(fake_model.CALLS) and report["requests_cached"] > 50
    assert written(tmp_path / "w") == before


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(seeds, tmp_path):
    run(config(seeds), tmp_path / "whole")
    configs.save(config(seeds), tmp_path / "config.json")
    workdir = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "data.synthetic",
        f"--config={tmp_path / 'config.json'}",
        f"--workdir={workdir}",
    ]
    killed = subprocess.run(command, env=os.environ | {"FAKE_MODEL_DIES_AFTER": "20"}, capture_output=True)
    assert killed.returncode == 9 and not (workdir / "report.json").exists()
    with open(workdir / "cache" / "replies.jsonl", "ab") as file:
        file.write(b'{"key": "half a li')
    kept = len(Cache(workdir / "cache"))
    assert 15 <= kept <= 20
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"([\d,]+) from the cache", done.stdout)[1].replace(",", "")) >= kept
    assert written(workdir) == written(tmp_path / "whole")


def test_a_config_survives_json_and_what_is_missing_is_named(seeds, tmp_path):
    assert build(SyntheticConfig, to_dict(config(seeds))) == config(seeds)
    with pytest.raises(ConfigError, match="the endpoint is not given"):
        run(config(seeds, endpoint=Endpoint()), tmp_path / "w")
    with pytest.raises(ConfigError, match="there are no seeds"):
        run(config(""), tmp_path / "w")
    with pytest.raises(ConfigError, match="holds no text under 'absent'"):
        run(config(seeds, text_field="absent"), tmp_path / "w")


@pytest.mark.parametrize(("mix", "replaced"), [("accumulate", 0), ("replace", 5)])
def test_the_share_of_synthetic_text_is_bounded_and_real_text_stays_by_default(
    mix, replaced, seeds, tmp_path
):
    from data import write_dataset

    real = [{"id": f"r{i}", "text": f"Real text number {i} is here. " * 9, "source": "r", "licence": "CC0",
             "metadata": {}} for i in range(10)]  # fmt: skip
    write_dataset(tmp_path / "real", real)
    changes = {"real": str(tmp_path / "real"), "mix": mix, "max_seeds": 5}
    made = config(
        tmp_path / "real", recipes=(Rephrase(styles=("easy", "hard", "qa")),), max_share=0.3, **changes
    )
    report = run(made, tmp_path / "w")
    mixture, mixed = report["mixture"], list(open_dataset(tmp_path / "w" / "mixed" / "train"))
    sizes = collections.Counter()
    for row in mixed:
        sizes["synthetic" in row["metadata"]] += len(row["text"].encode())
    assert mixture["synthetic_share"] == sizes[True] / sizes.total()
    assert 0.15 < mixture["synthetic_share"] <= 0.3
    assert mixture["real_documents_replaced"] == replaced
    assert sum(row["id"].startswith("r") for row in mixed) == 10 - replaced


def test_dialogues_become_a_chat_dataset_where_there_is_a_tokenizer(seeds, bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer")
    made = config(seeds, recipes=(QuestionAnswer(),), tokenizer=str(tmp_path / "tokenizer"))
    report = run(made, tmp_path / "w")
    chat = open_dataset(tmp_path / "w" / "chat" / "train")
    assert (chat.kind, len(chat)) == ("chat", report["dialogues"])
    assert report["dialogues"] == 6  # of the short questions one: the others are too like it
    assert chat[0].mask.any() and not chat[0].mask.all()


# rules


def subsequence(a, b):
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return subsequence(a[:-1], b[:-1]) + 1
    return max(subsequence(a[:-1], b), subsequence(a, b[:-1]))


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_rouge_is_that_of_the_longest_common_subsequence(a, b):
    assert rouge_l(a, b) == 2 * subsequence(a, b) / max(len(a) + len(b), 1)


def test_rows_that_are_like_others_go():
    words = [f"word{i}" for i in range(60)]
    base, near, far = " ".join(words), " ".join([*words[:58], "x", "y"]), " ".join(words[::-1])
    seed, accepted = Seed("s", "something else entirely"), Accepted(Accept())
    verdicts = [accepted.reason(Made(text=text), seed) for text in (base, near, far, "few")]
    assert verdicts == [None, "duplicate: of an accepted row", None, "length: too short"]
    assert accepted.reason(
        Made(text=" ".join(map(str, range(50)))), Seed("s", " ".join(map(str, range(50))))
    ) == ("copy: of its seed")
    asked = "write a poem about the sea and the old ship in it"
    for instruction, verdict in ((asked, None), (asked + " now", "diversity: like an accepted instruction")):
        messages = [
            {"role": "user", "content": instruction},
            {"role": "assistant", "content": instruction[::-1] * 3},
        ]
        made = Made(messages=messages, instruction=instruction)
        assert accepted.reason(made, seed) == verdict


def test_reasoning_stays_only_where_the_verifier_accepts_it():
    recipe = Reasoning(problems=3)
    for seed in recipe.own_seeds(0):
        right = f"Because. <answer>{seed.data.answer}</answer>"
        assert recipe.read(seed, 0, right)[0].messages[-1]["content"] == right
        for wrong, why in (
            (f"<answer>{seed.data.answer}1</answer>", "verifier"),
            (seed.data.answer, "format"),
        ):
            with pytest.raises(Refused, match=why):
                recipe.read(seed, 0, wrong)


def code_answer(solution, tests):
    return (
        f"Problem: Add two numbers.\nSolution:\n```python\n{solution}\n```\nTests:\n```python\n{tests}\n```"
    )


@pytest.mark.parametrize(
    ("solution", "tests", "why"),
    [
        ("def add(a, b):\n    return a + b", "assert add(1, 2) == 3", None),
        ("def add(a, b):\n    return a - b", "assert add(1, 2) == 3", "tests: AssertionError"),
        ("def add(a, b):\n    return a + b", "assert True", "tests: pass without the solution"),
        ("def add(a, b):\n    return a + b", "add(1, 2)", "tests: nothing is asserted"),
        ("def add(a, b):\n    while True: pass", "assert add(1, 2) == 3", "tests: timeout"),
    ],
)
def test_code_stays_only_where_its_tests_pass_because_of_it(solution, tests, why):
    recipe = Code(sandbox=Sandbox(seconds=2))
    answer = code_answer(solution, tests)
    if why is None:
        made = recipe.read(Seed("s", ""), 0, answer)[0]
        assert made.messages[0]["content"] == "Add two numbers." and solution in made.messages[1]["content"]
        return
    with pytest.raises(Refused) as refused:
        recipe.read(Seed("s", ""), 0, answer)
    assert str(refused.value) == why


def test_the_sandbox_holds_memory_files_children_and_surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    box = Sandbox(seconds=2, memory_megabytes=256, file_megabytes=1)
    assert run_python("x = bytearray(1 << 30)", box) == "MemoryError"
    assert run_python("open('f', 'wb').write(b'x' * (2 << 20))", box) in ("OSError", "exit code -25")
    assert run_python("import os; assert 'SECRET' not in os.environ", box) == ""
    mark = tmp_path / "mark"
    for hostile in (
        "import subprocess; subprocess.Popen(['true'])",
        "import os; os.fork()",
        f"open({str(mark)!r}, 'w')",
        "import socket; socket.socket()",
        "import os; os.kill(os.getppid(), 0)",
    ):
        assert run_python(hostile, box) == "PermissionError"
    assert not mark.exists()
    assert run_python("import os; os._exit(0)", box) == "it left before its end"
    deep = "import os\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')"
    assert run_python(deep, box) == ""  # and its folders are removed
    assert run_python("open('f', 'w').write('x'); assert open('f').read() == 'x'", box) == ""
    assert run_python("import threading; t = threading.Thread(target=print); t.start(); t.join()", box) == ""


# the endpoint


def test_equal_requests_are_asked_once_and_half_a_line_loses_nothing(tmp_path):
    with served(lambda request: request["messages"][0]["content"].upper()) as (url, seen):
        endpoint = Endpoint(base_url=url, model="m", concurrency=2)
        requests = [{"messages": [{"role": "user", "content": text}]} for text in "abab"]
        replies = dict(ask_all(endpoint, requests, Cache(tmp_path)))
        assert [replies[i].text for i in range(4)] == list("ABAB") and len(seen) == 2
        assert [replies[i].tokens for i in range(4)] == [7] * 4
        with open(tmp_path / "replies.jsonl", "ab") as file:
            file.write(b'{"key": "ha')
        append_line(tmp_path / "replies.jsonl", b'{"key": "k", "text": "t", "tokens": 1}')
        again = Cache(tmp_path)
        assert again.get("k") == Reply("t", 1, cached=True) and len(again) == 3
        assert all(reply.cached for _, reply in ask_all(endpoint, requests, again)) and len(seen) == 2

"""Dialogues, preferences, labels and prompts in the formats that people have; errors that name file and line."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
import zstandard

from data import DatasetError, make_batches, open_dataset
from data.batches import Reading
from data.conversations import ConversationConfig, Conversations, write_conversations
from data.formats import FORMATS, Dialogue, Labelled, Preference, Prompt, detect, read_example
from data.row_files import RowError, read_rows


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


FUNCTION = {"name": "add", "arguments": {"a": 1}}
CALL = {"type": "function", "function": FUNCTION}
ASKED = [user("Hi"), said("Hello")]
SYSTEM = {"role": "system", "content": "S"}
ROWS = [
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        Dialogue(ASKED),
    ),
    (
        "sharegpt",
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "1+1?"},
                {"from": "function_call", "value": json.dumps(FUNCTION)},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "2"},
            ],
            "tools": '[{"name": "add"}]',
        },
        Dialogue(
            [
                {"role": "system", "content": "Be brief."},
                user("1+1?"),
                said("") | {"tool_calls": [CALL]},
                {"role": "tool", "content": "2"},
                said("2"),
            ],
            [{"name": "add"}],
        ),
    ),
    ("messages", {"messages": ASKED}, Dialogue(ASKED)),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
                    ],
                },
                {"role": "tool", "content": "2", "tool_call_id": "c"},
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "Two."}, {"type": "text", "value": "2"}],
                },
            ]
        },
        Dialogue(
            [
                user("1+1?"),
                said("") | {"tool_calls": [{"id": "c"} | CALL]},
                {"role": "tool", "content": "2", "tool_call_id": "c"},
                said("2") | {"reasoning_content": "Two."},
            ]
        ),
    ),
    (
        "messages",
        {
            "messages": [
                user("1+1?"),
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "add", "arguments": '{"a": 1}'},
                },
                {"role": "function", "name": "add", "content": "2"},
                said("2") | {"thinking": "Two."},
            ]
        },
        Dialogue(
            [
                user("1+1?"),
                said("") | {"tool_calls": [CALL]},
                {"role": "tool", "content": "2", "name": "add"},
                said("2") | {"reasoning_content": "Two."},
            ]
        ),
    ),
    (
        "messages",
        {
            "messages": [
                user("Hi"),
                {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": None},
            ]
        },
        Dialogue([user("Hi"), said("") | {"reasoning_content": "Hm."}]),
    ),
    (
        "messages",
        {
            "messages": [
                user("a") | {"loss_weight": 0.0},
                said("b") | {"weight": 0},
                user("c"),
                said("d") | {"weight": 1},
            ]
        },
        Dialogue([user("a"), said("b"), user("c"), said("d")], None, (0,)),
    ),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, Dialogue(ASKED)),
    (
        "alpaca",
        {"instruction": "Add", "input": "1 1", "output": "2", "system": "S", "history": [["Hi", "Hello"]]},
        Dialogue([{"role": "system", "content": "S"}, *ASKED, user("Add\n\n1 1"), said("2")]),
    ),
    ("completion", {"prompt": "Hi", "completion": "Hello"}, Dialogue(ASKED)),
    (
        "completion",
        {"prompt": [*ASKED, user("More")], "completion": [said("Bye")]},
        Dialogue([*ASKED, user("More"), said("Bye")], None, (0,)),
    ),
    (
        "preference",
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        Preference([user("Hi")], said("Hello"), said("No")),
    ),
    (
        "preference",
        {"chosen": ASKED, "rejected": [user("Hi"), said("No")], "score_chosen": 9},
        Preference([user("Hi")], said("Hello"), said("No")),
    ),
    (
        "preference",
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        Preference([user("Hi")], said("Hello"), said("No")),
    ),
    (
        "preference",
        {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "No"},
        Preference([user("Hi")], said("Hello"), said("No")),
    ),
    (  # the commonest form on the hub: the prompt again, as the first message of both
        "preference",
        {"prompt": "Hi", "chosen": ASKED, "rejected": [user("Hi"), said("No")]},
        Preference([user("Hi")], said("Hello"), said("No")),
    ),
    (
        "preference",
        {
            "prompt": [SYSTEM, user("Hi")],
            "chosen": [SYSTEM, *ASKED],
            "rejected": [SYSTEM, user("Hi "), said("No")],
        },
        Preference([SYSTEM, user("Hi")], said("Hello"), said("No")),
    ),
    (
        "preference",
        {"system": "S", "prompt": "Hi", "chosen": ASKED, "rejected": [user("Hi"), said("No")]},
        Preference([SYSTEM, user("Hi")], said("Hello"), said("No")),
    ),
    (  # the prompt is the last question of several
        "preference",
        {
            "prompt": "More",
            "chosen": [*ASKED, user("More"), said("Bye")],
            "rejected": [*ASKED, user("More"), said("No")],
        },
        Preference([*ASKED, user("More")], said("Bye"), said("No")),
    ),
    (  # the dialogue goes on after the prompt
        "preference",
        {
            "prompt": ASKED,
            "chosen": [user("More"), said("Bye")],
            "rejected": [user("More"), said("No")],
        },
        Preference([*ASKED, user("More")], said("Bye"), said("No")),
    ),
    ("completion", {"prompt": "Hi", "completion": ASKED}, Dialogue(ASKED)),
    (
        "oasst",
        {
            "message_tree_id": "1",
            "prompt": {
                "text": "Hi",
                "role": "prompter",
                "replies": [
                    {"text": "No", "role": "assistant", "rank": 1, "replies": []},
                    {
                        "text": "Hello",
                        "role": "assistant",
                        "rank": 0,
                        "replies": [{"text": "And?", "role": "prompter", "replies": []}],
                    },
                    {"text": "Gone", "role": "assistant", "rank": -1, "deleted": True},
                ],
            },
        },
        Dialogue(ASKED),
    ),
    (
        "kto",
        {"prompt": "Hi", "completion": "Hello", "label": True},
        Labelled([user("Hi")], said("Hello"), True),
    ),
    # a table of several formats has every column in every row
    (
        "kto",
        {"messages": None, "prompt": "Hi", "completion": "Hello", "label": None, "kto_tag": False},
        Labelled([user("Hi")], said("Hello"), False),
    ),
    (
        "preference",
        {"prompt": "Hi", "chosen": "A", "rejected": "B", "chosen_messages": None, "rejected_messages": None},
        Preference([user("Hi")], said("A"), said("B")),
    ),
    (
        "preference",
        {"prompt": "Hi", "chosen": "A", "rejected": "B", "chosen_messages": ASKED},
        Preference([user("Hi")], said("A"), said("B")),
    ),
    ("alpaca", {"instruction": "Hi", "output": None, "response": "Hello"}, Dialogue(ASKED)),
    ("kto", {"messages": ASKED, "label": False}, Labelled([user("Hi")], said("Hello"), False)),
    (
        "hh",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 1+1?\n\nAssistant: 2",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 1+1?\n\nAssistant: 3\n\nor so",
        },
        Preference([user("Hi"), said("Yes?"), user("1+1?")], said("2"), said("3\n\nor so")),
    ),
    (
        "prompt",
        {"question": "1+1?", "answer": "2", "level": 1},
        Prompt([user("1+1?")], "2", None, {"level": 1}),
    ),
    ("prompt", {"prompt": [user("Hi")]}, Prompt([user("Hi")])),
    ("prompt", {"messages": [user("Hi")], "answer": "2"}, Prompt([user("Hi")], "2")),
    ("prompt", "Hi", Prompt([user("Hi")])),
]


@pytest.mark.parametrize("name, row, example", ROWS)
def test_a_row_of_each_format_is_known_and_read(name, row, example):
    assert detect(row) == name
    assert read_example(row, name) == example


BAD = [
    ({"messages": [user("x") | {"reasoning": "y"}, said("z")]}, "message 1 is of role user"),
    ({"messages": [user("x"), said("z") | {"thinking": 3}]}, "message 2, thinking is int"),
    ({"messages": [user("x"), said("z") | {"tool_calls": "f"}]}, "tool_calls are no list|message 2 has 'f'"),
    ({"messages": [user("x"), {"role": "assistant", "content": None}]}, "message 2 has None"),
    ({"messages": []}, "messages are no list"),
    ({"prompt": "x", "chosen": "y", "rejected": "y"}, "chosen and rejected are the same answer"),
    (
        {"prompt": "x", "chosen": ASKED, "rejected": ASKED},
        "chosen begins with other messages than the prompt",
    ),
    (
        {"prompt": [SYSTEM, user("Hi")], "chosen": [SYSTEM | {"content": "T"}, *ASKED], "rejected": ASKED},
        "chosen has another system message than the prompt",
    ),
    ({"prompt": "x", "completions": ["y"], "labels": [True, False]}, "labels do not fit the steps"),
    ({"prompt": "x", "completions": "y", "labels": [True]}, "no steps"),
    ({"prompt": "x", "completions": ["y"], "labels": ["+"]}, "a label that is none"),
    ({"prompt": "x", "completions": ["y"], "labels": [1.5]}, "a label that is none"),
    ({"prompt": "x", "completions": ["y", " "], "labels": [1, 0]}, "a step is empty"),
    ({"prompt": "", "completions": ["y"], "labels": [1]}, "the prompt is empty"),
    ({"prompt": "x", "chosen": "y \ud83d", "rejected": "z"}, "the text is not valid Unicode: a lone"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 has 'robot'; wanted one of"),
    ({"messages": [SYSTEM]}, "the assistant says nothing"),
    ({"messages": [user("x"), said(" ")]}, "an answer is empty"),
    ({"messages": [user("x"), {"role": "assistant", "content": 3}]}, "message 2 has 3; wanted text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "unsupported part 'image_url'",
    ),
    ({"messages": ASKED, "images": ["a.png"]}, "a row with images"),
    ({"messages": [user("x"), said("y") | {"weight": 0.5}]}, "wanted 0 or 1"),
    ({"messages": [user("x") | {"weight": 1}, said("y")]}, "message 1 is of role user; wanted 0"),
    (
        {"messages": [user("x"), said("") | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "arguments are not valid JSON",
    ),
    (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{"}]},
        "a tool call is not valid JSON",
    ),
    ({"prompt": "x", "chosen": "", "rejected": "y"}, "chosen ends with an empty answer"),
    ({"chosen": [user("a"), said("b")], "rejected": [user("z"), said("b")]}, "differ before the last answer"),
    ({"chosen": "just text", "rejected": "other"}, "answers no prompt"),
    ({"prompt": "x", "completion": "y", "label": "good"}, "wanted true .desired. or false"),
    ({"instruction": "x", "output": 7}, "output is int"),
    ({"prompt": " "}, "the prompt is empty"),
    ({"text": "x"}, "a row of no known format: it has text"),
    (7, "a row of no known format: it has int"),
]


@pytest.mark.parametrize("row, message", BAD)
def test_what_is_wrong_with_a_row_is_said(row, message):
    with pytest.raises(RowError, match=message):
        read_example(row, detect(row))


def test_rows_of_every_kind_of_file_are_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f"{i}+{i}?", "completion": f"é {2 * i}"} for i in range(7)]
    lines = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "lines.json").write_bytes(lines)
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert [row.value for row in read_rows(path)] == rows, path
    assert [row.where for row in read_rows(tmp_path / "a.jsonl")][:3] == ["line 1", "line 3", "line 5"]
    assert [row.where for row in read_rows(tmp_path / "array.json")][:3] == ["line 2", "line 6", "line 10"]
    assert [row.where for row in read_rows(tmp_path / "a.parquet")][-1] == "row 7"


@pytest.mark.parametrize(
    "name, content, wheres",
    [
        ("a.jsonl", b'"x"\n{\n"y"\n"\xff"\n', {"line 2": "not valid JSON", "line 4": "not UTF-8"}),
        ("a.json", b'["x",\n "y",\n oh]', {"line 3": "not valid JSON from here on"}),
        ("a.json", b'["x",\n "y"\n "z"]', {"line 3": "the array does not end"}),
        ("a.json", b'{\n"a": 1}', {"line 1": "one JSON value over many lines"}),
        ("a.jsonl.gz", gzip.compress(b'"x"\n' * 9999, mtime=0)[:-30], {"line 9998": "read from here on"}),
        ("a.parquet", b"PAR", {"row 1": "the file can't be read"}),
    ],
)
def test_damage_is_named_by_line_and_ends_nothing_before_it(tmp_path, name, content, wheres):
    (tmp_path / name).write_bytes(content)
    bad = {
        row.where: row.value.reason for row in read_rows(tmp_path / name) if isinstance(row.value, RowError)
    }
    assert len(bad) == len(wheres)
    for (where, reason), (wanted, part) in zip(bad.items(), wheres.items()):
        assert part in reason and (where == wanted or name.endswith("gz"))


def test_bad_rows_end_the_run_or_are_counted_up_to_a_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": 3}, {"text": "z"}] * 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DatasetError, match=r'a.jsonl, line 2: .*on_bad="skip"'):
        list(Conversations([path], on_bad="error").map("chat", lambda example, where: example))
    skipping = Conversations([path])
    assert len(list(skipping.map("chat", lambda example, where: example))) == 3
    assert sorted(skipping.bad.values()) == [3, 3] and "line 2" in skipping.bad_rows()
    with pytest.raises(DatasetError, match="3 bad rows of 5, more than config.max_bad=2"):
        list(Conversations([path], max_bad=2).map("chat", lambda example, where: example))
    path.write_text("".join(json.dumps(row) + "\n" for row in [*[rows[0]] * 500, *rows[1:4]]))
    many = Conversations([path], max_bad=1)  # of 503 rows two are less than one in a hundred
    assert len(list(many.map("chat", lambda example, where: example))) == 501 and many.bad.total() == 2


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    n = range(20)
    return (
        write_lines(tmp_path / "sft.jsonl", [{"instruction": f"Say {i}", "output": f"{i}!"} for i in n]),
        write_lines(
            tmp_path / "weights.jsonl",
            [{"messages": [user("a"), said("bad") | {"weight": 0}, user(f"{i}"), said("good")]} for i in n],
        ),
        write_lines(tmp_path / "dpo.jsonl", [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in n]),
        write_lines(tmp_path / "kto.jsonl", [{"prompt": f"{i}?", "completion": "ok", "label": i % 2 == 0} for i in n]),
        write_lines(tmp_path / "rl.jsonl", [{"question": f"{i}+1", "answer": f"{i + 1}"} for i in n]),
    )  # fmt: skip


def test_one_command_makes_datasets_of_all_kinds(files, tokenizers, tmp_path):
    tokenizer = tokenizers["bpe"]
    tokenizer.save(tmp_path / "tokenizer")
    config = ConversationConfig(files, str(tmp_path / "tokenizer"), validation=0.3)
    manifests = write_conversations(config, tmp_path / "out")
    for folder, wanted in (("chat", 40), ("preferences", 20), ("labelled", 20), ("prompts", 20)):
        records = [manifests[str(tmp_path / "out" / folder / s)]["records"] for s in ("train", "validation")]
        assert sum(records) == wanted and records[0] > records[1] > 0

    def trained(record):
        return tokenizer.decode(record.tokens[record.mask], keep_special=True)

    out = tmp_path / "out"
    answers = {trained(record) for s in ("train", "validation") for record in open_dataset(out / "chat" / s)}
    assert answers == {f"{i}!<|im_end|>" for i in range(20)} | {"good<|im_end|>"}
    for chosen, rejected in open_dataset(out / "preferences" / "train"):
        assert (trained(chosen), trained(rejected)) == ("yes<|im_end|>", "no<|im_end|>")
    labels = [label for s in ("train", "validation") for _, label in open_dataset(out / "labelled" / s)]
    assert sum(labels) == 10
    prompt = open_dataset(out / "prompts" / "train")[0]
    asked = prompt["messages"][0]["content"]
    assert prompt["answer"] == str(int(asked.split("+")[0]) + 1)
    batch = next(make_batches({out / "labelled" / "train": 1}, 4, 64, 0, Reading("labelled")))
    assert batch["labels"].shape == (4,) and batch["loss_weights"].sum(axis=1).min() > 0
    stamps = [p.stat().st_mtime_ns for p in sorted(out.rglob("manifest.json"))]
    write_conversations(config, out)  # nothing has changed
    assert stamps == [p.stat().st_mtime_ns for p in sorted(out.rglob("manifest.json"))]


def test_the_number_of_workers_changes_nothing(tokenizers, tmp_path):
    tokenizers["bpe"].save(tmp_path / "tokenizer")
    rows = [{"prompt": f"{i}?", "completion": "" if i % 50 == 7 else f"{i}!"} for i in range(300)]
    file = write_lines(tmp_path / "many.jsonl", rows)
    config = ConversationConfig((file,), str(tmp_path / "tokenizer"), on_bad="skip", workers=1)
    one = write_conversations(config, tmp_path / "one")
    two = write_conversations(dataclasses.replace(config, workers=2), tmp_path / "two")
    (a,), (b,) = one.values(), two.values()
    assert a["sha256"] == b["sha256"] and a["bad_rows"] == b["bad_rows"] and a["records"] == 294


def test_what_a_user_has_to_mend_is_said_before_anything_is_written(files, tmp_path):
    for config, message in (
        (ConversationConfig(), "config.files"),
        (ConversationConfig(("nowhere.jsonl",)), "does not exist"),
        (ConversationConfig(files[:1]), "config.tokenizer"),
        (ConversationConfig(files, validation=1.0), "config.validation"),
    ):
        with pytest.raises(ValueError, match=message):
            write_conversations(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


REAL = {
    "sft/fastchat_dummy_conversation.json": ("sharegpt", 500, 0),
    "sft/gpteacher_toolformer_0.6.json": ("alpaca", 2396, 0),
    "sft/llamafactory/alpaca_zh_demo.json": ("alpaca", 1000, 0),
    "sft/llamafactory/glaive_toolcall_en_demo.json": ("sharegpt", 300, 0),
    "sft/llamafactory/reason_tool_use_demo_50.jsonl": ("messages", 50, 0),
    "sft/llamafactory/v1_sft_demo.jsonl": ("messages", 500, 0),
    "sft/oasst_en_100_text.jsonl": ("prompt", 100, 0),
    "preference/hh_rlhf_harmless_test.jsonl.gz": ("hh", 2303, 9),
    "sft/oasst_en_100_tree.jsonl": ("oasst", 100, 0),
    "preference/llamafactory_dpo_en_demo.json": ("preference", 300, 0),
    "preference/llamafactory_kto_en_demo.json": ("kto", 300, 0),
    "preference/llamafactory_v1_dpo_demo.jsonl": ("preference", 10, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole(shared, name):
    format, good, bad = REAL[name]
    path = shared / "data" / name
    conversations = Conversations([path], on_bad="skip")
    assert conversations.formats[str(path)] == format
    examples = [example for example, _ in conversations.map(FORMATS[format].makes, lambda e, where: e)]
    assert (len(examples), conversations.bad.total()) == (good, bad)
    if (
        format == "hh"
    ):  # the same dialogues by the definition: an answer is what follows the last "Assistant:"
        texts = [json.loads(line) for line in gzip.open(path)]
        answers = {row["chosen"].rsplit("\n\nAssistant:", 1)[1].strip() for row in texts}
        assert all(example.chosen["content"].strip() in answers for example in examples)


@pytest.mark.parametrize("name", ["glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl"])
def test_real_tool_calls_are_trained_on_and_what_tools_say_is_not(shared, bpe, tmp_path, name):
    from data.tokenize import chat_record

    path = shared / "data" / "sft" / "llamafactory" / name
    conversations = Conversations([path])
    for example, _ in list(conversations.map("chat", lambda e, where: e))[:20]:
        record = chat_record({"messages": example.messages, "tools": example.tools}, bpe, "here")
        trained = bpe.decode(record.tokens[np.flatnonzero(record.mask)])
        calls = sum(len(m.get("tool_calls", [])) for m in example.messages)
        assert trained.count("<tool_call>") >= calls
        for message in example.messages:
            if message["role"] == "assistant":
                assert message["content"] in trained
            if message["role"] == "tool" and len(message["content"]) > 40:
                assert message["content"] not in trained


def test_reasoning_is_trained_on_whether_the_template_reads_it_or_not(bpe):
    import copy

    from data.tokenize import chat_record

    dialogue = [user("1+1?"), said("2") | {"reasoning_content": "Two."}]
    deaf = copy.copy(bpe)
    deaf.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    for tokenizer in (bpe, deaf):
        record = chat_record(dialogue, tokenizer, "here")
        trained = tokenizer.decode(record.tokens[record.mask])
        assert trained == "<think>\nTwo.\n</think>\n\n2"

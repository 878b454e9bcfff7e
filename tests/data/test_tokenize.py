"""Text, dialogues and preferences as token datasets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (
    ChatTemplateError,
    make_batches,
    tokenize_dataset,
    tokenize_pieces,
    train_tokenizer,
    write_chat_dataset,
    write_dataset,
    write_preference_dataset,
)
from data.batches import Reading
from data.curation import Workers
from data.tokenizer.word_cache import PLAIN, word_cache

TALKS = [
    [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}!"}] for i in range(5)
]


def test_documents_are_bracketed_and_counted(tokenizer, tmp_path):
    texts = ["def f(): pass", "héllo <|endoftext|> world", ""]
    write_dataset(
        tmp_path / "text" / "train", [{"id": str(i), "text": t} for i, t in enumerate(texts)], "text"
    )
    dataset = tokenize_dataset(tmp_path / "text", tokenizer, tmp_path / "tokens", split="train")
    for record, text in zip(dataset, texts, strict=True):
        eot = tokenizer.special_tokens["<|endoftext|>"]
        assert record.tokens.tolist() == [eot, *tokenizer.encode(text), eot]
    assert dataset.manifest["bytes"] == sum(len(t.encode()) for t in texts)
    assert dataset.manifest["tokens"] == sum(len(r.tokens) for r in dataset)
    assert dataset.manifest["vocab_size"] == 600


def test_tokenizing_again_redoes_nothing_until_tokenizer_or_text_change(tokenizers, tmp_path):
    write_dataset(tmp_path / "text", [{"id": "a", "text": "hello"}], "text")
    manifest = tmp_path / "tokens" / "manifest.json"
    tokenize_dataset(tmp_path / "text", tokenizers["bpe"], tmp_path / "tokens")
    first = manifest.stat().st_mtime_ns
    tokenize_dataset(tmp_path / "text", tokenizers["bpe"], tmp_path / "tokens")
    assert manifest.stat().st_mtime_ns == first
    tokenize_dataset(tmp_path / "text", tokenizers["sentencepiece_bpe"], tmp_path / "tokens")
    second = manifest.stat().st_mtime_ns
    assert second != first
    write_dataset(tmp_path / "text", [{"id": "a", "text": "hello!"}], "text")
    tokenize_dataset(tmp_path / "text", tokenizers["sentencepiece_bpe"], tmp_path / "tokens")
    assert manifest.stat().st_mtime_ns != second


@pytest.fixture(scope="module")
def patterned(texts):
    """{pattern: a tokenizer with it}."""
    names = ("ours", "gpt2", "cl100k", "o200k", "llama3")
    return {name: train_tokenizer("bpe", texts, 400, pattern=name) for name in names}


@pytest.mark.parametrize("name", ["ours", "gpt2", "cl100k", "o200k", "llama3"])
def test_words_are_cut_as_the_tokenizer_does_for_every_letter_that_is_taken(patterned, name):
    """In the places where the patterns look: beside letters of both cases, digits, marks, spaces and line ends."""
    tokenizer = patterned[name]
    cache = word_cache(tokenizer)
    letters = [chr(i) for i in range(0x10000) if PLAIN.fullmatch(chr(i))]
    assert len(letters) > 30_000
    for at in range(0, len(letters), 4096):
        some = letters[at : at + 4096]
        text = "".join(f"a{c}B1{c} {c}{c}'{c} \n{c}!{c}\n\n{c}/{c}\t" for c in some)
        assert cache._encode_plain(text).tolist() == tokenizer.encode(text), f"from {some[0]!r}"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["a", "Z", "'s", "1", "23456", " ", "  ", "\n", "\n\n", "\r\n", "\t", "/", "!?"]
            + ["\u00e9", "\u4e2d", "\u0e01", "\u2028"]
        )
        | st.text(max_size=4),
        max_size=40,
    ),
    st.sampled_from(["ours", "gpt2", "cl100k", "o200k", "llama3"]),
)
def test_ids_by_words_are_those_of_the_tokenizer(patterned, parts, name):
    text = "".join(parts).encode("utf-8", "replace").decode()
    assert word_cache(patterned[name]).encode(text).tolist() == patterned[name].encode(text)


def test_only_tokenizers_whose_words_are_cut_by_one_pattern_are_done_by_words(tokenizers, patterned):
    assert {kind: word_cache(each) is not None for kind, each in tokenizers.items()} == {
        "bpe": True,
        "sentencepiece_bpe": False,
        "sentencepiece_unigram": False,
    }
    marked = "before <|endoftext|> and after <|im_start|>"
    assert word_cache(patterned["ours"]).encode(marked).tolist() == patterned["ours"].encode(marked)


def many_texts(folder, texts):
    rng = np.random.default_rng(0)
    lines = "\n".join(texts).splitlines()
    made = ["\n".join(rng.choice(lines, 40)) for _ in range(600)]
    return write_dataset(folder, [{"id": str(i), "text": text} for i, text in enumerate(made)], "text")


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece_unigram"])
def test_tokens_are_the_same_to_the_byte_for_any_number_of_processes(
    tokenizers, texts, tmp_path, monkeypatch, kind
):
    text, tokenizer = many_texts(tmp_path / "text", texts), tokenizers[kind]
    whole = tokenize_dataset(tmp_path / "text", tokenizer, tmp_path / "whole")
    head, tail = [tokenizer.bos_id], list(tokenizer.eos_ids[:1])
    assert [r.tolist() for r, _ in whole] == [[*head, *tokenizer.encode(d["text"]), *tail] for d in text]
    monkeypatch.setattr(tokenize_pieces, "_BYTES", 1 << 16)
    for processes in (1, 3):
        lines = []
        out = tmp_path / str(processes)
        monkeypatch.setattr(tokenize_pieces, "Workers", lambda **more: Workers(**more | {"min_megabytes": 0}))
        made = tokenize_dataset(tmp_path / "text", tokenizer, out, processes=processes, log=lines.append)
        assert made.manifest == whole.manifest
        assert [p.read_bytes() for p in sorted(out.iterdir())] == [
            p.read_bytes() for p in sorted((tmp_path / "whole").iterdir())
        ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3", "text", "whole"]


def test_tokenizing_goes_on_with_the_pieces_that_a_killed_run_left(bpe, texts, tmp_path, monkeypatch):
    many_texts(tmp_path / "text", texts)
    whole = tokenize_dataset(tmp_path / "text", bpe, tmp_path / "whole")
    monkeypatch.setattr(tokenize_pieces, "_BYTES", 1 << 16)
    real, made = tokenize_pieces.write_piece, []

    def stops(task):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(task.target.name)
        real(task)

    monkeypatch.setattr(tokenize_pieces, "write_piece", stops)
    with pytest.raises(KeyboardInterrupt):
        tokenize_dataset(tmp_path / "text", bpe, tmp_path / "out", processes=1)
    first = made.copy()
    made.clear()
    monkeypatch.setattr(
        tokenize_pieces, "write_piece", lambda task: (made.append(task.target.name), real(task))[1]
    )
    again = tokenize_dataset(tmp_path / "text", bpe, tmp_path / "out", processes=1)
    assert again.manifest == whole.manifest and len(first) == 3 and len(made) > 3
    assert not set(first) & set(made) and not list(tmp_path.glob(".out*"))


def test_only_a_text_dataset_can_be_tokenized(bpe, tmp_path):
    write_chat_dataset(TALKS, bpe, tmp_path / "chat")
    with pytest.raises(ValueError, match="wants 'text'"):
        tokenize_dataset(tmp_path / "chat", bpe, tmp_path / "out")


def test_dialogues_train_on_answers_alone(bpe, tmp_path):
    dataset = write_chat_dataset(
        TALKS, bpe, tmp_path / "chat", {"sources": [{"name": "made", "licence": "CC0"}]}
    )
    for i, record in enumerate(dataset):
        assert bpe.decode(record.tokens[record.mask], keep_special=True) == f"{i}!<|im_end|>"
    assert dataset.manifest["sources"][0]["name"] == "made"
    assert dataset.manifest["trained_tokens"] == sum(int(r.mask.sum()) for r in dataset)
    for batch in make_batches({tmp_path / "chat": 1}, 2, 64, 0, Reading(num_epochs=1)):
        trained = batch["targets"][batch["loss_weights"] > 0]
        assert bpe.decode(trained, keep_special=True).count("<|im_end|>") == bpe.decode(trained).count("!")


def test_tools_of_a_conversation_are_shown(bpe, tmp_path):
    tools = [{"type": "function", "function": {"name": "lookup"}}]
    dataset = write_chat_dataset([{"messages": TALKS[0], "tools": tools}], bpe, tmp_path / "chat")
    assert '"lookup"' in bpe.decode(dataset[0].tokens)


def test_preferences_share_the_prompt_and_train_on_the_last_answer(bpe, tmp_path):
    history = [*TALKS[0], {"role": "user", "content": "Again"}]
    dataset = write_preference_dataset([(history, "good", "bad one")], bpe, tmp_path / "pairs")
    chosen, rejected = dataset[0]
    assert bpe.decode(chosen.tokens[chosen.mask], keep_special=True) == "good<|im_end|>"
    assert bpe.decode(rejected.tokens[rejected.mask], keep_special=True) == "bad one<|im_end|>"
    start = int(np.argmax(chosen.mask))
    assert chosen.tokens[:start].tolist() == rejected.tokens[:start].tolist()
    assert start == len(bpe.apply_chat_template(history)[0])


def test_a_conversation_that_does_not_render_is_named(bpe, tmp_path):
    with pytest.raises(ChatTemplateError, match="conversation 1"):
        write_chat_dataset([TALKS[0], [{"role": "user"}]], bpe, tmp_path / "chat")
    assert not (tmp_path / "chat").exists()

"""Text, dialogues and preferences as token datasets."""

import numpy as np
import pytest

from data import (
    ChatTemplateError,
    make_batches,
    tokenize_dataset,
    write_chat_dataset,
    write_dataset,
    write_preference_dataset,
)
from data.batches import Reading

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

"""Answers in steps: the token that ends each step is found, whatever the tokenizer, and its label comes back."""

from __future__ import annotations

import json

import numpy as np
import pytest

import configs
import data
from data.conversations import ConversationConfig, write_conversations
from data.steps import steps_record
from data.templates import ChatTemplateError

STEPS = ("Two and two are 4.", "Twice 4 is 8 \u2014 or \u5341.", "So the answer is 8.")
PROMPT = [{"role": "user", "content": "What is twice the sum of two and two?"}]


@pytest.fixture(scope="module", params=["bpe", "sentencepiece_unigram"])
def tokenizer(request):
    texts = [" ".join(STEPS), PROMPT[0]["content"], "and or the of is 0 1 2 3 4 5 6 7 8 9"] * 20
    return data.train_tokenizer(request.param, texts, 300)


def test_each_step_ends_with_a_token_of_the_mask(tokenizer):
    record = steps_record(PROMPT, STEPS, tokenizer, "row 1")
    ends = np.flatnonzero(record.mask)
    assert len(ends) == 3
    for step, end in zip(STEPS, ends, strict=True):
        so_far = b"".join(tokenizer.bytes_of(int(i)) for i in record.tokens[: end + 1]).decode()
        assert (
            step in so_far
            and step not in so_far[: len(so_far) - len(tokenizer.bytes_of(int(record.tokens[end])))]
        )


def test_labels_survive_the_dataset_and_stand_at_the_ends_of_their_steps(tokenizer, tmp_path):
    rows = [
        {"prompt": f"{i} and {i}?", "completions": list(STEPS), "labels": [True, 0.25, i % 2 == 0]}
        for i in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save(tmp_path / "tokenizer")
    config = ConversationConfig((str(tmp_path / "rows.jsonl"),), str(tmp_path / "tokenizer"))
    write_conversations(config, tmp_path / "out")
    dataset = data.open_dataset(tmp_path / "out" / "steps" / "train")
    assert dataset.kind == "steps" and len(dataset) == 20
    record, labels = dataset[3]
    np.testing.assert_allclose(labels, [1.0, 0.25, 0.0])
    batches = data.make_batches(
        {str(dataset.folder): 1.0}, 4, 256, 0, data.Reading("steps", shuffle=False, num_epochs=1)
    )
    batch = next(batches)
    for row in range(4):
        at = np.flatnonzero(batch["loss_weights"][row])
        record, labels = dataset[row]
        np.testing.assert_array_equal(at, np.flatnonzero(record.mask))
        np.testing.assert_allclose(batch["step_labels"][row][at], labels)
        assert batch["step_labels"][row].sum() == pytest.approx(labels.sum())
    assert all(batch["loss_weights"].sum() == 12 for batch in batches)


def test_a_dataset_of_another_kind_is_refused(tokenizer, tmp_path):
    record = steps_record(PROMPT, STEPS, tokenizer, "row 1")
    data.write_dataset(tmp_path / "steps", [(record, np.ones(3, np.float32))], "steps")
    with pytest.raises(configs.ConfigError, match="kind 'steps'; batches of kind 'lm'"):
        data.make_batches({str(tmp_path / "steps"): 1.0}, 1, 64, 0)
    with pytest.raises(ValueError, match="2 labels; wanted one for each token of its mask"):
        data.write_dataset(tmp_path / "bad", [(record, np.ones(2, np.float32))], "steps")


def test_a_template_that_changes_the_answer_is_said():
    tokenizer = data.train_tokenizer("bpe", ["a cat sat on a mat and a dog"] * 20, 264)
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content | upper }}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(ChatTemplateError, match="row 7: the chat template or the tokenizer does not write"):
        steps_record(PROMPT, STEPS, tokenizer, "row 7")

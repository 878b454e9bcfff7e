"""Numbers of other implementations: models in GGUF files, the gguf package's blocks, a numpy reader's answers.

tests/goldens/make.py and make_smollm2.py made them.
"""

import json

import jax
import numpy as np
import pytest

from data import load_tokenizer
from model import apply, load, load_config
from model.dequantize import dequantize
from model.generate import generate

from .conftest import GOLDENS


def difference(cfg, params, golden) -> float:
    """The largest difference of a logit at a real token."""
    out = jax.jit(apply, static_argnums=0)(
        cfg, params, golden["tokens"], positions=golden["positions"], segment_ids=golden["mask"]
    )
    real = golden["mask"] == 1
    return float(np.abs(np.asarray(out.logits)[real] - golden["logits"][real]).max())


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied_sharded"])
def test_gguf_logits_equal_those_of_transformers(name):
    cfg, params = load(GOLDENS / f"{name}.gguf")
    assert difference(cfg, params, np.load(GOLDENS / name / "logits.npz")) < 1e-4


def test_a_gguf_file_and_a_hugging_face_folder_of_one_model_load_alike():
    cfg, params = load(GOLDENS / "llama_untied_sharded")
    other_cfg, other = load(GOLDENS / "llama_untied_sharded.gguf")
    assert cfg == other_cfg
    jax.tree.map(np.testing.assert_array_equal, params, other)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_dequantised_blocks_equal_those_of_the_gguf_package(kind):
    golden = np.load(GOLDENS / "dequantize.npz")
    raw, values = golden[f"{kind}_raw"], golden[f"{kind}_values"]
    np.testing.assert_allclose(dequantize(raw.reshape(-1), kind, values.shape), values, rtol=1e-6, atol=1e-6)


def smollm2_chats():
    return json.loads((GOLDENS / "smollm2.json").read_text(encoding="utf-8"))["chats"]


def greedy(path, chats, max_new_tokens, scan):
    """Our prompts and continuations (without the stop token), all chats in one batch."""
    tokenizer = load_tokenizer(path)
    cfg, params = load(path, cfg=load_config(path).replace(scan=scan))
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": chat["question"]}])[0] for chat in chats
    ]
    rows = generate(cfg, params, prompts, max_new_tokens, stop_ids=tokenizer.eos_ids)
    return prompts, [[i for i in row if i not in tokenizer.eos_ids] for row in rows], tokenizer


def test_smollm2_begins_its_answer_as_an_independent_reader_has_it(smollm2):
    chat = smollm2_chats()[0]
    prompts, rows, tokenizer = greedy(smollm2, [chat], 8, scan=True)  # compiles faster
    assert prompts[0] == chat["prompt_ids"]
    assert rows[0] == chat["new_ids"][:8]
    assert chat["text"].startswith(tokenizer.decode(rows[0]))


@pytest.mark.slow
def test_smollm2_answers_three_chats_as_an_independent_reader_has_them(smollm2):
    chats = smollm2_chats()
    prompts, rows, tokenizer = greedy(smollm2, chats, 60, scan=False)
    assert prompts == [chat["prompt_ids"] for chat in chats]
    assert rows == [chat["new_ids"] for chat in chats]
    assert [tokenizer.decode(row) for row in rows] == [chat["text"] for chat in chats]

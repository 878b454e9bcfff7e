"""Numbers of other implementations: models in GGUF files, the gguf package's blocks, a numpy reader's answers.

tests/goldens/make.py and make_smollm2.py made them.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from data import load_tokenizer
from model import load, load_config
from model.formats.dequantize import dequantize
from model.formats.gguf import container
from model.formats.gguf.container_writer import write
from model.generate import generate

from .conftest import GOLDENS, applied


def difference(cfg, params, golden) -> float:
    """The largest difference of a logit at a real token."""
    out = jax.jit(applied, static_argnums=0)(
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


def test_a_model_in_several_gguf_files_is_the_model_in_one(tmp_path):
    """As the gguf package splits it."""
    first, last = (GOLDENS / "split_gguf" / f"model-{i:05}-of-00003.gguf" for i in (1, 3))
    cfg, params = load(first)
    whole_cfg, whole = load(GOLDENS / "llama_tied.gguf")
    assert cfg == whole_cfg
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    with pytest.raises(
        ValueError, match="is part 3 of 3 of a model; give the first, .*model-00001-of-00003.gguf"
    ):
        load(last)
    copy = shutil.copy(first, tmp_path)
    with pytest.raises(ValueError, match="first of 3 files; 2 are missing: .*model-00002-of-00003.gguf"):
        load(copy)
    renamed = shutil.copy(first, tmp_path / "whole.gguf")
    with pytest.raises(
        ValueError, match="is part 1 of 3 of a model; wanted the name NAME-00001-of-00003.gguf"
    ):
        load(renamed)
    for i in (2, 3):  # the second part twice
        shutil.copy(
            GOLDENS / "split_gguf" / "model-00002-of-00003.gguf", tmp_path / f"model-{i:05}-of-00003.gguf"
        )
    with pytest.raises(ValueError, match="model-00003-of-00003.gguf: says that it is part 2 of 3"):
        load(copy)


LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0},
        {"rope.scaling.factor": 3.0},  # without a type
        {"rope.scale_linear": 3.0},  # of old files
        {"rope.scaling.type": "none", "rope.scaling.factor": 3.0},
    ],
)
def test_linear_scalings_in_gguf_are_those_of_transformers(keys, tmp_path):
    file = container.read(GOLDENS / "llama_tied.gguf")
    metadata = (
        file.metadata | {"llama.rope.freq_base": 500.0} | {f"llama.{key}": x for key, x in keys.items()}
    )
    tensors = {name: file.raw(name).view("<f4").reshape(of.shape) for name, of in file.tensors.items()}
    kinds = {name: ("F32", values.shape) for name, values in tensors.items()}
    write(tmp_path / "model.gguf", metadata, kinds, tensors.__getitem__)
    cfg, params = load(tmp_path / "model.gguf")
    cases = json.loads((GOLDENS / "keys.json").read_text())["llama_tied"]["logits"]
    (wanted,) = [numbers for edits, numbers in cases if edits == [[["rope_parameters"], LINEAR]]]
    golden = np.load(GOLDENS / "llama_tied" / "logits.npz")
    inputs = {"positions": golden["positions"], "segment_ids": golden["mask"]}
    values = np.asarray(applied(cfg, params, golden["tokens"], **inputs).logits)
    ours = np.concatenate([values[0, 12], values[1, 8], values[1, 1]])
    error = np.abs(ours[:: len(ours) // 9] - wanted).max()
    assert (error < 2e-4) == (keys.get("rope.scaling.type") != "none")


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

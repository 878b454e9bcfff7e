"""/v1/embeddings and /v1/score against the vectors of sentence-transformers, with OpenAI's official client."""

import base64
import json
import shutil

import numpy as np
import openai
import pytest

from serve import embedder as module
from serve.embedder import embedder
from tests.conftest import ROOT

from .conftest import post, serving

TINY = ROOT / "tests" / "goldens" / "embedder"  # as Qwen3-Embedding


@pytest.fixture(scope="module")
def model():
    return embedder(str(TINY))


@pytest.fixture(scope="module")
def embedding_port(make_engine, model):
    with serving(make_engine(), model, max_body_bytes=100_000) as port:
        yield port


@pytest.fixture(scope="module")
def embedding_client(embedding_port):
    url = f"http://127.0.0.1:{embedding_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_texts_and_token_ids_have_the_vectors_of_sentence_transformers(embedding_client, model):
    golden = np.load(TINY / "vectors.npz")
    texts = [str(text) for text in golden["texts"]]
    ids = [model.tokens(text) for text in texts]
    expected = embedder(str(TINY))(texts)
    for given in (texts, ids):
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 16}):
            answer = embedding_client.embeddings.create(model="embedder", input=given, **options)
            vectors = [each.embedding for each in answer.data]
            if options.get("encoding_format") == "base64":
                vectors = [np.frombuffer(base64.b64decode(each), "<f4") for each in vectors]
            np.testing.assert_allclose(vectors, expected, atol=2e-6)
            assert [each.index for each in answer.data] == list(range(len(texts)))
            assert answer.usage.prompt_tokens == sum(map(len, ids)) == answer.usage.total_tokens
    for given in (texts[0], ids[0]):
        answer = embedding_client.embeddings.create(model="embedder", input=given)
        np.testing.assert_allclose([each.embedding for each in answer.data], expected[:1], atol=2e-6)


def test_many_texts_of_all_lengths_come_back_in_their_order_from_few_programs(
    embedding_client, model, monkeypatch
):
    shapes, embed = set(), module.embed
    monkeypatch.setattr(
        module, "embed", lambda c, p, tokens, *rest: (shapes.add(tokens.shape), embed(c, p, tokens, *rest))[1]
    )
    texts = ["word " * (1 + i * 7 % 90) + str(i) for i in range(70)]
    answer = embedding_client.embeddings.create(model="embedder", input=texts)
    assert len(shapes) <= 6 and all(rows in (1, 8, 32) for rows, _ in shapes)
    vectors = np.array([each.embedding for each in answer.data])
    for i in (0, 12, 41, 69):
        alone = embedding_client.embeddings.create(model="embedder", input=texts[i]).data[0].embedding
        np.testing.assert_allclose(vectors[i], alone, atol=2e-6)
        assert np.argmax(vectors @ np.array(alone)) == i


def test_scores_are_cosines_of_pairs(embedding_port, model):
    texts = ["a cat", "a dog", "the bank"]
    vectors = model(texts)
    of = lambda first, second: post(
        embedding_port, {"model": "embedder", "text_1": first, "text_2": second}, "/v1/score"
    )
    status, answer = of(texts[0], texts)
    assert status == 200 and [each["index"] for each in answer["data"]] == [0, 1, 2]
    np.testing.assert_allclose([each["score"] for each in answer["data"]], vectors @ vectors[0], atol=2e-6)
    _, answer = of(texts, texts[::-1])
    expected = np.sum(vectors * vectors[::-1], axis=1)
    np.testing.assert_allclose([each["score"] for each in answer["data"]], expected, atol=2e-6)
    assert of(texts[0], texts[0])[1]["data"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert of(texts[:2], texts)[0] == 400


def test_vectors_are_cut_where_the_model_was_trained_for_it(tmp_path, model, make_engine):
    folder = tmp_path / "cut"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text()) | {"matryoshka_dimensions": [4, 8, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    whole = model(["a cat"])[0][:8]
    with serving(make_engine(), embedder(str(folder))) as port:
        ask = lambda count: post(
            port, {"model": "cut", "input": "a cat", "dimensions": count}, "/v1/embeddings"
        )
        status, answer = ask(8)
        vector = answer["data"][0]["embedding"]
        np.testing.assert_allclose(vector, whole / np.linalg.norm(whole), atol=2e-6)
        status, answer = ask(5)
        assert status == 400 and "4, 8" in answer["error"]["message"]


@pytest.mark.parametrize(
    "change,param",
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": [10**9]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "word " * 2000}, "input"),
        ({"dimensions": 8}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"spell": 1}, "spell"),
    ],
)
def test_wrong_fields_are_refused_by_name(embedding_port, change, param):
    body = {"model": "embedder", "input": "a"} | change
    status, answer = post(embedding_port, body, "/v1/embeddings")
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_a_model_that_does_not_embed_is_not_found(client, embedding_client):
    with pytest.raises(openai.NotFoundError, match="no model that embeds"):
        client.embeddings.create(model="tiny", input="a")
    with pytest.raises(openai.NotFoundError, match="'embedder' does"):
        embedding_client.embeddings.create(model="tiny", input="a")
    assert [model.id for model in embedding_client.models.list()] == ["tiny", "embedder"]
    assert embedding_client.models.retrieve("embedder").id == "embedder"

"""Encoders: BERT's old and partial checkpoints, embeddings, what an encoder can't do; encoder-decoders and their cache.

tests/goldens/make.py and make_minilm.py made the golden files; test_families.py has what all families share.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from model import ModelConfig, init_cache, load, logical_axes, param_shapes, save
from model.blocks.positions import RelativeBias
from model.blocks.residual import ParallelResidual
from model.config import ClassHead, Encoder
from model.embed import embed
from model.generate import generate
from model.inspect.anatomy import parameter_count
from model.inspect.describe import describe

from .conftest import GOLDENS, applied, compiled_fast, random_params, tiny

forward = compiled_fast(applied, static_argnums=0)


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
    assert "ignored 3 tensors" in caplog.text


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


def test_a_classifier_keeps_the_names_of_its_labels(tmp_path):
    cfg, params = load(GOLDENS / "bert_classes")
    assert cfg.heads[0].labels == ("good", "bad", "neither") and cfg.pooler is not None
    save(tmp_path / "model", cfg, params, format="huggingface")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["id2label"] == {"0": "good", "1": "bad", "2": "neither"} and saved["label2id"]["bad"] == 1
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    with pytest.raises(ValueError, match="needs a pooler"):
        cfg.replace(pooler=None)
    wrong = saved | {"id2label": {"0": "a", "2": "b"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="id2label.*does not name the classes from 0"):
        load(tmp_path / "model")


def test_a_decoder_may_have_a_head_of_classes_that_only_our_own_format_holds(tmp_path):
    cfg, params = load(GOLDENS / "llama_tied")
    cfg = cfg.replace(heads=(ClassHead("topic", ("a", "b", "c"), bias=False),))
    weights = np.random.default_rng(0).normal(size=(cfg.width, 3)).astype("f4")
    params = params | {"topic_head": jnp.asarray(weights)}
    out = forward(cfg, params, np.array([[3, 1, 4, 1, 5]], np.int32))
    np.testing.assert_allclose(out.heads["topic"], np.asarray(out.hidden) @ weights, atol=1e-5)
    save(tmp_path / "model", cfg, params)
    assert load(tmp_path / "model")[0] == cfg
    with pytest.raises(ValueError, match="no Hugging Face family can express"):
        save(tmp_path / "other", cfg, params, format="huggingface")


def test_token_types_are_all_the_first_where_none_are_given():
    cfg, params = load(GOLDENS / "bert")
    tokens = np.load(GOLDENS / "bert" / "logits.npz")["tokens"]
    given = forward(cfg, params, tokens, token_types=np.zeros_like(tokens)).logits
    np.testing.assert_array_equal(forward(cfg, params, tokens).logits, given)
    with pytest.raises(ValueError, match="token_types"):
        llama, weights = load(GOLDENS / "llama_tied")
        applied(llama, weights, tokens, token_types=np.zeros_like(tokens))


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


def test_an_empty_text_has_the_zero_vector_and_changes_no_gradient():
    cfg = tiny(layers=1)
    params = random_params(cfg)
    tokens, mask = np.full((2, 4), 5, np.int32), np.array([[1, 1, 1, 0], [0, 0, 0, 0]], np.int32)
    loss = lambda params, rows: embed(cfg, params, tokens[:rows], mask[:rows])[:, :3].sum()
    beside, alone = (jax.grad(loss)(params, rows) for rows in (2, 1))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), beside, alone)
    assert np.abs(alone["embedding"]).max() > 1e-3
    np.testing.assert_array_equal(embed(cfg, params, tokens, mask)[1], 0.0)


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


# The first distance of each bucket of T5's 32 buckets up to 128, by T5Attention._relative_position_bucket.
CAUSAL = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
EITHER_SIDE = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]


def test_distances_fall_into_the_buckets_of_t5():
    causal, both = RelativeBias().buckets_of(True), RelativeBias().buckets_of(False)
    before, after = causal[128::-1], both[128:]
    assert [int(np.argmax(before == i)) for i in range(32)] == CAUSAL and set(causal[129:]) == {0}
    assert [int(np.argmax(both[128::-1] == i)) for i in range(16)] == EITHER_SIDE
    assert [int(np.argmax(after == i + 16)) for i in range(1, 16)] == EITHER_SIDE[1:]
    assert len(both) == 257 and both[0] == 15 and both[-1] == 31


@pytest.fixture(scope="module")
def t5():
    """(cfg, params, the decoder's tokens, the encoder's) of the first blocks."""
    golden, (cfg, params) = np.load(GOLDENS / "t5" / "logits.npz"), load(GOLDENS / "t5")
    fewer = Encoder(cfg.encoder.blocks[:3], cfg.encoder.final_norm)
    cfg = cfg.replace(blocks=cfg.blocks[:2], encoder=fewer)
    shapes = param_shapes(cfg)
    params = {key: params[key] for key in shapes}
    params["encoder"] = {key: params["encoder"][key] for key in shapes["encoder"]}
    return cfg, params, golden["tokens"].astype(np.int32), golden["encoder_tokens"].astype(np.int32)


def test_a_packed_row_of_an_encoder_decoder_equals_its_documents_alone(t5):
    cfg, params, tokens, sources = t5
    lengths, source_lengths = (5, 9), (12, 3)
    alone = [
        forward(cfg, params, tokens[i : i + 1, :n], encoder_tokens=sources[i : i + 1, :m]).logits[0]
        for i, (n, m) in enumerate(zip(lengths, source_lengths, strict=True))
    ]

    def packed(rows, of_each):
        parts = [rows[i, :n] for i, n in enumerate(of_each)]
        ids = np.repeat([1, 2], of_each)
        return np.pad(np.concatenate(parts), (0, 2))[None], np.pad(ids, (0, 2))[None]

    (row, ids), (source, source_ids) = packed(tokens, lengths), packed(sources, source_lengths)
    out = forward(cfg, params, row, segment_ids=ids, encoder_tokens=source, encoder_segment_ids=source_ids)
    np.testing.assert_allclose(out.logits[0, :14], np.concatenate(alone), atol=2e-5)


def test_a_cache_remembers_the_encoders_text_through_chunks_and_single_tokens(t5):
    """Three texts in rows 2, 0 and 3 of a cache whose rows have held other texts before."""
    cfg, params, tokens, sources = t5
    rows, tokens = jnp.array([2, 0, 3], jnp.int32), tokens[:3]
    source_real = (np.arange(17) < np.array([[17], [3], [8]])).astype(np.int32)
    encoder = {"encoder_tokens": sources[:3], "encoder_segment_ids": source_real}
    whole = forward(cfg, params, tokens, **encoder).logits
    cache = init_cache(cfg, 4, 20, encoder_length=19)
    stale = jax.tree.map(lambda x: jnp.ones_like(x), cache.layers)
    cache = cache.replace(
        layers=stale, rows=rows, page_table=rows[:, None], length=jnp.zeros((3,), jnp.int32)
    )
    out = forward(cfg, params, tokens[:, :6], cache=cache, **encoder)
    found = [out.logits]
    chunk = np.pad(tokens[:, 6:10], ((0, 0), (0, 2)))
    real = np.array([[1] * 4 + [0] * 2] * 3)
    out = forward(cfg, params, chunk, segment_ids=real, cache=out.cache)
    found.append(out.logits[:, :4])
    for t in range(10, 14):
        out = forward(cfg, params, tokens[:, t : t + 1], cache=out.cache)
        found.append(out.logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=5e-5)
    untouched = out.cache.layers["block_0"]["cross_k"][1]
    np.testing.assert_array_equal(untouched, jnp.ones_like(untouched))


def test_greedy_answers_are_those_of_a_loop_without_a_cache(t5):
    cfg, params, _, sources = t5
    prompts, texts = [[0], [0, 5, 7]], [sources[0, :11].tolist(), sources[1, :4].tolist()]
    wanted = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt)
        for _ in range(4):
            row = np.pad(np.array([ids], np.int32), ((0, 0), (0, 8 - len(ids))))
            logits = forward(cfg, params, row, encoder_tokens=np.array([text], np.int32)).logits
            ids.append(int(logits[0, len(ids) - 1].argmax()))
        wanted.append(ids[len(prompt) :])
    assert generate(cfg, params, prompts, 4, encoder_prompts=texts) == wanted
    with pytest.raises(ValueError, match="1 encoder_prompts for 2 prompts"):
        generate(cfg, params, prompts, 4, encoder_prompts=texts[:1])
    with pytest.raises(ValueError, match="encoder_prompts"):
        generate(cfg, params, prompts, 4)


def test_every_part_of_an_encoder_decoder_learns(t5):
    cfg, params, tokens, sources = t5

    def loss(params):
        logits = applied(cfg, params, tokens, encoder_tokens=sources).logits
        return -jax.nn.log_softmax(logits)[..., 3].mean()

    gradients = compiled_fast(jax.grad(loss))(params)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))


def test_what_an_encoder_reads_is_asked_for_and_refused_where_there_is_none(t5):
    cfg, params, tokens, sources = t5
    with pytest.raises(ValueError, match="needs encoder_tokens"):
        forward(cfg, params, tokens)
    with pytest.raises(ValueError, match="room for 16; make it with encoder_length=17"):
        cache = init_cache(cfg, 4, 20, encoder_length=16)
        forward(cfg, params, tokens, cache=cache, encoder_tokens=sources)
    llama, weights = load(GOLDENS / "llama_tied")
    with pytest.raises(ValueError, match="without an encoder"):
        forward(llama, weights, tokens, encoder_tokens=sources)
    with pytest.raises(ValueError, match="need an encoder"):
        cfg.replace(encoder=None)
    with pytest.raises(ValueError, match="parallel"):
        dataclasses.replace(cfg.blocks[0], residual=ParallelResidual())
    with pytest.raises(ValueError, match="at least one block"):
        Encoder(())


def test_an_encoder_decoder_is_saved_described_and_counted(t5, tmp_path):
    cfg, params, *_ = t5
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    scanned = cfg.replace(scan=True)
    save(tmp_path / "native", cfg, params)
    again, stacked = load(tmp_path / "native", cfg=scanned)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, param_shapes(scanned))
    assert [name for name, _, _ in scanned.runs("encoder")] == ["run_0", "run_1"]
    save(tmp_path / "back", again, stacked, format="huggingface")
    assert same(load(tmp_path / "back")[1], params)
    jax.tree.map(lambda axes, leaf: None, logical_axes(cfg), params, is_leaf=lambda x: isinstance(x, tuple))
    lines = describe(tmp_path / "native").splitlines()
    assert any(line.startswith("encoder block 1-2 ") for line in lines)
    assert f"{parameter_count(cfg):,}" in next(line for line in lines if line.startswith("total"))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameter_count(cfg)


def test_t5_with_a_head_of_its_own_is_known_by_either_key_of_its_config(tmp_path):
    cfg, params = load(GOLDENS / "flan_t5")
    assert not cfg.tied_head and cfg.logit_scale == 1.0 and load(GOLDENS / "t5")[0].tied_head
    saved = json.loads((GOLDENS / "flan_t5" / "config.json").read_text())
    by_google = {key: value for key, value in saved.items() if key != "scale_decoder_outputs"}
    by_transformers_5 = saved | {"tie_word_embeddings": True}
    for config in (by_google, by_transformers_5):
        folder = tmp_path / str(len(config))
        shutil.copytree(GOLDENS / "flan_t5", folder)
        (folder / "config.json").write_text(json.dumps(config))
        again, others = load(folder)
        assert again == cfg and same(others, params)

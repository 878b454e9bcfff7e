"""What model.inspect.trace shows is what the model computes, and asking for nothing costs nothing."""

import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import train_tokenizer
from model import Attention, Block, ModelConfig, RMSNorm, SwiGLU, apply, param_shapes, save
from model.__main__ import main
from model.blocks import attention as attention_file
from model.blocks.differential_attention import DifferentialAttention
from model.blocks.latent_attention import LatentAttention
from model.blocks.mamba2 import Mamba2
from model.blocks.mixture_of_depths import MixtureOfDepths
from model.blocks.moe import MoE
from model.blocks.parallel import Parallel
from model.inspect.trace import likeliest, logit_lens, trace
from model.layout import relayout

from .conftest import applied, compiled_fast, random_params, random_tokens

HYBRID = ModelConfig(
    31,
    12,
    (
        Block(Attention(4, 2, 6, window=3, softcap=5.0, sinks=True), MoE(6, 2, SwiGLU(9))),
        Block(Mamba2(2, 6, 4), None),
        Block(LatentAttention(2, 4, 2, 5, 7), SwiGLU(16)),
        Block(LatentAttention(2, 4, 2, 5, 7), SwiGLU(16)),
        Block(Parallel((DifferentialAttention(4, 2, 6, 0.2), Mamba2(2, 6, 4))), None),
    ),
    max_length=32,
)


@functools.cache
def traced(scan=False):
    cfg = HYBRID
    params = random_params(cfg)
    cfg, params = relayout(cfg, params, scan=scan)
    tokens = random_tokens(cfg, (2, 9))
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
    return cfg, params, tokens, segments, trace(cfg, params, tokens, segments)


def test_the_last_depth_of_the_lens_is_the_model():
    cfg, params, tokens, segments, found = traced()
    out = compiled_fast(applied, static_argnums=0)(cfg, params, tokens, segment_ids=segments)
    assert len(found.hidden) == len(cfg.blocks) + 1
    np.testing.assert_allclose(logit_lens(cfg, params, found.hidden[-1]), out.logits, atol=1e-4)
    ids, probabilities = likeliest(cfg, params, found.hidden, 4)
    expected = np.sort(jax.nn.softmax(out.logits), axis=-1)[..., :-5:-1]
    np.testing.assert_allclose(probabilities[-1], expected, atol=1e-5)
    np.testing.assert_array_equal(ids[-1, ..., 0], jnp.argmax(out.logits, -1))


def test_the_lens_after_n_blocks_is_the_model_of_these_blocks():
    cfg, params, tokens, segments, found = traced()
    shallow = cfg.replace(blocks=cfg.blocks[:2])
    out = compiled_fast(applied, static_argnums=0)(shallow, params, tokens, segment_ids=segments)
    np.testing.assert_allclose(logit_lens(cfg, params, found.hidden[2]), out.logits, atol=1e-4)


def test_a_scanned_model_is_traced_as_the_unrolled_one():
    *_, unrolled = traced()
    *_, scanned = traced(scan=True)
    assert scanned.attention.keys() == unrolled.attention.keys() == {0, 2, 3, 4}
    assert scanned.expert_load.keys() == unrolled.expert_load.keys() == {0}
    for name in ("hidden", "attention", "expert_load"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-5),
            getattr(scanned, name),
            getattr(unrolled, name),
        )


def test_attention_weights_are_those_that_mixed_the_values():
    """From the weights, the values and the output map comes what the block added to the residual stream."""
    norm = RMSNorm()
    cfg = ModelConfig(31, 12, (Block(Attention(4, 2, 6, window=4), None, norm),))
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 9))
    found, of_block = trace(cfg, params, tokens), params["block_0"]
    x_BTD = found.hidden[0]
    x_BTD *= jax.lax.rsqrt(jnp.mean(x_BTD**2, -1, keepdims=True) + norm.eps) * of_block["mixer_norm"]["scale"]
    v_BSHC = jnp.repeat(jnp.einsum("BSD,DKC->BSKC", x_BTD, of_block["mixer"]["v"]), 2, axis=2)
    added = jnp.einsum("BHTS,BSHC,HCD->BTD", found.attention[0], v_BSHC, of_block["mixer"]["o"])
    np.testing.assert_allclose(found.hidden[1] - found.hidden[0], added, atol=1e-5)


def test_attention_stays_within_what_a_token_may_see():
    *_, segments, found = traced()
    same = segments[:, None, :, None] == segments[:, None, None, :]
    for number, weights in found.attention.items():
        assert (np.where(same & np.tri(9, dtype=bool), 0, weights) == 0).all()
        total = np.asarray(weights).sum(-1)
        if number == 0:  # sinks take a share
            assert (total < 1).all() and (total > 0).all()
            assert (np.where(np.tri(9, k=-3, dtype=bool), weights, 0) == 0).all()
        else:
            np.testing.assert_allclose(total, 1, atol=1e-5)


def test_blocks_that_tokens_pass_by_show_no_map_of_tokens_that_stand_elsewhere():
    plain = Block(Attention(2, 1, 6), SwiGLU(9))
    cfg = ModelConfig(31, 12, (plain, Block(MixtureOfDepths(plain, None), None, None)))
    found = trace(cfg, random_params(cfg), random_tokens(cfg, (1, 5)))
    assert set(found.attention) == {0} and len(found.hidden) == 3


def test_each_real_token_chose_its_experts():
    *_, segments, found = traced()
    assert found.expert_load[0].sum() == 2 * (segments > 0).sum()


@pytest.mark.parametrize("scan", [False, True])
def test_the_program_is_the_same_as_without_any_of_it(scan, monkeypatch):
    cfg = HYBRID.replace(scan=scan)
    arguments = param_shapes(cfg), jax.ShapeDtypeStruct((2, 9), jnp.int32)
    program = lambda: jax.jit(lambda params, tokens: apply(cfg, params, tokens)).lower(*arguments).as_text()
    with_points = program()
    monkeypatch.setattr(nn.Module, "sow", lambda *_, **__: False)
    monkeypatch.setattr(attention_file, "sow_weights", lambda *_, **__: None)
    assert program() == with_points


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    tokenizer = train_tokenizer("bpe", ["the cat sat on the mat </script>"] * 20, 270)
    tokenizer.save(folder / "tokenizer")
    files = {item.name: item.read_bytes() for item in (folder / "tokenizer").iterdir()}
    cfg = HYBRID.replace(vocab_size=320)
    save(folder / "model", cfg, random_params(cfg), tokenizer=files)
    return folder / "model"


def test_the_page_stands_alone_and_has_the_figures(hybrid, tmp_path, capsys):
    page = tmp_path / "page.html"
    text = "the cat </script> sat"
    assert main(["trace", str(hybrid), text, f"--out={page}"]) == 0
    written = page.read_text()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", written)
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', written, re.S)
    found = json.loads(found)
    tokens, blocks = len(found["tokens"]), len(HYBRID.blocks)
    assert found["text"].endswith(text)
    assert "".join(found["names"][str(i)] for i in found["tokens"]) == found["text"]
    assert np.shape(found["ids"]) == np.shape(found["probabilities"]) == (blocks + 1, tokens, 5)
    assert found["heads"] == {"0": 4, "2": 2, "3": 2, "4": 4}
    assert sum(found["experts"]["0"]) == 2 * tokens
    assert f"{tokens} tokens through {blocks} blocks" in capsys.readouterr().out


def test_a_text_that_no_page_can_show_is_an_error(hybrid, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["trace", str(hybrid), "x, y; " * 200, f"--out={page}"]) == 2
    assert "a page shows 1 to 256" in capsys.readouterr().err and not page.exists()

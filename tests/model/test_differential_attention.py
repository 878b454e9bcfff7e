"""Differential attention: a loop over pairs of heads and tokens; decoding and packing give the same numbers."""

import jax
import numpy as np
import pytest

from model import ModelConfig, RMSNorm, init_cache, param_shapes
from model.blocks.differential_attention import DifferentialAttention
from model.blocks.ffn import GatedMLP
from model.blocks.positions import Rope
from model.config import Block
from model.inspect.flops import forward_flops_per_token

from .conftest import applied, check_decoding, paged_cache, random_params, random_tokens
from .conftest import compiled_fast as jit

forward = jit(applied, static_argnums=0)

PLAIN = DifferentialAttention(4, 2, 6, 0.2, Rope(100.0))
BIASED = DifferentialAttention(
    8, 4, 4, 0.5, Rope(50.0), qkv_bias=True, out_bias=True, pair_norm=RMSNorm(1e-2, scale=False)
)


def model(*mixers):
    blocks = tuple(Block(mixer, GatedMLP(40), RMSNorm(1e-2)) for mixer in mixers)
    return ModelConfig(61, 24, blocks, max_length=256)


@pytest.fixture(scope="module")
def small():
    cfg = model(PLAIN, BIASED)
    return cfg, random_params(cfg)


def brute_rotate(x, position, rope):
    C = len(x)
    turned = x[: C // 2] + 1j * x[C // 2 :]
    turned = turned * np.exp(1j * position * rope.theta ** (-np.arange(0, C, 2) / C))
    return np.concatenate([turned.real, turned.imag])


def brute_attention(spec, p, x):
    """[T, D] to [T, D]: (softmax(q1 k1) - lambda softmax(q2 k2)) [v1, v2] for each pair of heads."""
    T, H, K, C = len(x), spec.num_heads, spec.num_kv_heads, spec.head_dim
    bias = lambda name, h: p[f"{name}_bias"][h] if spec.qkv_bias else 0
    heads = lambda name, h: [row @ p[name][:, h] + bias(name, h) for row in x]
    turned = lambda name, h: [brute_rotate(v, t, spec.rope) for t, v in enumerate(heads(name, h))]
    lam = np.exp(p["lambda_q1"] @ p["lambda_k1"]) - np.exp(p["lambda_q2"] @ p["lambda_k2"]) + spec.lambda_init
    y = np.zeros_like(x) + p.get("o_bias", 0)
    for pair in range(H // 2):
        kv = pair * K // H
        values = np.concatenate([heads("v", kv), heads("v", kv + K // 2)], axis=1)
        seen = []
        for h, k in ((pair, kv), (pair + H // 2, kv + K // 2)):
            queries, keys = turned("q", h), turned("k", k)
            weights = [np.exp([queries[t] @ keys[s] / C**0.5 for s in range(t + 1)]) for t in range(T)]
            seen.append([w / w.sum() @ values[: len(w)] for w in weights])
        difference = np.array(seen[0]) - lam * np.array(seen[1])
        difference /= np.sqrt((difference**2).mean(1, keepdims=True) + spec.pair_norm.eps)
        y += (1 - spec.lambda_init) * difference @ p["o"][pair]
    return y


@pytest.mark.parametrize("spec", [PLAIN, BIASED], ids=["plain", "biases"])
def test_differential_attention_equals_a_loop_over_pairs_of_heads(spec):
    cfg = model(spec)
    params, tokens = random_params(cfg), random_tokens(cfg, (1, 7))
    without_ffn = jax.tree.map(np.asarray, params)
    without_ffn["block_0"]["ffn"] = jax.tree.map(np.zeros_like, params["block_0"]["ffn"])
    hidden = forward(cfg, without_ffn, tokens).hidden
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    norm = lambda x, scale, eps: x / np.sqrt((x * x).mean(1, keepdims=True) + eps) * scale
    x = exact["embedding"][tokens[0]]
    read = norm(x, exact["block_0"]["mixer_norm"]["scale"], 1e-2)
    x = x + brute_attention(spec, exact["block_0"]["mixer"], read)
    np.testing.assert_allclose(
        hidden[0], norm(x, exact["final_norm"]["scale"], cfg.final_norm.eps), atol=3e-5
    )


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_cached_decoding_equals_the_full_forward_pass(paged, small):
    cfg, params = small
    tokens = random_tokens(cfg, (2, 12))
    cache = paged_cache(cfg, 2, 3, 4) if paged else init_cache(cfg, 2, 12)
    check_decoding(forward, cfg, params, tokens, cache, (5, 1, 5, 1))


def test_a_packed_row_equals_its_documents_alone(small):
    cfg, params = small
    tokens = random_tokens(cfg, (1, 12))
    segments = np.array([[1] * 4 + [2] * 6 + [0, 3]])
    positions = np.array([[*range(4), *range(6), 0, 0]])
    packed = forward(cfg, params, tokens, positions, segments).logits[0]
    for start, stop in [(0, 4), (4, 10), (11, 12)]:
        alone = np.zeros((1, 12), np.int32)
        alone[:, : stop - start] = tokens[:, start:stop]
        wanted = forward(cfg, params, alone).logits[0, : stop - start]
        np.testing.assert_allclose(packed[start:stop], wanted, atol=2e-5)


def test_flops_are_two_for_each_matrix_element_and_the_scores():
    cfg = model(PLAIN)
    matrices = sum(x.size for x in jax.tree.leaves(param_shapes(cfg)) if x.ndim > 1)
    scores = 2 * (16 + 1) / 2 * 4 * (6 + 12)
    assert forward_flops_per_token(cfg, 16) == 2 * matrices + scores


def test_heads_without_a_partner_are_refused():
    with pytest.raises(ValueError, match="num_kv_heads must be even"):
        DifferentialAttention(6, 3, 8, 0.2)


def test_a_config_with_differential_attention_comes_back_from_json(small):
    cfg, _ = small
    assert ModelConfig.from_dict(cfg.to_dict()) == cfg

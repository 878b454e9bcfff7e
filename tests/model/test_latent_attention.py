"""Latent attention: a loop over heads, keys and channels; its cache of latents gives what the full form gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import (
    MESH_AXES,
    ModelConfig,
    RMSNorm,
    ShardingRules,
    apply,
    cache_axes,
    init_cache,
    logical_axes,
    param_shapes,
)
from model.blocks.ffn import GatedMLP
from model.blocks.latent_attention import LatentAttention
from model.blocks.positions import Rope, YarnScaling
from model.config import Block
from model.inspect.flops import forward_flops_per_token
from model.kernels import backend
from model.sharding import named_sharding
from tests.meshes import assert_divided, compiled

from .conftest import applied, check_decoding, paged_cache, random_params, random_tokens
from .conftest import compiled_fast as jit

forward = jit(applied, static_argnums=0)

PLAIN = LatentAttention(4, 6, 4, 5, kv_rank=7, rope=Rope(100.0, interleaved=True))
FULL = LatentAttention(
    4, 6, 4, 5, 7, q_rank=9, rope=Rope(50.0, YarnScaling(4.0, 16)), bias=True, scale=0.5, norm=RMSNorm(1e-3)
)


GROUPED = dataclasses.replace(FULL, groups=2)


def model(*mixers):
    blocks = tuple(Block(mixer, GatedMLP(40), RMSNorm(1e-2)) for mixer in mixers)
    return ModelConfig(61, 24, blocks, max_length=256)


@pytest.fixture(scope="module")
def small():
    cfg = model(PLAIN, FULL)
    return cfg, random_params(cfg)


def brute_norm(x, scale, eps):
    return x / np.sqrt((x * x).mean() + eps) * scale


def brute_rotate(x, position, rope):
    out, turns = x.copy(), rope.frequencies(len(x)) * position
    for f, angle in enumerate(turns):
        i, j = (2 * f, 2 * f + 1) if rope.interleaved else (f, f + len(turns))
        out[i] = x[i] * np.cos(angle) - x[j] * np.sin(angle)
        out[j] = x[j] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def ends_of(spec):
    return [""] if spec.groups == 1 else [f"_{group}" for group in range(spec.groups)]


def brute_attention(spec, p, x):
    """[T, D] to [T, D], equations (37) to (47) of the paper, one head and token at a time."""
    T, N, eps = len(x), spec.nope_dim, spec.norm.eps
    latents, shared = [], []
    for t in range(T):
        both = x[t] @ p["kv_a"] + p.get("kv_a_bias", 0)
        own = np.split(both[: spec.groups * spec.kv_rank], spec.groups)
        latents.append(
            [brute_norm(z, p[f"kv_a_norm{end}"]["scale"], eps) for z, end in zip(own, ends_of(spec))]
        )
        shared.append(brute_rotate(both[spec.groups * spec.kv_rank :], t, spec.rope))
    y = np.zeros_like(x) + p.get("o_bias", 0)
    for h in range(spec.num_heads):
        group, in_group = divmod(h, spec.num_heads // spec.groups)
        kv_b = p[f"kv_b{ends_of(spec)[group]}"][:, in_group]
        keys = [np.concatenate([z[group] @ kv_b[:, :N], k]) for z, k in zip(latents, shared)]
        values = [z[group] @ kv_b[:, N:] for z in latents]
        for t in range(T):
            if spec.q_rank is None:
                q = x[t] @ p["q"][:, h]
            else:
                q = brute_norm(x[t] @ p["q_a"] + p["q_a_bias"], p["q_a_norm"]["scale"], eps) @ p["q_b"][:, h]
            q = np.concatenate([q[:N], brute_rotate(q[N:], t, spec.rope)])
            scores = np.array([q @ keys[s] for s in range(t + 1)])
            weights = np.exp(scores * (spec.scale or len(q) ** -0.5))
            y[t] += sum(w * v for w, v in zip(weights / weights.sum(), values)) @ p["o"][h]
    return y


@pytest.mark.parametrize("spec", [PLAIN, FULL, GROUPED], ids=["plain", "every option", "two groups"])
def test_latent_attention_equals_a_loop_over_heads_and_tokens(spec):
    cfg = model(spec)
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 7))
    without_ffn = jax.tree.map(np.asarray, params)
    without_ffn["block_0"]["ffn"] = jax.tree.map(np.zeros_like, params["block_0"]["ffn"])
    hidden = forward(cfg, without_ffn, tokens).hidden
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    block = exact["block_0"]
    for b in range(2):
        x = exact["embedding"][tokens[b]]
        normed = np.array([brute_norm(row, block["mixer_norm"]["scale"], 1e-2) for row in x])
        x = x + brute_attention(spec, block["mixer"], normed)
        wanted = [brute_norm(row, exact["final_norm"]["scale"], cfg.final_norm.eps) for row in x]
        np.testing.assert_allclose(hidden[b], wanted, atol=3e-5)


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_decoding_from_latents_equals_the_full_form(paged, small):
    cfg, params = small
    tokens = random_tokens(cfg, (2, 19))
    cache = paged_cache(cfg, 2, 5, 4) if paged else init_cache(cfg, 2, 20)
    widths = (7, 1, 1, 7, 1, 1, 1)  # two chunks, and tokens one by one between and after them
    check_decoding(forward, cfg, params, tokens, cache, widths)


def test_padded_rows_of_a_prompt_decode_as_if_each_were_alone(small):
    cfg, params = small
    tokens, lengths = random_tokens(cfg, (3, 12)), np.array([5, 1, 9])
    wanted = forward(cfg, params, tokens).logits
    real = (np.arange(9) < lengths[:, None]).astype(np.int32)
    out = forward(cfg, params, tokens[:, :9] * real, segment_ids=real, cache=paged_cache(cfg, 3, 4, 4))
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(out.logits[b, :length], wanted[b, :length], atol=3e-5)
    now = np.take_along_axis(tokens, lengths[:, None], 1)
    out = forward(cfg, params, now, cache=out.cache)
    np.testing.assert_allclose(out.logits[:, 0], wanted[np.arange(3), lengths], atol=3e-5)


def test_a_packed_row_equals_its_documents_alone(small):
    cfg, params = small
    tokens = random_tokens(cfg, (1, 15))
    segments = np.array([[1] * 4 + [2] * 8 + [0] + [3] * 2])
    positions = np.array([[*range(4), *range(8), 0, *range(2)]])
    packed = forward(cfg, params, tokens, positions, segments).logits[0]
    for start, stop in [(0, 4), (4, 12), (13, 15)]:
        alone = np.zeros((1, 15), np.int32)
        alone[:, : stop - start] = tokens[:, start:stop]
        wanted = forward(cfg, params, alone).logits[0, : stop - start]
        np.testing.assert_allclose(packed[start:stop], wanted, atol=2e-5)


def test_the_cache_holds_one_latent_and_one_key_a_token(small):
    cfg, _ = small
    cache = init_cache(cfg, 3, 10)
    shapes = jax.tree.map(jnp.shape, cache.layers)
    assert shapes == {name: {"latent": (3, 10, 7), "k_rope": (3, 10, 4)} for name in ("block_0", "block_1")}


def test_heads_split_over_devices(small):
    cfg, params = small
    mesh = jax.make_mesh(
        (2, 1, 1, 1, 1, 4),
        MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 6,
    )
    shardings = jax.tree.map(
        lambda names: named_sharding(mesh, ShardingRules(), names),
        logical_axes(cfg),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tokens = random_tokens(cfg, (2, 8))
    shardings["embedding"] = named_sharding(mesh, ShardingRules(), (None, None))  # 61 does not split
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        rules = ShardingRules(vocab=(), act_vocab=())
        split = compiled(jit(functools.partial(apply, cfg, rules=rules)), placed, tokens)
        found = split(placed, tokens).logits
    assert_divided(compiled(jit(functools.partial(apply, cfg)), params, tokens), split, 0.25, 0.35)
    assert placed["block_0"]["mixer"]["kv_b"].addressable_shards[0].data.shape == (7, 1, 11)
    np.testing.assert_allclose(found, forward(cfg, params, tokens).logits, atol=2e-5)


def test_flops_are_two_for_each_matrix_element_and_the_scores():
    for spec in (PLAIN, dataclasses.replace(PLAIN, q_rank=9)):
        cfg = model(spec)
        matrices = sum(x.size for x in jax.tree.leaves(param_shapes(cfg)) if x.ndim > 1)
        scores = 2 * (16 + 1) / 2 * 4 * (10 + 5)
        assert forward_flops_per_token(cfg, 16) == 2 * matrices + scores


def test_an_odd_number_of_rotated_channels_is_refused():
    with pytest.raises(ValueError, match="rope_dim=5 is odd"):
        dataclasses.replace(PLAIN, rope_dim=5)


def test_a_config_with_latent_attention_comes_back_from_json(small):
    cfg, _ = small
    assert ModelConfig.from_dict(cfg.to_dict()) == cfg


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_two_groups_decode_by_the_kernel_from_pages_that_devices_split(dtype):
    """Pages have a head for each group, so two devices hold half of the latents each."""
    cfg = model(GROUPED)
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 12))
    shapes = jax.tree.map(jnp.shape, init_cache(cfg, 2, 12).layers)["block_0"]
    assert shapes == {"latent": (2, 12, 2 * GROUPED.kv_rank), "k_rope": (2, 12, 2 * GROUPED.rope_dim)}
    assert cache_axes(cfg)["block_0"]["latent"] == ("pages", "slots", "act_kv_heads")
    check_decoding(forward, cfg, params, tokens, paged_cache(cfg, 2, 5, 4), (7, 1, 1, 3))
    atol = 3e-5 if dtype is None else 0.1
    with backend.use("tpu", interpret=True):
        cache = init_cache(cfg, 2, 12, dtype)
        check_decoding(jit(applied, static_argnums=0), cfg, params, tokens, cache, (7, 1, 1, 3), atol=atol)


def test_groups_must_divide_the_heads():
    with pytest.raises(ValueError, match="groups=3 do not divide num_heads=4"):
        dataclasses.replace(PLAIN, groups=3)

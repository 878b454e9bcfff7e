"""Whole models of recurrent mixers, alone and beside attention: decoding, packing, scanning, saving, learning."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import (
    Attention,
    Block,
    ModelConfig,
    ShardingRules,
    SwiGLU,
    apply,
    init,
    init_cache,
    logical_axes,
    param_shapes,
    save,
)
from model.blocks.deltanet import GatedDeltaNet, KimiDeltaAttention
from model.blocks.mamba import Mamba
from model.blocks.mamba2 import Mamba2
from model.blocks.norms import LayerNorm, RMSNorm
from model.blocks.retnet import Retention
from model.blocks.rglru import RGLRU
from model.blocks.rwkv7 import RWKV7, RWKV7ChannelMix
from model.generate import generate
from model.inspect.anatomy import cache_bytes_per_token, state_bytes_per_row
from model.inspect.describe import describe
from model.layout import relayout
from model.sharding import named_sharding
from tests.meshes import assert_divided, compiled

from .conftest import applied, check_decoding, random_tokens
from .conftest import compiled_fast as jit

forward = jit(applied, static_argnums=0)


def of(*blocks):
    return ModelConfig(32, 12, blocks, max_length=64)


def rwkv_layer(first):
    norm = LayerNorm()
    time_mix = RWKV7(2, 6, 2, 3, 4, 5, first=first)
    return Block(time_mix, None, norm), Block(RWKV7ChannelMix(20, 12), None, norm)


MODELS = {
    "mamba-2": of(*[Block(Mamba2(4, 6, 5), None)] * 2),
    "hybrid": of(
        Block(GatedDeltaNet(4, 2, 3, 4), SwiGLU(20)),
        Block(Attention(2, 2, 6), SwiGLU(20)),
        Block(Mamba(24, 4, 2, norm=RMSNorm()), None),
    ),
    "rwkv-7": of(*rwkv_layer(True), *rwkv_layer(False), *rwkv_layer(False)),
}
EVERY = MODELS | {
    "all": of(
        Block(KimiDeltaAttention(2, 4, decay_lower_bound=-5.0), None),
        Block(RGLRU(4, 3), SwiGLU(20)),
        Block(Retention(2, 4, 5), SwiGLU(20)),
    )
}


mostly_slow = pytest.mark.parametrize(
    "name", ["mamba-2", *(pytest.param(name, marks=pytest.mark.slow) for name in list(EVERY)[1:])]
)


@functools.cache
def fresh(name):
    cfg = EVERY[name]
    params = jit(init, static_argnums=0)(cfg, jax.random.key(0))
    noise = np.random.default_rng(0)  # zeros at the start would hide what they multiply
    return cfg, jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), params)


@pytest.mark.parametrize(
    "name, scan", [("mamba-2", True), ("hybrid", False), ("rwkv-7", False), ("rwkv-7", True)]
)
def test_decoding_with_a_cache_equals_the_full_forward_pass(name, scan):
    cfg, params = relayout(*fresh(name), scan=scan)
    tokens = random_tokens(cfg, (2, 12))
    cache = init_cache(cfg, 2, 16)
    check_decoding(forward, cfg, params, tokens, cache, (7, 1, 1), atol=5e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_equals_its_documents_alone(name):
    cfg, params = fresh(name)
    tokens = random_tokens(cfg, (1, 12))
    segments = np.array([[1] * 5 + [2] * 7])
    positions = np.concatenate([np.arange(5), np.arange(7)])[None]
    packed = forward(cfg, params, tokens, positions, segments).logits
    second = np.concatenate([tokens[:, 5:], tokens[:, :5]], axis=1)
    np.testing.assert_allclose(packed[:, :5], forward(cfg, params, tokens).logits[:, :5], atol=5e-5)
    np.testing.assert_allclose(packed[:, 5:], forward(cfg, params, second).logits[:, :7], atol=5e-5)


def test_rows_of_different_length_generate_as_each_alone():
    cfg, params = fresh("mamba-2")
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    for prompt, together in zip(prompts, generate(cfg, params, prompts, 4), strict=True):
        assert together == generate(cfg, params, [prompt], 4)[0]


@pytest.mark.parametrize("name", EVERY)
def test_configs_axes_and_shapes_agree(name):
    cfg = EVERY[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    is_names = lambda leaf: isinstance(leaf, tuple)
    ranks = jax.tree.map(len, logical_axes(cfg), is_leaf=is_names)
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, param_shapes(cfg))


@mostly_slow
def test_a_fresh_model_learns_to_recall_the_token_before_the_last(name):
    """Target t is token t - 1: no model without a working memory can do it."""
    cfg = EVERY[name]
    tokens = random_tokens(cfg, (16, 12)) % 8
    optimizer = optax.adam(1e-2)

    def loss(params, tokens):
        logits = apply(cfg, params, tokens).logits[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, :-1]).mean()

    @jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            batch = jax.random.randint(key, (16, 12), 0, 8)
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 200))
        return params, losses

    params = jit(init, static_argnums=0)(cfg, jax.random.key(1))
    params, losses = train(params, jax.random.key(2))
    assert losses[0] > 1.9 and float(jit(loss)(params, jnp.asarray(tokens))) < 0.2


@mostly_slow
def test_a_model_split_over_eight_devices_gives_the_same_logits(name):
    """Heads and channels over `tensor`, model width over `fsdp`, rows over both data axes."""
    cfg, params = fresh(name)
    tokens, rules = random_tokens(cfg, (4, 12)), ShardingRules()
    wanted = forward(cfg, params, tokens).logits
    names, sizes = ("data", "fsdp", "stage", "context", "expert", "tensor"), (2, 2, 1, 1, 1, 2)
    mesh = jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * 6)
    is_names = lambda leaf: isinstance(leaf, tuple)
    shardings = jax.tree.map(
        lambda axes: named_sharding(mesh, rules, axes), logical_axes(cfg), is_leaf=is_names
    )
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        split = compiled(jit(functools.partial(apply, cfg, rules=rules)), placed, tokens)
        logits = split(placed, tokens).logits
    assert_divided(compiled(jit(functools.partial(apply, cfg)), params, tokens), split, 0.15, 0.25)
    np.testing.assert_allclose(logits, wanted, atol=5e-5)


def test_the_description_counts_states_by_row_and_pages_by_token(tmp_path):
    cfg, params = fresh("hybrid")
    save(tmp_path / "model", cfg, params)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(init_cache(cfg, 3, 10).layers))
    assert 3 * (state_bytes_per_row(cfg) + 10 * cache_bytes_per_token(cfg)) == whole
    text = describe(tmp_path / "model")
    assert f"{2 * 2 * 6 * 4} bytes a token" in text and "a row of any length" in text

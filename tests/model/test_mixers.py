"""Recurrent and linear mixers: equal to the papers' loops, packed as alone, decoded from a state as in one pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.blocks.common import Carry, Context, TokenInfo
from model.blocks.deltanet import GatedDeltaNet, KimiDeltaAttention
from model.blocks.mamba import Mamba
from model.blocks.mamba2 import Mamba2
from model.blocks.norms import RMSNorm
from model.blocks.positions import Rope
from model.blocks.retnet import Retention
from model.blocks.rglru import RGLRU
from model.blocks.rwkv7 import RWKV7, RWKV7ChannelMix

from . import mixer_loops as loops
from .conftest import compiled_fast as jit

WIDTH = 12
MIXERS = {
    "mamba2": (Mamba2(4, 6, 5, num_groups=2), loops.mamba2),
    "mamba2, norm before gate": (
        Mamba2(4, 3, 5, in_bias=True, out_bias=True, norm_eps=1e-3, norm_before_gate=True, dt_max=0.8),
        loops.mamba2,
    ),
    "mamba2, Falcon-H1": (
        Mamba2(2, 6, 5, 2, 3, norm_eps=None, in_multiplier=1.5, multipliers=(0.5, 2, 3, 0.8, 0.7)),
        loops.mamba2,
    ),
    "gated deltanet": (GatedDeltaNet(4, 2, 5, 3), loops.gated_delta_net),
    "gated deltanet, negative": (
        GatedDeltaNet(2, 2, 4, 6, 2, 1e-3, negative_eigenvalues=True),
        loops.gated_delta_net,
    ),
    "kimi": (KimiDeltaAttention(3, 4), loops.kimi_delta_attention),
    "kimi, bounded": (KimiDeltaAttention(2, 4, 3, decay_lower_bound=-5.0), loops.kimi_delta_attention),
    "mamba": (Mamba(10, 4, 3), loops.mamba),
    "mamba, normed": (Mamba(10, 4, 3, 3, conv_bias=False, bias=True, norm=RMSNorm(1e-3)), loops.mamba),
    "mamba, normed without scales": (Mamba(10, 4, 3, norm=RMSNorm(1e-3, scale=False)), loops.mamba),
    "rg-lru": (RGLRU(3, 4), loops.rglru),
    "rwkv-7": (RWKV7(3, 4, 2, 3, 4, 5, first=True), loops.rwkv7),
    "rwkv-7 channels": (RWKV7ChannelMix(10, WIDTH), loops.rwkv7_channel_mix),
    "retention": (Retention(3, 4, 5, Rope(100.0)), loops.retention),
}
every_option = pytest.mark.parametrize("name", MIXERS)
every_mixer = pytest.mark.parametrize("name", [name for name in MIXERS if "," not in name])


@functools.cache
def built(name):
    """The mixer and random parameters; none at its initial value."""
    spec, rng = MIXERS[name][0], np.random.default_rng(len(name))
    x, info = jnp.zeros((1, 1, WIDTH)), TokenInfo(jnp.zeros((1, 1), jnp.int32), None)
    boxed = jax.eval_shape(lambda: module_of(spec).init(jax.random.key(0), x, info, None))["params"]

    def draw(path, leaf):
        key, shape = jax.tree_util.keystr(path), leaf.shape
        fan_in = np.prod(shape[:-1]) if key.endswith("['o']") else shape[0]
        scale = 0.4 if len(shape) < 2 or "bias" in key else fan_in**-0.5
        return (rng.normal(size=shape) * scale + ("norm" in key)).astype(np.float32)

    return spec, jax.tree_util.tree_map_with_path(draw, jax.tree.map(lambda leaf: leaf, unbox(boxed)))


def unbox(tree):
    return jax.tree.map(lambda box: box.value, tree, is_leaf=lambda leaf: hasattr(leaf, "names"))


def module_of(spec):
    dtype = jnp.dtype("float32")
    return spec.module(Context(WIDTH, 2, dtype, dtype), None)


@functools.partial(jit, static_argnums=0)
def run(spec, params, x, positions, segments=None, cache=None, rows=None):
    info = TokenInfo(positions, segments, rows=rows)
    return module_of(spec).apply({"params": params}, x, info, cache)[:2]


def alone(spec, params, x):
    """Each row of [B, T, D] as one document."""
    return run(spec, params, x, np.broadcast_to(np.arange(x.shape[1]), x.shape[:2]))[0]


def random_x(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(*shape, WIDTH)).astype(np.float32)


def random_cache(spec, rows):
    rng = np.random.default_rng(7)
    cache = spec.init_cache(3, 4, rows, jnp.dtype("float32"))
    dirty = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), cache)
    return jax.tree.map(lambda leaf: leaf.at[-1].set(jnp.nan), dirty)


@every_option
def test_a_mixer_equals_the_papers_loop(name):
    spec, params = built(name)
    x = random_x(1, 150)
    wanted = MIXERS[name][1](spec, jax.tree.map(np.float64, params), x[0].astype(np.float64))
    np.testing.assert_allclose(alone(spec, params, x)[0], wanted, atol=2e-5, rtol=2e-5)


@every_mixer
def test_a_packed_row_equals_its_documents_alone(name):
    spec, params = built(name)
    lengths, padding = [1, 2, 70, 66, 3], 8
    segments = np.repeat([1, 2, 3, 4, 5, 0], [*lengths, padding])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in [*lengths, padding]])[None]
    x = random_x(1, 150)
    packed, _ = run(spec, params, x, positions, segments)
    for start, stop in zip(np.cumsum([0, *lengths]), np.cumsum(lengths)):
        document = np.zeros(
            (1, 150, WIDTH), np.float32
        )  # one length, compiled once; no token sees what follows
        document[:, : stop - start] = x[:, start:stop]
        wanted = alone(spec, params, document)[:, : stop - start]
        np.testing.assert_allclose(packed[:, start:stop], wanted, atol=2e-5, rtol=2e-5)


STEPS = (
    "xxx... .x.xxx ......",
    "x . x",
    "x x x",
    "xxxxxx x....x .....x",
    "x x x",
    ". x x",
)  # a row of "x"s each


@every_mixer
def test_chunks_and_single_steps_on_reused_rows_equal_the_full_pass(name):
    """Three batch rows of different length, in rows 4, 0 and 2 of a dirty state, with gaps among the tokens."""
    spec, params = built(name)
    x, total = random_x(3, 20), np.zeros(3, int)
    wanted = np.asarray(alone(spec, params, x))
    cache, rows = random_cache(spec, 5), np.array([4, 0, 2])
    untouched = jax.tree.map(lambda leaf: leaf[jnp.array([1, 3])], cache)
    for real in STEPS:
        real = np.array([[mark == "x" for mark in row] for row in real.split()])
        index = total[:, None] + np.cumsum(real, 1) - 1
        now = np.where(real[..., None], np.take_along_axis(x, np.maximum(index, 0)[..., None], 1), 99.0)
        before, positions = cache, np.where(real, index, 0)
        y, cache = run(spec, params, now, positions, real.astype(np.int32), cache, rows)
        for b in range(3):
            np.testing.assert_allclose(y[b, real[b]], wanted[b, index[b, real[b]]], atol=3e-5, rtol=3e-5)
        idle = rows[~real.any(1)]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[idle], b[idle]), before, cache)  # noqa: B023
        total += real.sum(1)
    jax.tree.map(
        lambda old, leaf: np.testing.assert_array_equal(old, leaf[jnp.array([1, 3])]), untouched, cache
    )


def test_an_idle_batch_row_leaves_alone_the_row_that_it_names():
    spec, params = built("mamba2")
    x, cache, positions = random_x(3, 6), random_cache(spec, 2), np.broadcast_to(np.arange(6), (3, 6))
    real = np.array([[0] * 6, [1] * 6, [0] * 6], np.int32)
    y, after = run(spec, params, x, positions, real, cache, np.array([1, 1, 1]))
    np.testing.assert_allclose(y[1], alone(spec, params, x)[1], atol=3e-5)
    _, wanted = run(spec, params, x[1:2], positions[:1], real[1:2], cache, np.array([1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, wanted)


@every_mixer
def test_a_cache_without_segments_takes_every_token(name):
    spec, params = built(name)
    x, cache = random_x(3, 20), random_cache(spec, 3)
    wanted = alone(spec, params, x)
    for start, stop in ((0, 17), (17, 18), (18, 19)):
        positions = np.broadcast_to(np.arange(start, stop), (3, stop - start))
        y, cache = run(spec, params, x[:, start:stop], positions, None, cache, np.array([1, 2, 0]))
        np.testing.assert_allclose(y, wanted[:, start:stop], atol=3e-5, rtol=3e-5)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, spec.init_cache(3, 4, 3, np.float32))
    axes = spec.cache_axes()
    assert {key: len(axes[key]) for key in cache} == {key: leaf.ndim for key, leaf in cache.items()}
    assert all(names[0] == "rows" for names in axes.values())


@every_mixer
def test_gradients_are_finite_and_reach_every_parameter(name):
    spec, params = built(name)
    segments = np.repeat([1, 2, 0], [3, 14, 3])[None].astype(np.int32)
    x = random_x(1, 20) * 3

    @jit
    def gradient(params, x):
        def loss(params, x):
            y = module_of(spec).apply({"params": params}, x, TokenInfo(jnp.arange(20)[None], segments), None)[
                0
            ]
            return jnp.sum(jnp.sin(y))

        return jax.grad(loss, argnums=(0, 1))(params, x)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params, x)):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), jax.tree_util.keystr(path)


@every_mixer
def test_half_precision_stays_close(name):
    spec, params = built(name)
    x, dtype = random_x(1, 150), jnp.dtype("bfloat16")
    module = spec.module(Context(WIDTH, 2, dtype, jnp.dtype("float32")), None)
    info = TokenInfo(np.arange(150)[None], None)
    half = jit(lambda p, x: module.apply({"params": p}, x, info, None)[0])(params, x.astype(dtype))
    exact = np.asarray(alone(spec, params, x))
    assert half.dtype == dtype
    error = np.sqrt(np.mean((exact - np.asarray(half, np.float32)) ** 2) / np.mean(exact**2))
    assert error < 0.03


def test_later_layers_of_rwkv7_mix_in_the_values_of_the_first():
    first, params_1 = built("rwkv-7")
    later = dataclasses.replace(first, first=False)
    x_1, x_2, positions = random_x(1, 90), random_x(1, 90, seed=1), np.arange(90)[None]
    rng = np.random.default_rng(5)
    low = {
        "v_a": rng.normal(size=(WIDTH, 5)),
        "v_b": rng.normal(size=(5, 3, 4)),
        "v_bias": rng.normal(size=(3, 4)),
    }
    params_2 = params_1 | jax.tree.map(np.float32, low)

    @jit
    def both(params_1, params_2, x_1, x_2):
        _, _, more = module_of(first).apply({"params": params_1}, x_1, TokenInfo(positions, None), None)
        info = TokenInfo(positions, None, carry=more.carry)
        y, cache, more_2 = module_of(later).apply({"params": params_2}, x_2, info, None)
        return y, cache, more, more_2

    y, cache, more, more_2 = both(params_1, params_2, x_1, x_2)
    double = lambda tree: jax.tree.map(np.float64, tree)
    v_first = loops.rwkv7_values(double(params_1), double(x_1[0]))
    wanted = loops.rwkv7(later, double(params_2), double(x_2[0]), v_first)
    np.testing.assert_allclose(y[0], wanted, atol=2e-5, rtol=2e-5)
    assert cache is None and more.carry.first_values is not None and more_2.carry == Carry()


@every_option
def test_flops_are_two_for_each_weight_of_a_map_and_some_for_each_number_of_the_state(name):
    spec, params = built(name)
    maps = {
        key: leaf
        for key, leaf in params.items()
        if np.ndim(leaf) > 1 and "conv" not in key and "bias" not in key
    }
    state = spec.init_cache(0, 0, 1, np.float32).get("ssm" if "mamba" in name else "state", np.zeros(0))
    products = {GatedDeltaNet: 3, KimiDeltaAttention: 3, RWKV7: 4, RGLRU: 0}.get(
        type(spec), 2
    )  # with the state
    wanted = 2 * (sum(leaf.size for leaf in maps.values()) + products * state.size)
    assert spec.flops_per_token(WIDTH, 100) == wanted

"""Rotary frequencies against transformers', ALiBi's slopes and sinusoids against their closed forms."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.traffic import traffic
from model import Alibi, NTKScaling, Rope
from model.blocks.positions import LongRopeScaling
from model.families.common import Reader
from model.families.rope import read_rope
from model.kernels import backend

from .conftest import GOLDENS
from .tpu import compile_for, needs_libtpu

FREQUENCIES = json.loads((GOLDENS / "frequencies.json").read_text())


@pytest.mark.parametrize("name", [name for name in FREQUENCIES if name != "dynamic"])
def test_stretched_frequencies_equal_those_of_transformers(name):
    golden = FREQUENCIES[name]
    config = Reader({"rope_parameters": golden["rope_parameters"], "max_position_embeddings": 2048})
    rope = read_rope(config, 32)
    for long, wanted in enumerate(golden["frequencies"]):
        np.testing.assert_allclose(rope.frequencies(32, long=bool(long)), wanted, rtol=1e-6)
    assert getattr(rope.scaling, "magnitude", 1.0) == pytest.approx(golden["magnitude"], rel=1e-12)


def test_ntk_frequencies_equal_those_of_transformers_at_the_length_that_needs_the_factor():
    golden = FREQUENCIES["dynamic"]
    factor = golden["rope_parameters"]["factor"]
    needed = factor * 4096 / 2048 - (factor - 1)
    rope = Rope(10_000.0, NTKScaling(needed))
    np.testing.assert_allclose(rope.frequencies(32), golden["frequencies"][0], rtol=1e-6)
    plain = Rope(10_000.0).frequencies(32)
    np.testing.assert_allclose(rope.frequencies(32)[[0, -1]], plain[[0, -1]] / [1, needed], rtol=1e-6)


def test_a_document_of_just_the_original_length_is_a_short_one_for_longrope():
    """As in Phi-3: the long divisors are for more tokens than the original length."""
    rope = Rope(100.0, LongRopeScaling((1.0, 2.0), (3.0, 5.0), original_max_length=4))
    x = np.random.default_rng(0).normal(size=(1, 5, 1, 4)).astype(np.float32)
    for length, divisors in ((4, [1.0, 2.0]), (5, [3.0, 5.0])):
        angles_TF = np.arange(length)[:, None] * np.array([1.0, 0.1]) / divisors
        a, b = x[0, :length, 0, :2], x[0, :length, 0, 2:]
        cos, sin = np.cos(angles_TF), np.sin(angles_TF)
        wanted = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        found = rope(jnp.asarray(x[:, :length]), jnp.arange(length)[None])
        np.testing.assert_allclose(found[0, :, 0], wanted, atol=1e-5)


def test_bfloat16_does_not_round_the_angles_of_far_positions():
    """Rounded angles would be wrong by whole turns."""
    positions = np.array([[131_071, 70_001, 3]])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 64)), jnp.bfloat16)
    angles = positions[..., None, None] * 10_000.0 ** (-np.arange(0, 64, 2) / 64)
    a, b = np.split(np.asarray(x, np.float64), 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    wanted = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    found = np.asarray(Rope()(x, jnp.asarray(positions)), np.float64)
    np.testing.assert_allclose(found, wanted, atol=0.02)  # rounding of the result, and of float32 angles


def test_a_part_of_a_head_stands_still():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 8)), jnp.float32)
    positions = jnp.arange(5)[None]
    turned = Rope(fraction=0.5)(x, positions)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_allclose(turned[..., :4], Rope()(x[..., :4], positions), rtol=1e-6)
    half = Rope(rotated_fraction=0.5)(x, positions)
    np.testing.assert_allclose(half[..., [2, 3, 6, 7]], x[..., [2, 3, 6, 7]], rtol=1e-6)
    np.testing.assert_allclose(half[..., [0, 4]], Rope()(x, positions)[..., [0, 4]], rtol=1e-6)


def test_pairs_of_neighbours_are_pairs_of_halves_in_another_order():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 8)), jnp.float32)
    positions, order = jnp.arange(5)[None] + 3, np.array([0, 2, 4, 6, 1, 3, 5, 7])
    neighbours = Rope(interleaved=True)(x, positions)
    np.testing.assert_allclose(neighbours[..., order], Rope()(x[..., order], positions), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rope", [Rope(), Rope(interleaved=True), Rope(fraction=0.5)])
def test_the_form_for_tpus_turns_the_same(rope, dtype):
    x, d = (jnp.asarray(np.random.default_rng(seed).normal(size=(2, 5, 3, 8)), dtype) for seed in (0, 1))
    positions = jnp.asarray([[0, 1, 2, 0, 1], [7, 8, 9, 10, 900]])

    def turn(x, d):
        out, pull = jax.vjp(lambda x: rope(x, positions), x)
        return out, pull(d)[0]

    wanted = turn(x, d)
    with backend.use("tpu", interpret=True):
        found = turn(x, d)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=1e-2, atol=1e-6)
        if dtype == jnp.float32:
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


@needs_libtpu
def test_a_tpu_turns_heads_without_laying_them_out_in_halves():
    T, D, H, C = 8192, 1024, 16, 128

    def moved(form):
        def heads_first(w_DHC, x_BTD, positions):
            x_BTHC = jnp.einsum("BTD,DHC->BTHC", x_BTD, w_DHC)
            with backend.use(form):
                return Rope()(x_BTHC, positions).swapaxes(1, 2)

        def step(w_DHC, x_BTD, positions, d_BHTC):
            y_BHTC, pull = jax.vjp(lambda w, x: heads_first(w, x, positions), w_DHC, x_BTD)
            return y_BHTC, pull(d_BHTC)

        shapes = (D, H, C), (1, T, D), (1, H, T, C)
        w, x, d = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
        program = compile_for("v5p", step, w, x, jax.ShapeDtypeStruct((1, T), jnp.int32), d)
        return traffic(program.as_text()).moved

    assert moved("tpu") < 0.7 * moved("plain")


def test_slopes_of_alibi():
    np.testing.assert_allclose(Alibi().slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(Alibi().slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    np.testing.assert_allclose(Alibi(max_bias=4, scale=0.5).slopes(2), [2**-2 / 2, 2**-4 / 2])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_positions_of_several_axes_turn_as_in_transformers(name):
    golden = np.load(GOLDENS / "mrope.npz")
    rope = Rope(500.0, sections=tuple(golden["sections"].tolist()), sections_interleaved=name == "qwen3_vl")
    x, positions = golden["x"].swapaxes(1, 2), np.moveaxis(golden["positions"], 0, -1)
    np.testing.assert_allclose(rope(x, positions), golden[name].swapaxes(1, 2), atol=5e-6)
    alike = jnp.repeat(positions[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(rope(x, alike), rope(x, positions[..., 0]))  # of text
    np.testing.assert_array_equal(rope(x, alike), Rope(500.0)(x, positions[..., 0]))


def test_positions_that_do_not_fit_the_sections_are_named():
    x = jnp.ones((1, 3, 1, 8))
    with pytest.raises(ValueError, match="positions have 2 axes and the rotary embedding has sections=None"):
        Rope()(x, jnp.zeros((1, 3, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"sections=\(2, 3\) are 5 frequencies, and a head has 4"):
        Rope(sections=(2, 3))(x, jnp.zeros((1, 3, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"sections=\(\): give how many"):
        Rope(sections=())

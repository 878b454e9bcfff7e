"""Flash attention, interpreted, against dense attention in float32; then compiled for every TPU that we name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.kernels import backend
from model.kernels.attention import Scores, self_attention
from model.kernels.attention.blocks import in_query_blocks
from model.kernels.attention.reference import Mask
from model.kernels.attention.tpu import TILE_SIZES, flash_attention
from model.kernels.attention.tpu_blocks import NO_KEY, FlashCall, TileSizes, block_bounds
from model.sharding import MESH_AXES, ShardingRules, named_sharding
from tests.meshes import assert_divided, compiled

from ..conftest import compiled_fast as jit
from ..tpu import CHIPS, chips_of, compile_for, needs_libtpu, sweep

SMALL = TileSizes(128, 128)  # the smallest that a TPU has


def dense(q_BTHC, k_BSKC, v_BSKE, query_ids, key_ids, offset, causal=True, window=None, softcap=None):
    """The whole square of scores at once."""
    group, (T, S) = q_BTHC.shape[2] // k_BSKC.shape[2], (q_BTHC.shape[1], k_BSKC.shape[1])
    k_BSHC, v_BSHE = jnp.repeat(k_BSKC, group, 2), jnp.repeat(v_BSKE, group, 2)
    scores_BHTS = jnp.einsum("BTHC,BSHC->BHTS", q_BTHC, k_BSHC) * q_BTHC.shape[3] ** -0.5
    if softcap is not None:
        scores_BHTS = softcap * jnp.tanh(scores_BHTS / softcap)
    ahead_TS = jnp.arange(T)[:, None] + offset - jnp.arange(S)
    seen = jnp.ones((1, 1, T, S), bool)
    if causal:
        seen &= ahead_TS >= 0
    if window is not None:
        seen &= jnp.abs(ahead_TS) < window
    if query_ids is not None:
        seen &= query_ids[:, None, :, None] == key_ids[:, None, None]
    some_BHT1 = jnp.broadcast_to(seen.any(-1, keepdims=True), (*scores_BHTS.shape[:3], 1))
    scores_BHTS = jnp.where(seen, scores_BHTS, jnp.where(some_BHT1, -jnp.inf, 0))
    lse_BHT1 = jax.nn.logsumexp(scores_BHTS, -1, keepdims=True)
    weights_BHTS = jnp.where(some_BHT1, jnp.exp(scores_BHTS - lse_BHT1), 0)
    out_BTHE = jnp.einsum("BHTS,BSHE->BTHE", weights_BHTS, v_BSHE)
    return out_BTHE, jnp.where(some_BHT1, lse_BHT1, NO_KEY)[..., 0]


def draws(B, T, S, H, K, C, E, dtype=jnp.float32, seed=0):
    """(q, k, v) and a direction for (out, lse)."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    inputs = normal(B, T, H, C) * 2, normal(B, S, K, C), normal(B, S, K, E)
    return inputs, (normal(B, T, H, E), normal(B, H, T).astype(jnp.float32))


@functools.cache
def both(dtype, **options):
    """Flash and dense attention, each giving ((out, lse), gradients of q, k and v along a direction)."""

    def pulled(function):
        def run(inputs, direction, *rest):
            results, pull = jax.vjp(lambda *inputs: function(*inputs, *rest), *inputs)
            return results, pull(direction)

        return run

    flash = jit(pulled(functools.partial(flash_attention, **options, tiles=SMALL, interpret=True)))
    exact = jit(pulled(functools.partial(dense, **options)))
    as_floats = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    return flash, lambda inputs, direction, *rest: exact(as_floats(inputs), as_floats(direction), *rest)


def run_both(shape, query_ids=None, key_ids=None, offset=0, dtype=jnp.float32, **options):
    arguments = (*draws(*shape, dtype), query_ids, key_ids, jnp.asarray(offset))
    return tuple(run(*arguments) for run in both(dtype, **options))


def assert_close(ours, wanted, atol):
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert np.isfinite(want).all()
        scale = max(1, np.abs(np.where(want == NO_KEY, 0, want)).max())
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=atol * scale)


def documents(*lengths):
    """One row of ids."""
    return np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)[None]


ROW = documents(1, 1, 130, 1, 100, 2, 65)
SHUFFLED = np.random.default_rng(0).permutation(ROW[0])[None]
CASES = {  # ids of 200 queries, ids of 300 keys, offset
    "short documents beside long ones": (ROW[:, 100:], ROW, 100),
    "documents out of order": (SHUFFLED[:, 100:], SHUFFLED, 100),
    "queries before all keys": (documents(200), documents(300), -60),
    "queries after all keys": (documents(200), documents(300), 330),
    "documents without keys": (documents(50, 150), 1 + documents(300), 100),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mask", [{"window": 90, "softcap": 2.0}, {"window": 40, "causal": False}], ids=str)
def test_values_and_gradients_are_those_of_dense_attention(case, mask):
    ours, wanted = run_both((1, 200, 300, 2, 1, 8, 8), *CASES[case], **mask)
    assert_close(ours, wanted, 2e-6)


def test_grouped_heads_and_latent_widths_with_a_window_wider_than_the_text():
    assert_close(*run_both((2, 140, 140, 4, 2, 24, 16), window=1000), 2e-6)


def test_one_token_finds_its_own_value():
    inputs, _ = draws(1, 1, 1, 1, 1, 8, 8)
    out, lse = jit(functools.partial(flash_attention, tiles=SMALL, interpret=True))(*inputs)
    np.testing.assert_array_equal(out, inputs[2])
    np.testing.assert_allclose(lse[0, 0, 0], jnp.sum(inputs[0] * inputs[1]) * 8**-0.5, rtol=1e-6)


def test_bfloat16_is_as_near_as_its_rounding():
    ours, wanted = run_both((1, 200, 200, 2, 1, 16, 8), dtype=jnp.bfloat16)
    assert ours[0][0].dtype == ours[1][0].dtype == jnp.bfloat16 and ours[0][1].dtype == jnp.float32
    assert_close(ours, wanted, 1.5e-2)


def test_queries_that_see_no_key_find_zeros_and_give_no_gradient():
    options = {"window": 90, "softcap": 2.0}
    case = CASES["queries before all keys"]
    ((out, lse), (dq, dk, dv)), _ = run_both((1, 200, 300, 2, 1, 8, 8), *case, **options)
    assert not out[:, :60].any() and not dq[:, :60].any() and (lse[:, :, :60] == NO_KEY).all()
    assert not dk[:, 140:].any() and not dv[:, 140:].any() and dk[:, :140].any()


def test_parts_of_the_keys_are_one_by_their_log_sum_exps():
    """As ring attention meets them: a query's keys in two parts, each at its own offset."""
    (q, k, v), _ = draws(1, 200, 200, 2, 1, 8, 8)
    part = jit(functools.partial(flash_attention, tiles=SMALL, interpret=True))
    halves = [part(q, k[:, at : at + 100], v[:, at : at + 100], None, None, -at) for at in (0, 100)]
    lse = jnp.logaddexp(*(lse for _, lse in halves))
    out = sum(out * jnp.exp(part_lse - lse).swapaxes(1, 2)[..., None] for out, part_lse in halves)
    assert_close((out, lse), dense(q, k, v, None, None, 0), 2e-6)


SIGHTS = {
    "chunks": Mask(chunk=48),
    "both ways": Mask(causal=False),
}


@pytest.mark.parametrize("name", SIGHTS)
def test_the_kernel_is_picked_and_equals_the_plain_form(name):
    """With sinks and their gradient, in packed rows, whose positions begin again."""
    (q, k, v), (direction, _) = draws(2, 200, 200, 4, 2, 8, 8)
    ids = np.concatenate([documents(1, 99, 100), documents(150, 1, 49)])
    positions = np.concatenate([np.r_[0, 0:99, 0:100], np.r_[0:150, 0, 0:49]]).reshape(2, 200)
    sinks = jnp.linspace(-2, 3, 4)

    @jit
    def gradients(q, k, v, sinks):
        attend = lambda q, k, v, sinks: self_attention(
            q, k, v, positions, ids, SIGHTS[name], Scores(0.4, 3.0, sinks)
        )
        out, pull = jax.vjp(attend, q, k, v, sinks)
        return out, pull(direction)

    wanted = gradients(q, k, v, sinks)
    assert "flash_forward" not in str(gradients.trace(q, k, v, sinks).jaxpr)
    with backend.use("tpu", interpret=True):
        assert_close(gradients(q, k, v, sinks), wanted, 5e-6)
        assert "flash_forward" in str(gradients.trace(q, k, v, sinks).jaxpr)


def test_scores_with_a_bias_are_left_to_the_plain_form():
    (q, k, v), _ = draws(1, 20, 20, 2, 1, 8, 8)
    positions, slopes = jnp.arange(20)[None], jnp.array([0.5, 0.1])[:, None, None]
    rest = positions, None, Mask(), Scores(bias=lambda distance: slopes * distance[..., None, :, :])
    with backend.use("tpu"):  # not interpreted: the kernel would fail on a CPU
        np.testing.assert_array_equal(self_attention(q, k, v, *rest), in_query_blocks(q, k, v, *rest))


@pytest.mark.parametrize(
    "rules",
    [ShardingRules(), ShardingRules(act_kv_heads=(), kv_heads=())],
    ids=["keys split", "keys whole"],
)
def test_a_mesh_that_splits_rows_tokens_and_heads_changes_no_value_or_gradient(rules):
    (q, k, v), (direction, _) = draws(2, 160, 160, 4, 2, 8, 8)
    ids, positions = np.concatenate([documents(70, 90)] * 2), np.broadcast_to(np.arange(160), (2, 160))

    def pulled(q, k, v):
        attend = lambda q, k, v: self_attention(q, k, v, positions, ids, rules=rules)
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(direction)

    wanted = jit(pulled)(q, k, v)
    with (
        jax.set_mesh(mesh_of(jax.devices(), data=2, context=2, tensor=2)),
        backend.use("tpu", interpret=True),
    ):
        assert_close(jit(pulled)(q, k, v), wanted, 2e-6)


def mesh_of(devices, **sizes):
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=kinds)


def test_splash_attention_says_the_same():
    """jax's own kernel; it has no head widths below 128 and no log-sum-exp with gradients."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (q, k, v), (direction, _) = draws(1, 256, 256, 2, 2, 128, 128)
    ids, mask = documents(60, 196), masks.MultiHeadMask([masks.LocalMask((256, 256), (99, 0), 0)] * 2)
    sizes = splash.BlockSizes(**dict.fromkeys(SPLASH_SIZES, 128))
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=True)
    first = lambda x: x[0].swapaxes(0, 1)

    def theirs(q, k, v):
        out = kernel(first(q) * 128**-0.5, first(k), first(v), splash.SegmentIds(ids[0], ids[0]))
        return out.swapaxes(0, 1)[None]

    def ours(q, k, v):
        return flash_attention(q, k, v, ids, ids, window=100, tiles=SMALL, interpret=True)[0]

    def pulled(function):
        out, pull = jax.vjp(function, q, k, v)
        return out, pull(direction)

    assert_close(jit(lambda: pulled(ours))(), jit(lambda: pulled(theirs))(), 3e-6)


SPLASH_SIZES = (
    *("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    *("block_q_dq", "block_kv_dq"),
)


@functools.cache
def bounds_and_need(call):
    """The blocks to read, and by the dense mask the blocks that are needed [B, I, J]."""

    def run(query_ids, key_ids, offset):
        ahead = jnp.arange(call.num_queries)[:, None] + offset - jnp.arange(call.num_keys)
        seen = (query_ids[:, :, None] == key_ids[:, None]) & (jnp.abs(ahead) < (call.span or 10**6))
        seen &= (ahead >= 0) | (not call.causal)
        tiles = seen.reshape(1, call.query_blocks, call.tiles.queries, call.key_blocks, call.tiles.keys)
        ids = query_ids[:, None], key_ids[:, None]
        return block_bounds(call, ids, offset, 1), tiles.any((2, 4))

    return jit(run)


@settings(max_examples=40, deadline=None)
@given(
    mask=st.sampled_from([(True, None), (True, 1), (True, 257), (False, 130), (False, None)]),
    offset=st.integers(-1300, 1300),
    cuts=st.lists(st.integers(1, 1023), max_size=6),
    shuffle=st.booleans(),
)
def test_every_block_with_a_key_that_is_seen_is_read_and_the_steps_suffice(mask, offset, cuts, shuffle):
    causal, span = mask
    call = FlashCall(1024, 1024, 1, TileSizes(128, 256), causal, span, span, 1.0, None, True)
    ids = np.searchsorted(np.sort(cuts), np.arange(1024), side="right").astype(np.int32)[None]
    ids = np.random.default_rng(0).permutation(ids, axis=1) if shuffle else ids
    bounds, needed_BIJ = bounds_and_need(call)(ids, ids, jnp.asarray(offset))
    ranges = (
        (bounds.first_key_block, bounds.last_key_block, call.key_steps(), needed_BIJ[0]),
        (bounds.first_query_block, bounds.last_query_block, call.query_steps(), needed_BIJ[0].T),
    )
    for firsts, lasts, steps, needed in ranges:
        assert (lasts - firsts < steps).all()
        for first, last, need in zip(firsts, lasts, np.asarray(needed), strict=True):
            assert not need[: int(first)].any() and not need[int(last) + 1 :].any()
    if span == 1:
        assert call.key_steps() == 2 and call.query_steps() == 3


def test_documents_of_their_own_blocks_are_all_that_is_read():
    call = FlashCall(1024, 1024, 1, TileSizes(128, 128), True, None, None, 1.0, None, True)
    ids = documents(256, 512, 256)
    bounds, _ = bounds_and_need(call)(ids, ids, jnp.asarray(0))
    assert bounds.first_key_block.tolist() == [0, 0, 2, 2, 2, 2, 6, 6]
    assert bounds.last_key_block.tolist() == list(range(8))
    assert bounds.last_query_block.tolist() == [1, 1, 5, 5, 5, 5, 7, 7]


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), "multiple"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8)), "don't fit"),
        (((1, 4, 2, 8), (1, 4, 2, 16), (1, 4, 2, 8)), "don't fit"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(*(jnp.zeros(shape) for shape in shapes))


def test_unknown_back_ends_chips_and_blocks_are_named():
    with pytest.raises(ValueError, match="no back end 'npu'"), backend.use("npu"):
        pass
    with pytest.raises(ValueError, match="v5e"), backend.use("tpu", "v9"):
        pass
    with pytest.raises(ValueError, match="128 lanes"):
        TileSizes(100, 128)
    with pytest.raises(ValueError, match="both or neither"):
        flash_attention(*[jnp.zeros((1, 4, 1, 8))] * 3, jnp.zeros((1, 4), jnp.int32))


WIDTHS = {"64": (64, 64), "128": (128, 128), "latent": (192, 128)}


def compiled_step(chip, widths, dtype=jnp.bfloat16, T=8192, **options):
    """Values and gradients of 8 heads in packed rows, for the chip."""
    heads_widths = ((8, widths[0]), (2, widths[0]), (2, widths[1]))
    q, k, v = (jax.ShapeDtypeStruct((1, T, heads, width), dtype) for heads, width in heads_widths)
    numbers = jax.ShapeDtypeStruct((1, T), jnp.int32)
    mask, scores = options.pop("mask", Mask()), Scores(**options)

    def step(q, k, v, positions, ids):
        out, pull = jax.vjp(lambda *qkv: self_attention(*qkv, positions, ids, mask, scores), q, k, v)
        return pull(out)

    with backend.use("tpu", chip):
        return compile_for(chip, step, q, k, v, numbers, numbers)


SMALLEST = "v4"  # of the fast memories


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_has_a_program(chip):
    program = compiled_step(chip, (128, 128), mask=Mask(window=4096), softcap=50.0)
    for kernel in ("flash_forward", "flash_query_gradients", "flash_key_value_gradients"):
        assert kernel in program.as_text()
    whole_square = 8 * 8192**2 * 4
    assert program.memory_analysis().temp_size_in_bytes < whole_square / 8


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip, widths", sweep(WIDTHS, SMALLEST))
def test_chips_have_a_program_for_each_kind(chip, widths):
    compiled_step(chip, WIDTHS[widths])
    compiled_step(chip, WIDTHS[widths], mask=Mask(chunk=2048))
    compiled_step(chip, WIDTHS[widths], mask=Mask(causal=False), dtype=jnp.float32, T=1000)


@needs_libtpu
@pytest.mark.slow
def test_four_chips_that_split_tokens_and_heads_have_a_program():
    rules = ShardingRules()

    def step(q, k, v, positions, ids):
        out, pull = jax.vjp(lambda *qkv: self_attention(*qkv, positions, ids, rules=rules), q, k, v)
        return pull(out)

    def program_on(mesh):
        def shaped(dtype, *sizes, heads=None):
            names = ("batch", "length", heads, None)[: len(sizes)]
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=named_sharding(mesh, rules, names))

        q = shaped(jnp.bfloat16, 2, 2048, 8, 128, heads="act_heads")
        k = shaped(jnp.bfloat16, 2, 2048, 2, 128, heads="act_kv_heads")
        numbers = shaped(jnp.int32, 2, 2048)
        with jax.set_mesh(mesh), backend.use("tpu", "v5p"):
            return compiled(jax.jit(step), q, k, k, numbers, numbers)

    split = program_on(chips_of("v5p", context=2, tensor=2))
    # the chip with the later tokens sees three quarters of the pairs of its heads
    assert_divided(program_on(chips_of("v5p")), split, 0.38, 0.5)
    program = split.as_text()
    assert all(
        name in program for name in ("flash_query_gradients", "flash_key_value_gradients", "all-gather")
    )


@pytest.mark.slow
def test_long_rows_equal_the_plain_form():
    """8192 tokens with the blocks of the chips; a kernel can be right at small sizes and wrong at large ones."""
    (q, k, v), _ = draws(1, 8192, 8192, 2, 1, 64, 64)
    ids = documents(1, 3000, 5, 186, 5000)
    wanted = jit(in_query_blocks)(q, k, v, jnp.arange(8192)[None], ids)
    for tiles in sorted(set(TILE_SIZES.values()), key=str):
        flash = functools.partial(flash_attention, tiles=tiles, interpret=True)
        assert_close(jit(flash)(q, k, v, ids, ids)[0], wanted, 1e-5)

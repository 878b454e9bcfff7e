"""Flash attention for GPUs, interpreted, against dense attention in float32; then lowered for CUDA, where Triton would
compile it. No card runs here: benchmarks/gpu.py measures on one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from benchmarks.gpu_attention import as_on
from model.kernels import backend
from model.kernels.attention import Mask, Scores, reference, self_attention
from model.kernels.attention.gpu_blocks import FlashCall, Tile, Tiles, slices, tile_ranges
from model.kernels.attention.gpu_triton import TILES, flash_attention
from model.kernels.attention.tpu_blocks import NO_KEY
from model.kernels.backend import Kernels
from model.sharding import ShardingRules

from ..conftest import compiled_fast as jit
from .test_flash_attention import CASES, assert_close, dense, documents, draws, mesh_of

SMALL = Tiles(Tile(32, 16, 4), Tile(16, 32, 4), Tile(64, 16, 4))  # many blocks in a short row


def pulled(function):
    """((out, lse), gradients of q, k and v along a direction)."""

    def run(inputs, direction, *rest):
        results, pull = jax.vjp(lambda *inputs: function(*inputs, *rest), *inputs)
        return results, pull(direction)

    return run


def run_both(shape, query_ids=None, key_ids=None, offset=0, dtype=jnp.float32, tiles=SMALL, **options):
    inputs, direction = draws(*shape, dtype)
    flash = functools.partial(flash_attention, **options, tiles=tiles, interpret=True)
    ours = jit(pulled(flash))(inputs, direction, query_ids, key_ids, jnp.asarray(offset))
    inputs, direction = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, direction))
    exact = functools.partial(dense, **options)
    return ours, jit(pulled(exact))(inputs, direction, query_ids, key_ids, jnp.asarray(offset))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mask", [{"window": 90, "softcap": 2.0}, {"window": 40, "causal": False}], ids=str)
def test_values_and_gradients_are_those_of_dense_attention(case, mask):
    ours, wanted = run_both((1, 200, 300, 2, 1, 16, 16), *CASES[case], **mask)
    assert_close(ours, wanted, 2e-6)


def test_every_score_of_a_whole_row_counts_to_both_sides():
    assert_close(*run_both((2, 128, 128, 2, 2, 16, 16), causal=False), 2e-6)


def test_queries_that_see_no_key_find_zeros_and_give_no_gradient():
    ((out, lse), (dq, dk, dv)), _ = run_both(
        (1, 200, 300, 2, 1, 16, 16), *CASES["queries before all keys"], window=90
    )
    assert not out[:, :60].any() and not dq[:, :60].any() and (lse[:, :, :60] == NO_KEY).all()
    assert not dk[:, 140:].any() and not dv[:, 140:].any() and dk[:, :140].any()


def test_one_token_finds_its_own_value():
    inputs, _ = draws(1, 1, 1, 1, 1, 16, 16)
    out, lse = jit(functools.partial(flash_attention, interpret=True))(*inputs)
    np.testing.assert_array_equal(out, inputs[2])
    np.testing.assert_allclose(lse[0, 0, 0], jnp.sum(inputs[0] * inputs[1]) / 4, rtol=1e-6)


WIDTHS = {  # of keys and values
    "16": (16, 16),
    "64": (64, 64),
    "80, of two powers of two": (80, 80),
    "128": (128, 128),
    "256": (256, 256),
    "latent": (192, 128),
    "padded": (24, 40),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_every_width_equals_the_reference_with_its_own_tiles(widths, dtype):
    """A ragged packed row of grouped heads, whose documents lie across tiles."""
    (q, k, v), (direction, _) = draws(1, 203, 203, 4, 2, *WIDTHS[widths], dtype)
    ids, positions = documents(1, 70, 132), np.r_[0, 0:70, 0:132][None]
    mask = Mask(window=60)

    def ours(q, k, v):
        with backend.use("gpu", interpret=True), backend.prefer(Kernels(attention="triton")):
            return self_attention(q, k, v, positions, ids, mask)

    def wanted(q, k, v):
        allowed_BTS = mask.within(slice(0, 203), slice(0, 203), positions, ids)
        return reference.attention(q, k, v, allowed_BTS)

    found = jit(pulled(ours))((q, k, v), direction)
    assert all(x.dtype == dtype for x in jax.tree.leaves(found))
    floats = jax.tree.map(lambda x: x.astype(jnp.float32), ((q, k, v), direction))
    assert_close(found, jit(pulled(wanted))(*floats), 3e-6 if dtype == jnp.float32 else 1.5e-2)


def test_sinks_and_their_gradient_are_those_of_the_reference():
    (q, k, v), (direction, _) = draws(1, 100, 100, 4, 2, 16, 16)
    positions, scores = np.arange(100)[None], functools.partial(Scores, 0.4, 3.0)
    allowed_BTS = Mask().within(slice(0, 100), slice(0, 100), positions, None)

    def ours(q, k, v, sinks):
        with backend.use("gpu", interpret=True):
            return self_attention(q, k, v, positions, None, scores=scores(sinks))

    def wanted(q, k, v, sinks):
        return reference.attention(q, k, v, allowed_BTS, scores(sinks))

    inputs = q, k, v, jnp.linspace(-2, 3, 4)
    assert "flash_forward_gpu" in str(jax.make_jaxpr(ours)(*inputs))
    assert_close(jit(pulled(ours))(inputs, direction), jit(pulled(wanted))(inputs, direction), 5e-6)


@pytest.mark.parametrize(
    "rules",
    [ShardingRules(), ShardingRules(act_kv_heads=(), kv_heads=())],
    ids=["keys split", "keys whole"],
)
def test_a_mesh_that_splits_rows_tokens_and_heads_changes_no_value_or_gradient(rules):
    (q, k, v), (direction, _) = draws(2, 160, 160, 4, 2, 16, 16)
    ids, positions = np.concatenate([documents(70, 90)] * 2), np.broadcast_to(np.arange(160), (2, 160))

    @pulled
    def run(q, k, v):
        return self_attention(q, k, v, positions, ids, rules=rules)

    wanted = jit(run)((q, k, v), direction)
    with (
        jax.set_mesh(mesh_of(jax.devices(), data=2, context=2, tensor=2)),
        backend.use("gpu", interpret=True),
    ):
        assert "flash_forward_gpu" in str(jax.make_jaxpr(run)((q, k, v), direction))
        assert_close(jit(run)((q, k, v), direction), wanted, 2e-6)


@functools.cache
def ranges_and_tiles(call, tile, length):
    """`tile_ranges`, and by the dense mask which tiles have a score that counts and which have no other [I, J]."""

    def run(query_ids, key_ids, offset):
        ahead_TS = jnp.arange(length)[:, None] + offset - jnp.arange(length)
        counts = (query_ids[:, :, None] == key_ids[:, None]) & (jnp.arange(length) < call.num_keys)
        counts &= (ahead_TS >= 0) | (not call.causal)
        counts &= jnp.abs(ahead_TS) < (call.window or 10**6)
        tiles = counts[0].reshape(-1, tile.queries, length // tile.keys, tile.keys)
        found = tile_ranges(call, tile, (query_ids, key_ids), (1, length, length), offset)
        return found, tiles.any((1, 3)), tiles.all((1, 3))

    return jit(run)


@settings(max_examples=40, deadline=None)
@given(
    mask=st.sampled_from([(True, None), (True, 1), (True, 57), (False, 30), (False, None)]),
    offset=st.integers(-300, 300),
    cuts=st.lists(st.integers(1, 255), max_size=6),
    shuffle=st.booleans(),
)
def test_tiles_that_count_are_read_and_those_without_a_mask_need_none(mask, offset, cuts, shuffle):
    causal, window = mask
    tile = Tile(32, 16, 4)
    call = FlashCall(250, 1, Tiles(tile, tile, tile), causal, window, window, 1.0, None, True)
    ids = np.searchsorted(np.sort(cuts), np.arange(256), side="right").astype(np.int32)[None]
    ids = np.random.default_rng(0).permutation(ids, axis=1) if shuffle else ids
    (of_keys, of_queries), some, whole = ranges_and_tiles(call, tile, 256)(ids, ids, jnp.asarray(offset))
    for ranges, *tiles in ((of_keys[0], some, whole), (of_queries[0], some.T, whole.T)):
        for (first, run, run_end, end), counts, needs_no_mask in zip(ranges.tolist(), *tiles, strict=True):
            assert first <= run <= run_end <= end
            assert not counts[:first].any() and not counts[end:].any()
            assert needs_no_mask[run:run_end].all() and needs_no_mask.any() == (run_end > run)


def test_documents_of_their_own_tiles_are_all_that_is_read_and_none_but_the_diagonal_has_a_mask():
    tile = Tile(64, 64, 4)
    call = FlashCall(512, 1, Tiles(tile, tile, tile), True, None, None, 1.0, None, True)
    ids = jnp.asarray(documents(128, 256, 128))
    (of_keys, of_queries), *_ = ranges_and_tiles(call, tile, 512)(ids, ids, jnp.asarray(0))
    starts = [0, 0, 2, 2, 2, 2, 6, 6]
    assert of_keys[0, :, 0].tolist() == starts and of_keys[0, :, 3].tolist() == list(range(1, 9))
    assert (of_keys[0, :, 2] - of_keys[0, :, 1]).tolist() == [i - start for i, start in enumerate(starts)]
    assert of_queries[0, :, 3].tolist() == [2, 2, 6, 6, 6, 6, 8, 8]


@pytest.mark.parametrize("itemsize, width", TILES)
def test_what_tiles_hold_fits_the_shared_memory_of_the_smallest_gpus(itemsize, width):
    """What stays and `stages` of what is streamed, in the 99 KiB that sm_86, sm_89 and sm_120 give a program."""
    forward, dq, dkv = TILES[itemsize, width]
    both = 2 * width
    held = (
        forward.queries * width + forward.stages * forward.keys * both,
        dq.queries * both + dq.stages * dq.keys * both,
        dkv.keys * both + dkv.stages * dkv.queries * both,
    )
    assert max(held) * itemsize <= 99 * 1024
    for tile in TILES[itemsize, width]:
        assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.queries, tile.keys))


@given(st.integers(1, 16).map(lambda n: 16 * n))
def test_slices_of_a_width_are_powers_of_two_that_make_it_up(width):
    sizes = [part.stop - part.start for part in slices(width)]
    assert sum(sizes) == width and all(n >= 16 and n & (n - 1) == 0 for n in sizes)
    assert [part.start for part in slices(width)] == [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((1, 4, 2, 576), jnp.bfloat16, "widths 576 and 576, and its tiles hold 256"),
        ((1, 4, 2, 64), jnp.float64, "bfloat16, float16 or float32"),
    ],
)
def test_what_it_can_not_serve_is_named(shape, dtype, message):
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        flash_attention(*[jnp.zeros(shape, dtype)] * 3)
    with jax.enable_x64(True), backend.use("gpu"), backend.prefer(Kernels(attention="triton")):
        with pytest.raises(
            ValueError, match=f"attention='triton' can't serve this: .*{message}.* can: plain"
        ):
            self_attention(*[jnp.zeros(shape, dtype)] * 3, jnp.arange(4)[None], None)


def gradients_program(widths, T, dtype=jnp.bfloat16, rows=1, mask=Mask(), **options):
    """Traced for a GPU: values and gradients of 4 heads in packed rows, 2 of keys and values."""
    heads_widths = ((4, widths[0]), (2, widths[0]), (2, widths[1]))
    q, k, v = (jax.ShapeDtypeStruct((rows, T, heads, width), dtype) for heads, width in heads_widths)
    numbers = jax.ShapeDtypeStruct((rows, T), jnp.int32)

    def step(q, k, v, positions, ids):
        out, pull = jax.vjp(
            lambda *qkv: self_attention(*qkv, positions, ids, mask, Scores(**options)), q, k, v
        )
        return pull(out)

    with backend.use("gpu"), as_on():
        return jax.jit(step).trace(q, k, v, numbers, numbers)


LOWERED = {
    "causal": {},
    "window and soft-cap": {"mask": Mask(window=100), "softcap": 50.0},
    "two sides": {"mask": Mask(causal=False, window=30), "dtype": jnp.float32},
    "chunks and a scale": {"mask": Mask(chunk=32), "scale": 0.3, "dtype": jnp.float16},
}


@pytest.mark.parametrize("kind", LOWERED)
@pytest.mark.parametrize("widths", WIDTHS)
def test_cuda_has_three_triton_kernels_for_values_and_gradients(widths, kind):
    program = gradients_program(WIDTHS[widths], 500, **LOWERED[kind])
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    calls = [name for name in re.findall(r"custom_call @([^(]+)", text) if "triton" in name]
    assert len(calls) == 3
    for name in ("flash_forward_gpu", "flash_query_gradients_gpu", "flash_key_value_gradients_gpu"):
        assert name in text


def largest_array(program):
    """Elements of the largest array of a traced program, and of its text for CUDA."""

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            for var in (*eqn.invars, *eqn.outvars):
                yield math.prod(getattr(var.aval, "shape", ()))
            for value in jax.tree.leaves(
                eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    text = program.lower(lowering_platforms=("cuda",)).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)", text)
    return max(*sizes(program.jaxpr.jaxpr), *(math.prod(map(int, x.split("x")[:-1])) for x in shapes))


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False, window=300), Mask(chunk=512)], ids=str)
def test_no_array_grows_with_the_square_of_a_row(mask):
    """Queries [1, T, 4, 16] are the largest; pairs of tiles, T / 64 by T / 64, are far fewer."""
    T = 4096
    assert largest_array(gradients_program((16, 16), T, mask=mask)) <= T * 4 * 16

    def dense(q, ids):
        return reference.attention(q, q, q, mask.within(slice(0, T), slice(0, T), ids, ids))

    shapes = jax.ShapeDtypeStruct((1, T, 4, 16), jnp.bfloat16), jax.ShapeDtypeStruct((1, T), jnp.int32)
    assert largest_array(jax.jit(dense).trace(*shapes)) == T * T * 4


# jax promises no stable form of a call of Triton's
UNSTABLE = [
    export.DisabledSafetyCheck.custom_call(name) for name in ("__gpu$xla.gpu.triton", "triton_kernel_call")
]


def test_a_program_for_cuda_can_be_exported():
    q = jax.ShapeDtypeStruct((1, 256, 2, 256), jnp.bfloat16)
    attend = jax.jit(lambda q: self_attention(q, q, q, jnp.arange(256)[None], None))
    with backend.use("gpu"), as_on():
        exported = jax.export.export(attend, platforms=["cuda"], disabled_checks=TRITON_CHECK)(q)
    assert exported.platforms == ("cuda",) and "triton" in exported.mlir_module()


TRITON_CHECK = [
    jax.export.DisabledSafetyCheck.custom_call(name)
    for name in ("__gpu$xla.gpu.triton", "triton_kernel_call")
]

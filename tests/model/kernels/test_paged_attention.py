"""Paged attention, interpreted, against gathered rows; in the engine; then compiled for every TPU that we name."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from model.kernels import backend
from model.kernels.attention import Mask, Scores
from model.kernels.paged_attention import KVLayout, attend_in_rows, paged_attention, pages
from model.kernels.paged_attention.sharded import attend_on_mesh
from model.sharding import MESH_AXES, ShardingRules
from tests.meshes import assert_divided
from tests.meshes import compiled as program_of

from ..conftest import compiled_fast as jit
from ..tpu import CHIPS, assert_not_moved, chips_of, compile_for, needs_libtpu, one_chip, sweep

SLOW = pytest.mark.slow
HEADS, LATENT = KVLayout(2), KVLayout(1, ("latent", "k_rope"), "latent")
# (new tokens, tokens in all) of each row: prompts, a row without new tokens, one token beside a long row, a last page
# that is full, one that is just begun, and a row that has nothing at all
ROWS = ((1, 1), (0, 7), (40, 60), (5, 5), (1, 190), (16, 32), (1, 33), (0, 0), (130, 131))
PAGE, PAGES = 16, 12


def empty(kv_layout, widths, num_pages, page_size, dtype):
    """Pages of these names; of quantised latents the rotated keys are in bfloat16."""
    cache = {}
    for name in kv_layout.names:
        of_rope = name == "k_rope" and pages.is_quantized(dtype)
        of_name = jnp.dtype("bfloat16" if of_rope else dtype)
        cache |= pages.empty_pages(name, num_pages, page_size, kv_layout.heads, widths[name], of_name)
    return cache


def drawn(kv_layout, heads, widths, dtype, cache_dtype, rows=ROWS, seed=0, spare=3):
    """What `paged_attention` is given, pages handed out in no order, with `spare` tokens of no row at the end."""
    rng = np.random.default_rng(seed)
    counts, lengths = np.array(rows, np.int32).T
    R, T = len(rows), counts.sum() + spare

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    table = rng.permutation(R * PAGES).reshape(R, PAGES).astype(np.int32) + 1
    old = {name: normal(1, R * PAGE * PAGES, kv_layout.heads, widths[name]) for name in kv_layout.names}
    cache = empty(kv_layout, widths, R * PAGES + 1, PAGE, cache_dtype)
    page, slot = np.repeat(table.reshape(-1), PAGE)[None], np.tile(np.arange(PAGE), R * PAGES)[None]
    cache = pages.write(cache, old, page, slot)
    q = 2 * normal(T, heads, sum(widths[name] for name in kv_layout.keys))
    new = {name: normal(T, kv_layout.heads, widths[name]) for name in kv_layout.names}
    return q, new, cache, table, np.r_[0, np.cumsum(counts)].astype(np.int32), lengths


def poisoned(cache, table, cu_q_lens, lengths, window=None):
    """The cache with what is no number wherever no token may look: nobody's page, pages and slots past what a row has
    from before, and pages before the window of a row's first new token."""
    starts = lengths - np.diff(cu_q_lens)
    position = np.arange(PAGE * PAGES)
    seen = position < starts[:, None]
    if window is not None:
        first_page = np.maximum(0, starts - window + 1) // PAGE * PAGE
        seen &= position >= first_page[:, None]
    good = np.zeros((len(table) * PAGES + 1, PAGE), bool)
    good[table] = seen.reshape(len(table), PAGES, PAGE)

    def spoil(name, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        at = good[:, None] if name.endswith(pages.SCALE) else good[..., None]
        return jnp.where(at, x, jnp.nan).astype(x.dtype)

    return {name: spoil(name, x) for name, x in cache.items()}


def rows_of(cache, kv_layout, table, lengths):
    """What each row's tokens are in the pages, numbers and scales as they are."""
    found = []
    for x in (cache[name] for name in cache):
        x = np.asarray(x.astype(jnp.float32))
        x = x if x.shape[1] == PAGE else x.swapaxes(1, 2)
        of_rows = x[table].reshape(len(table), PAGE * PAGES, -1)
        found += [row[:length] for row, length in zip(of_rows, lengths)]
    return np.concatenate([row.reshape(-1) for row in found])


SINKS = Scores(softcap=3.0, sinks_H=jnp.linspace(-1.0, 2.0, 4))
WIDTHS = {"k": 8, "v": 8}
CASES = {  # kept, widths, dtype, cache's dtype, sight, scores
    "sinks, soft-cap and window": (HEADS, WIDTHS, "float32", "float32", Mask(window=37), SINKS),
    "int8": (HEADS, WIDTHS, "float32", "int8", Mask(), Scores()),
    "latent, bfloat16": (
        *(LATENT, {"latent": 24, "k_rope": 8}, "bfloat16", "bfloat16", Mask()),
        Scores(0.2),
    ),
    "chunks": (HEADS, {"k": 8, "v": 16}, "float32", "float32", Mask(chunk=24), Scores()),
    "fp8": (HEADS, WIDTHS, "float32", "float8_e4m3fn", Mask(window=50), SINKS),
    "latent, int8": (LATENT, {"latent": 24, "k_rope": 8}, "float32", "int8", Mask(), Scores(0.2)),
    "bfloat16 pages of float32": (HEADS, WIDTHS, "float32", "bfloat16", Mask(), Scores()),
}
QUICK = ("sinks, soft-cap and window", "int8", "latent, bfloat16")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=SLOW) for c in CASES])
def test_values_and_pages_are_those_of_gathered_rows(case):
    """And nothing is read that no token may see: there the kernel finds what is no number."""
    kv_layout, widths, dtype, cache_dtype, mask, scores = CASES[case]
    q, new, cache, table, cu_q_lens, lengths = drawn(kv_layout, 4, widths, dtype, cache_dtype)
    rest = table, cu_q_lens, lengths
    wanted, wanted_cache = jit(lambda *a: paged_attention(*a, kv_layout, mask, scores))(q, new, cache, *rest)
    bad = poisoned(cache, *rest, mask.window)
    run = jit(lambda *a: paged_attention(*a, kv_layout, mask, scores))
    with backend.use("tpu", interpret=True):
        assert "paged_attention" in str(run.trace(q, new, bad, *rest).jaxpr)
        found, found_cache = run(q, new, bad, *rest)
    assert found.dtype == q.dtype and not np.asarray(found[-3:], np.float32).any()
    as_floats = functools.partial(np.asarray, dtype=np.float32)
    np.testing.assert_allclose(as_floats(found), as_floats(wanted), atol=2e-2 if "16" in dtype else 3e-5)
    if mask.window is None:
        ours, theirs = (rows_of(x, kv_layout, table, lengths) for x in (found_cache, wanted_cache))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("heads, width", [(2, 128), (4, 64)], ids=["one head a matrix", "two"])
def test_an_item_ends_where_its_row_does(heads, width):
    """Items of 64 tokens: one that is full, one that goes on for a token or two, few and single tokens of the next rows
    right behind, and a last one that stops with the tokens themselves."""
    kv_layout, rows = KVLayout(heads), ((130, 131), (65, 70), (1, 20), (3, 3), (64, 100), (1, 1), (67, 67))
    widths = {"k": width, "v": width}
    q, new, cache, *rest = drawn(kv_layout, 16, widths, "float32", "float32", rows, spare=0)
    step = jit(lambda *a: paged_attention(*a, kv_layout))
    wanted, wanted_cache = step(q, new, cache, *rest)
    with backend.use("tpu", interpret=True):
        found, found_cache = jit(lambda *a: paged_attention(*a, kv_layout))(q, new, cache, *rest)
    np.testing.assert_allclose(found, wanted, atol=3e-5)
    ours, theirs = (rows_of(x, kv_layout, rest[0], rest[2]) for x in (found_cache, wanted_cache))
    np.testing.assert_array_equal(ours, theirs)


def test_prompts_in_parts_and_single_tokens_are_one_text():
    """Rows of [B, T] places with padding after them, new tokens across pages, against the text at once."""
    kv_layout, T, B = HEADS, 50, 2
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(B, T, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    cache = empty(kv_layout, WIDTHS, 9, PAGE, "float32")
    table = np.array([[3, 1, 5, 7], [2, 8, 4, 6]], np.int32)
    step = jit(lambda *a: attend_in_rows(*a, kv_layout))
    whole = step(q, {"k": k, "v": v}, cache, table, np.zeros(2, np.int32), np.full(2, T, np.int32))[0]
    starts, found = np.zeros(2, np.int32), np.zeros_like(q)
    with backend.use("tpu", interpret=True):
        for counts in ([7, 20], [20, 0], [1, 13], [20, 17], [2, 0]):
            at = np.minimum(starts[:, None] + np.arange(20), T - 1)
            new_q, new_k, new_v = (np.take_along_axis(x, at[..., None, None], axis=1) for x in (q, k, v))
            out, cache = step(new_q, {"k": new_k, "v": new_v}, cache, table, starts, np.array(counts))
            for b, count in enumerate(counts):
                found[b, starts[b] : starts[b] + count] = out[b, :count]
                assert not np.asarray(out[b, count:]).any()
            starts = starts + np.array(counts, np.int32)
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_pages_that_hold_the_tokens_already_are_only_read():
    q, new, cache, *rest = drawn(HEADS, 4, WIDTHS, "float32", "float32", rows=ROWS[:4])
    wanted, full = jit(lambda *a: paged_attention(*a, HEADS))(q, new, cache, *rest)
    with backend.use("tpu", interpret=True):
        found, same = jit(lambda *a: paged_attention(*a, HEADS))(q, None, full, *rest)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, full)


@pytest.mark.parametrize("in_rows", [False, True], ids=["flat", "in rows"])
def test_jaxs_ragged_paged_attention_says_the_same(in_rows, monkeypatch):
    """By the name that a config gives it; in the place of its kernel, which JAX can't interpret, its reference."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    rows = ((1, 1), (0, 7), (40, 60), (1, 190), (0, 0), (16, 16))
    q, new, cache, table, offsets, lengths = drawn(
        HEADS, 4, {"k": 128, "v": 128}, "float32", "float32", rows=rows, spare=0
    )
    sees, counts = (HEADS, Mask(window=37), Scores(softcap=3.0)), np.diff(offsets)
    if in_rows:
        places = np.minimum(offsets[:-1, None] + np.arange(40), len(q) - 1)
        q, new = jax.tree.map(lambda x: x[places], (q, new))

    def found():
        if in_rows:
            return attend_in_rows(
                q, new, cache, table, jnp.asarray(lengths - counts), jnp.asarray(counts), *sees
            )
        return paged_attention(q, new, cache, table, offsets, lengths, *sees)

    def reference(*arguments, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes, **options):
        out = kernel.ref_ragged_paged_attention(*arguments, **options)
        return jnp.pad(out, [(0, len(arguments[0]) - len(out)), (0, 0), (0, 0)])

    wanted, wanted_cache = found()
    monkeypatch.setattr(kernel, "ragged_paged_attention", reference)
    with backend.use("tpu"), backend.prefer(backend.Kernels(paged="ragged")):
        theirs, their_cache = found()
    np.testing.assert_allclose(theirs, wanted, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, their_cache, wanted_cache)


@pytest.mark.parametrize(
    "kv_layout, widths, scores, platform, said",
    [
        (
            HEADS,
            WIDTHS,
            Scores(),
            "tpu",
            "fill vectors of 128, and these have 8 channels. These can: plain, kernel",
        ),
        (LATENT, {"latent": 96, "k_rope": 32}, Scores(), "tpu", "these pages hold k_rope, latent"),
        (HEADS, {"k": 128, "v": 128}, Scores(sinks_H=jnp.zeros(4)), "tpu", "it has no sinks"),
        (HEADS, WIDTHS, Scores(), "plain", "kernels here are for plain. These can: plain"),
    ],
    ids=["narrow", "latent", "sinks", "no kernels"],
)
def test_a_form_that_cannot_serve_says_which_can(kv_layout, widths, scores, platform, said):
    inputs = drawn(kv_layout, 4, widths, "float32", "float32", rows=((1, 3),))
    with backend.use(platform), backend.prefer(backend.Kernels(paged="ragged")):
        with pytest.raises(ValueError, match=f"kernels.paged='ragged' can't serve this: .*{said}"):
            paged_attention(*inputs, kv_layout, Mask(), scores)


@needs_libtpu
def test_jaxs_kernel_compiles_behind_our_arguments():
    inputs = drawn(HEADS, 8, {"k": 128, "v": 128}, "bfloat16", "bfloat16", rows=((1, 3), (20, 40)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    # the mesh tells the kernel the kind of the device
    with (
        backend.use("tpu", chip="v5p"),
        backend.prefer(backend.Kernels(paged="ragged")),
        jax.set_mesh(one_chip("v5p").mesh),
    ):
        program = compile_for("v5p", lambda *inputs: paged_attention(*inputs, HEADS)[0], *shapes)
    assert "tpu_custom_call" in program.as_text()


@pytest.mark.parametrize("dtype, bound", [("int8", 0.5 / 127), ("float8_e4m3fn", 2.0**-4)])
def test_quantised_numbers_are_near_and_zeros_stay_zeros(dtype, bound):
    """Off by half a step of the head's largest number in int8, by half a unit in the last of three bits in fp8."""
    x = np.random.default_rng(0).normal(size=(3, 5, 2, 64)) * np.logspace(-6, 6, 5)[:, None, None]
    x[0, 0] = 0
    numbers, scales = pages.quantize(jnp.asarray(x), dtype)
    back, top = (
        np.asarray(numbers, np.float64) * np.asarray(scales)[..., None],
        np.abs(x).max(-1, keepdims=True),
    )
    assert numbers.dtype == dtype and scales.shape == (3, 5, 2) and not back[0, 0].any()
    size = top if dtype == "int8" else np.maximum(np.abs(x), top * 2.0**-14)
    assert (np.abs(back - x) <= 1.001 * bound * size).all()


def test_a_gradient_is_refused():
    q, new, cache, *rest = drawn(HEADS, 4, WIDTHS, "float32", "float32", rows=ROWS[:1])
    for name in ("plain", "tpu"):
        with backend.use(name, interpret=True), pytest.raises(NotImplementedError, match="no gradient"):
            jax.grad(lambda q: paged_attention(q, new, cache, *rest, HEADS)[0].sum())(q)


@pytest.mark.parametrize(
    "dtype, page_size, message",
    [("bfloat16", 24, "multiple of 16"), ("int8", 32, "multiple of 128"), ("float32", 8, "scalar memory")],
)
def test_what_a_tpu_cannot_hold_is_named(dtype, page_size, message):
    columns = 2**17 + 1 if message == "scalar memory" else 4
    cache = jax.eval_shape(lambda: empty(HEADS, WIDTHS, 5, page_size, dtype))
    shape = lambda *sizes, kind=jnp.float32: jax.ShapeDtypeStruct(sizes, kind)
    new, numbers = {name: shape(1, 1, 2, 8) for name in "kv"}, shape(1, kind=jnp.int32)
    table = shape(1, columns, kind=jnp.int32)
    with backend.use("tpu", "v5p"), pytest.raises(ValueError, match=message):
        step = lambda *a: attend_in_rows(*a, HEADS)
        jax.eval_shape(step, shape(1, 1, 4, 8), new, cache, table, numbers, numbers)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 1], ids=["keys split", "one key"])
def test_a_mesh_that_splits_heads_changes_no_value(heads):
    kv_layout, widths = (HEADS, WIDTHS) if heads == 2 else (LATENT, {"latent": 24, "k_rope": 8})
    q, new, cache, table, _, _ = drawn(kv_layout, 4, widths, "float32", "int8", rows=((1, 1),) * 3)
    q, new = (jax.tree.map(lambda x: x[:6].reshape(2, 3, *x.shape[1:]), x) for x in (q, new))
    rest = table[:2], np.array([20, 0], np.int32), np.array([3, 1], np.int32)
    scores = Scores(sinks_H=jnp.linspace(-1.0, 2.0, 4))
    wanted = jit(lambda *a: attend_in_rows(*a, kv_layout, Mask(), scores))(q, new, cache, *rest)
    shape = [2 if axis in ("tensor", "data") else 1 for axis in MESH_AXES]
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(shape), MESH_AXES, axis_types=kinds)
    with jax.set_mesh(mesh), backend.use("tpu", interpret=True):
        found = jit(lambda *a: attend_on_mesh(*a, kv_layout, Mask(), scores, ShardingRules()))(
            q, new, cache, *rest
        )
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    ours, theirs = (rows_of(x, kv_layout, rest[0], rest[1] + rest[2]) for x in (found[1], wanted[1]))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_long_rows_equal_gathered_rows():
    """A row of 8192 tokens beside one of a single token; blocks as large as the chips'."""
    rng, P, Z = np.random.default_rng(0), 64, 128
    kv_layout, widths = HEADS, {"k": 64, "v": 64}
    cache = empty(kv_layout, widths, 2 * P + 1, Z, "float32")
    cache = {name: jnp.asarray(rng.normal(size=x.shape), x.dtype) for name, x in cache.items()}
    table = rng.permutation(2 * P).reshape(2, P).astype(np.int32)
    q, k, v = (rng.normal(size=(2, 700, heads, 64)).astype(np.float32) for heads in (8, 2, 2))
    rest = table, np.array([7492, 0], np.int32), np.array([700, 1], np.int32)
    step = jit(lambda *a: attend_in_rows(*a, kv_layout))
    wanted = step(q, {"k": k, "v": v}, cache, *rest)[0]
    with backend.use("tpu", interpret=True):
        np.testing.assert_allclose(step(q, {"k": k, "v": v}, cache, *rest)[0], wanted, atol=1e-5)


SHAPES = {  # kept, widths, query heads, page size, tokens a row, cache's dtype, sight, sinks
    "Llama 8B, pages of 16": (KVLayout(8), {"k": 128, "v": 128}, 32, 16, "bfloat16", Mask(), False),
    "Llama 8B, pages of 128": (KVLayout(8), {"k": 128, "v": 128}, 32, 128, "bfloat16", Mask(), False),
    "latent": (LATENT, {"latent": 512, "k_rope": 64}, 128, 64, "bfloat16", Mask(), False),
    "int8": (KVLayout(8), {"k": 128, "v": 128}, 32, 128, "int8", Mask(), False),
    "fp8": (KVLayout(8), {"k": 128, "v": 128}, 32, 128, "float8_e4m3fn", Mask(), False),
    "latent, int8": (LATENT, {"latent": 512, "k_rope": 64}, 128, 128, "int8", Mask(), False),
    "gpt-oss": (KVLayout(8), {"k": 64, "v": 64}, 64, 32, "bfloat16", Mask(window=128), True),
    "chunks": (KVLayout(8), {"k": 128, "v": 128}, 40, 32, "bfloat16", Mask(chunk=1024), False),
}


def compiled(chip, name, B, T, length=2048):
    """The program of one layer's attention to its pages, which are donated."""
    kv_layout, widths, heads, page_size, cache_dtype, mask, sinks = SHAPES[name]
    P = length // page_size
    shape = lambda *sizes, kind=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, kind)
    cache = jax.eval_shape(lambda: empty(kv_layout, widths, B * P + 1, page_size, cache_dtype))
    new = {name: shape(B, T, kv_layout.heads, widths[name]) for name in kv_layout.names}
    q, ints = shape(B, T, heads, sum(widths[name] for name in kv_layout.keys)), shape(B, kind=jnp.int32)

    def step(q, new, cache, table, start, count, sinks_H):
        return attend_in_rows(q, new, cache, table, start, count, kv_layout, mask, Scores(sinks_H=sinks_H))

    sinks_H = shape(heads, kind=jnp.float32) if sinks else None
    arguments = q, new, cache, shape(B, P, kind=jnp.int32), ints, ints, sinks_H
    on_chip = one_chip(chip)
    places = {name: pages.row_by_row(x, on_chip) for name, x in cache.items()}
    given = on_chip, on_chip, places, *4 * (on_chip,)
    with backend.use("tpu", chip):
        jitted = jax.jit(step, in_shardings=given, out_shardings=(on_chip, places), donate_argnums=2)
        return jitted.lower(*arguments).compile(), cache


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_has_a_program_that_copies_no_cache(chip):
    check_program(chip, "latent, int8", 256, 1)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip, name", sweep(SHAPES, "v4"))
@pytest.mark.parametrize("B, T", [(256, 1), (4, 256)], ids=["decode", "prefill"])
def test_chips_have_a_program_for_each_kind_of_pages(chip, name, B, T):
    check_program(chip, name, B, T)


def check_program(chip, name, B, T):
    program, cache = compiled(chip, name, B, T)
    text, memory = program.as_text(), program.memory_analysis()
    assert "paged_attention" in text
    assert_not_moved(text, cache.values())
    cache_bytes = sum(x.size * x.dtype.itemsize for x in cache.values())
    assert memory.alias_size_in_bytes >= cache_bytes  # what comes in is what goes out
    if T == 1:
        assert memory.temp_size_in_bytes < cache_bytes / 3


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_flat_tokens_of_prompts_and_single_ones_have_a_program(chip):
    kv_layout, shape = KVLayout(8), lambda *sizes, kind=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, kind)
    cache = jax.eval_shape(lambda: empty(kv_layout, {"k": 128, "v": 128}, 1025, 16, "bfloat16"))
    q, new, R = shape(1024, 32, 128), {name: shape(1024, 8, 128) for name in "kv"}, 64
    numbers = shape(R, 64, kind=jnp.int32), shape(R + 1, kind=jnp.int32), shape(R, kind=jnp.int32)
    with backend.use("tpu", chip):
        step = lambda *a: paged_attention(*a, kv_layout)
        program = compile_for(chip, step, q, new, cache, *numbers)
    text = program.as_text()
    assert "paged_attention" in text
    assert not re.search(r"bf16\[1024,32,128\]\S* (copy|transpose)\(", text)  # queries are not laid out anew
    # keys and values are, and the pages that they go into, of which a row may begin one and end one
    fresh = sum(x.size * x.dtype.itemsize for x in new.values())
    assert program.memory_analysis().temp_size_in_bytes < 5.5 * fresh


@needs_libtpu
@pytest.mark.slow
def test_four_chips_that_split_heads_have_a_quarter_of_the_work_each():
    shape = lambda *sizes, kind=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, kind)
    cache = jax.eval_shape(lambda: empty(KVLayout(8), {"k": 128, "v": 128}, 1025, 16, "bfloat16"))
    new = {name: shape(64, 1, 8, 128) for name in "kv"}
    numbers = shape(64, 64, kind=jnp.int32), shape(64, kind=jnp.int32), shape(64, kind=jnp.int32)
    arguments = shape(64, 1, 32, 128), new, cache, *numbers
    step = jax.jit(lambda *a: attend_on_mesh(*a, KVLayout(8), Mask(), Scores(), ShardingRules()))
    programs = []
    for devices in (1, 4):
        mesh = chips_of("v5p", tensor=devices)
        over_heads = [(None, None, "tensor")] * 3 + [()] * 3
        placed = [
            jax.tree.map(
                lambda x, spec=spec, mesh=mesh: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
                ),
                argument,
            )
            for argument, spec in zip(arguments, over_heads)
        ]
        with jax.set_mesh(mesh), backend.use("tpu", "v5p"):
            programs.append(program_of(step, *placed))
    assert_divided(*programs, 0.26, 0.3)

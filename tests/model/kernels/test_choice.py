"""Which implementation is chosen, errors that say which can serve, and numbers of libraries' kernels beside ours."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import Inputs, apply, init, init_cache, param_shapes
from model.blocks.differential_attention import DifferentialAttention
from model.blocks.positions import Alibi
from model.kernels import backend, choice
from model.kernels.attention import ATTENTION, Mask, Scores, self_attention
from model.kernels.attention.blocks import in_query_blocks
from model.kernels.backend import Kernels
from model.kernels.grouped_matmul import grouped_matmul
from model.kernels.grouped_matmul.reference import every_product
from model.kernels.grouped_matmul.sharded import Split
from model.kernels.paged_attention import PAGED_ATTENTION, KVLayout
from model.kernels.paged_attention import Request as PagedRequest
from model.kernels.recurrence import chunks
from model.kernels.ssd import SSD
from model.weights import Quantized, grouped_product, matmul
from train.config import Execution
from train.presets import Llama

from ..conftest import tiny
from ..tpu import compile_for

T = 160
POSITIONS = jnp.concatenate([jnp.arange(70), jnp.arange(90)])[None].repeat(2, 0)
SEGMENTS = jnp.concatenate([jnp.full(70, 1), jnp.full(90, 2)])[None].repeat(2, 0)
KINDS = {
    "causal": (None, Mask(), {}),
    "packed": (SEGMENTS, Mask(), {}),
    "window": (SEGMENTS, Mask(window=33), {}),
    "chunks": (SEGMENTS, Mask(chunk=32), {}),
    "both sides": (SEGMENTS, Mask(causal=False, window=20), {}),
    "whole rows, both sides": (None, Mask(causal=False), {}),
    "soft-cap": (None, Mask(), {"softcap": 5.0, "scale": 0.3}),
    "sinks": (SEGMENTS, Mask(), {"sinks_H": jnp.array([0.5, -1.0, 2.0, 0.0])}),
}
CAN_NOT = {("cudnn", "both sides"), ("cudnn", "soft-cap"), ("cudnn", "sinks"), ("tokamax", "sinks")}


def arrays(C=64):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, T, heads, C) for heads in (4, 2, 2, 4)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["splash", "cudnn", "triton", "tokamax"])
def test_each_form_computes_what_the_plain_form_does(form, kind):
    if form == "tokamax":
        pytest.importorskip("tokamax")
    q, k, v, d_out = arrays()
    segments, mask, options = KINDS[kind]
    rest = POSITIONS if segments is not None else jnp.arange(T)[None].repeat(2, 0), segments
    scores = Scores(**options)
    platform = ATTENTION.implementations[form].platforms[0]
    with backend.use(platform, interpret=True), backend.prefer(Kernels(attention=form)):
        if (form, kind) in CAN_NOT:
            with pytest.raises(
                ValueError, match=f"attention='{form}' can't serve this: .* These can: .*flash"
            ):
                self_attention(q, k, v, *rest, mask, scores)
            return
        out, pull = jax.vjp(lambda *qkv: self_attention(*qkv, *rest, mask, scores), q, k, v)
        found = (out, *pull(d_out))
    out, pull = jax.vjp(lambda *qkv: in_query_blocks(*qkv, *rest, mask, scores), q, k, v)
    for ours, wanted in zip(found, (out, *pull(d_out)), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5)


@pytest.mark.parametrize("key", [0, 100, T - 1])
def test_the_plain_form_hides_no_key_that_is_not_a_number(key):
    q, k, v, _ = arrays()
    positions = jnp.arange(T)[None].repeat(2, 0)
    out_BTHE = in_query_blocks(q, k.at[1, key, 0].set(jnp.nan), v, positions, None)
    lost_BTH = np.isnan(out_BTHE).any(-1)
    assert lost_BTH[1, key:, :2].all() and not lost_BTH[0].any() and not lost_BTH[1, :, 2:].any()


def test_a_form_of_another_platform_is_an_error_that_says_which_can():
    q, k, v, _ = arrays()
    wanted = "it runs on tpu, and kernels here are for plain. These can: plain"
    with backend.prefer(Kernels(attention="splash")), pytest.raises(ValueError, match=wanted):
        self_attention(q, k, v, POSITIONS, None)
    with (
        backend.prefer(Kernels(attention="flask")),
        pytest.raises(ValueError, match="is not one of auto, plain"),
    ):
        self_attention(q, k, v, POSITIONS, None)
    with (
        backend.prefer(Kernels(grouped="megablox")),
        pytest.raises(ValueError, match="it runs on tpu, .* These can: blocks, ragged_dot"),
    ):
        grouped_matmul(jnp.zeros((4, 2)), jnp.zeros((2, 2, 2)), jnp.array([2, 2]))


def test_the_platform_gives_way_to_a_form_that_can_and_says_so(caplog):
    q, k, v, _ = arrays(C=20)
    mask = Mask(prefix=jnp.array([3, 20]))
    with backend.use("gpu"), caplog.at_level("INFO"):
        out = self_attention(q, k, v, POSITIONS, SEGMENTS, mask)
        np.testing.assert_array_equal(out, in_query_blocks(q, k, v, POSITIONS, SEGMENTS, mask))
    assert (
        "kernels.attention: 'plain' runs, since 'cudnn' can't serve: it computes in bfloat16" in caplog.text
    )


@pytest.mark.parametrize("form", ["blocks", "ragged_dot", "megablox", "tokamax"])
def test_each_form_of_grouped_products_computes_what_the_loop_does(form):
    if form == "tokamax":
        pytest.importorskip("tokamax")
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, dy = (jax.random.normal(key, s) for key, s in zip(keys, [(70, 24), (4, 24, 40), (70, 40)]))
    sizes = jnp.array([30, 0, 25, 5])  # and ten rows of none
    wanted, pull_wanted = jax.vjp(lambda x, w: every_product(x, w, sizes), x, w)
    with backend.use("tpu", interpret=True), backend.prefer(Kernels(grouped=form)):
        found, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        gradients = pull(dy)
    for ours, theirs in zip((found, *gradients), (wanted, *pull_wanted(dy)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("form", ["splash"])
def test_other_peoples_kernels_compile_for_the_chip_behind_our_arguments(form):
    shapes = [(1, 2048, heads, 128) for heads in (8, 2, 2)]
    qkv = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def loss(q, k, v, ids):
        out = self_attention(q, k, v, jnp.arange(2048)[None], ids)
        return out.astype(jnp.float32).sum()

    with backend.use("tpu", chip="v5p"), backend.prefer(Kernels(attention=form)):
        text = compile_for("v5p", jax.grad(loss, (0, 1, 2)), *qkv, ids).as_text()
    assert "splash" in text and "tpu_custom_call" in text


def test_a_config_names_the_forms_of_a_run():
    run = Execution(kernels=Kernels(attention="splash"), remat="products")
    cfg = run.apply_to(Llama().build(64))
    assert cfg.kernels.attention == "splash" and cfg.remat == "products"
    with pytest.raises(ValueError, match="attention='splash' can't serve this: it runs on tpu"):
        jax.eval_shape(lambda: apply(cfg, init(cfg, jax.random.key(0)), jnp.zeros((1, 8), jnp.int32)))


def test_giving_way_is_logged_once_and_warns_only_where_it_costs(caplog):
    choice.said.cache_clear()
    with backend.use("tpu") as chosen, caplog.at_level("INFO"):
        for _ in range(2):
            assert (
                SSD.chosen_name(chunks.Request(chosen, 4)) == "plain"
                and SSD.chosen_name(chunks.Request(chosen, 40)) == "kernel"
            )
            assert PAGED_ATTENTION.chosen_name(paged_request(chosen, bias=True)) == "plain"
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    short = "'plain' runs, since 'kernel' can't serve: rows of 16 tokens or fewer are one small chunk."
    biased = "'plain' runs, since 'kernel' can't serve: its scores have no biases. It gathers whole rows"
    assert found == [
        ("INFO", f"kernels.ssd: {short}"),
        ("WARNING", f"kernels.paged: {biased} for each token."),
    ]


def paged_request(chosen, bias):
    return PagedRequest(
        chosen, frozenset("kv"), KVLayout(2), Mask(), bias, False, 128, 128, 16, frozenset({"float32"})
    )


def test_a_kernel_for_pages_that_was_named_where_none_runs_is_an_error():
    cfg = tiny(layers=1, kernels=backend.Kernels(paged="kernel"))
    cache = jax.eval_shape(lambda: init_cache(cfg, 1, 8))
    step = lambda params, tokens, cache: apply(cfg, params, tokens, cache).logits
    arguments = param_shapes(cfg), jax.ShapeDtypeStruct((1, 1), jnp.int32), cache
    with pytest.raises(
        ValueError,
        match="kernels.paged='kernel' can't serve this: it runs on tpu, and kernels here are for plain",
    ):
        jax.eval_shape(step, *arguments)
    with backend.use("gpu"), pytest.raises(ValueError, match="here are for gpu"):
        jax.eval_shape(step, *arguments)


@pytest.mark.parametrize("named", ["kernel", "ragged"])
def test_a_kernel_for_pages_that_was_named_where_a_tpu_gathers_rows_is_an_error(named):
    cfg = tiny(layers=1, kernels=backend.Kernels(paged=named))
    block = cfg.blocks[0]
    biased = dataclasses.replace(block.mixer, rope=None, alibi=Alibi())
    cases = {
        "no score biases": (biased, {}),
        "no prefix": (block.mixer, {"prefix": jnp.array([1])}),
        "directly follow": (block.mixer, {"positions": jnp.array([[0, 1]])}),
        "values that two heads share": (DifferentialAttention(4, 2, 6, 0.2), {}),
    }
    for reason, (mixer, parts) in cases.items():
        of_mixer = cfg.replace(blocks=(dataclasses.replace(block, mixer=mixer),))
        inputs = Inputs(jnp.zeros((1, 2), int), **parts)
        step = functools.partial(apply, of_mixer, inputs=inputs)
        with backend.use("tpu", interpret=True):
            cache = jax.eval_shape(functools.partial(init_cache, of_mixer, 1, 8))
            said = f"kernels.paged='{named}' can't serve this: .*{reason}.*: plain"
            with pytest.raises(ValueError, match=said):
                jax.eval_shape(step, param_shapes(of_mixer), cache=cache)


def test_a_kernel_for_quantized_weights_that_was_named_where_they_are_dequantized_is_an_error():
    of_kind = lambda kind, *shape: Quantized(
        jnp.zeros(shape, jnp.int8), jnp.ones((*shape[:-2], 1, shape[-1])), kind, (-2,)
    )
    sizes = jnp.array([2, 1])
    with (
        backend.use("tpu", interpret=True),
        backend.prefer(Kernels(quantized="kernel", quantized_grouped="kernel")),
    ):
        with pytest.raises(
            ValueError, match="kernels.quantized='kernel' can't serve this: .*product MO,IO->MI"
        ):
            matmul(jnp.ones((3, 8)), of_kind("int8", 8, 8), "MO,IO->MI")
        with pytest.raises(
            ValueError, match="kernels.quantized_grouped='kernel' can't serve this: it takes 8-bit"
        ):
            grouped_product(Split(), jnp.ones((3, 8)), of_kind("int4", 2, 8, 8), sizes, (None, None))
        two_devices = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        with jax.set_mesh(two_devices), pytest.raises(ValueError, match="it runs on one device"):
            matmul(jnp.ones((3, 8)), of_kind("int8", 8, 8), "MI,IO->MO")

"""Quantized weights: `apply` takes them as they are, adapters train over them, they are saved, sharded and relaid.

What they must compute is what the widened weights compute, as plain arrays; see `dequantize`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from model import (
    MESH_AXES,
    Attention,
    Block,
    ModelConfig,
    Rope,
    ShardingRules,
    SwiGLU,
    apply,
    init,
    init_cache,
    logical_axes,
    save,
)
from model import load as load_model
from model.adapters import add_adapters, join, merge_adapter, split_trained
from model.blocks.ffn import MLP
from model.blocks.latent_attention import LatentAttention
from model.blocks.lora import LoRA
from model.blocks.mamba2 import Mamba2
from model.blocks.moe import MoE
from model.blocks.rglru import RGLRU
from model.formats.peft import load_adapters
from model.formats.storage import load_lazily
from model.kernels import backend
from model.kernels.grouped_matmul.sharded import Split
from model.kernels.quantized_matmul import formats
from model.kernels.quantized_matmul.formats import NF4
from model.layout import relayout
from model.parameters import param_info
from model.quantization import dequantize, quantize, scale_blocks
from model.readouts.mtp import SequentialMTP
from model.sharding import named_sharding
from model.weights import Quantized, grouped_product, is_quantized, matmul, shardings_like

from .conftest import GOLDENS, check_decoding, compiled_fast, random_params, random_tokens
from .tpu import compile_for, needs_libtpu

ATTENTION = Attention(4, 2, 8, Rope(100.0))
DENSE = Block(ATTENTION, SwiGLU(48, bias=True))
MODELS = {
    "llama, untied head": ((DENSE, DENSE), {"tied_head": False}),
    "moe": ((Block(ATTENTION, MoE(4, 2, SwiGLU(48), shared=MLP(16))),), {}),
    "experts with slots": ((Block(ATTENTION, MoE(4, 2, SwiGLU(48), dispatch="capacity")),), {}),
    "mamba-2, rg-lru": ((Block(Mamba2(4, 8, 16), None), Block(RGLRU(4, 16), None)), {}),
    "latent attention": ((Block(LatentAttention(4, 8, 4, 8, 16, q_rank=16), SwiGLU(48)),) * 2, {}),
    "mtp": ((DENSE,), {"mtp": SequentialMTP((DENSE,)), "tied_head": False}),
}
forward = compiled_fast(apply, static_argnums=0, static_argnames=("train",))


@functools.cache
def built(name, scan=False):
    blocks, options = MODELS[name]
    cfg = ModelConfig(64, 32, blocks, max_length=64, **options)
    return relayout(cfg, random_params(cfg), scan=scan)


def close(found, wanted, atol=3e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, wanted)


def test_levels_of_nf4_are_quantiles_of_the_normal_distribution():
    """As QLoRA's released code makes them: eight at and above a half, seven below, and zero."""
    end = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    above, below = (scipy.stats.norm.ppf(np.linspace(end, 0.5, n)[:-1]) for n in (9, 8))
    levels = np.sort(np.concatenate([above, [0.0], -below]))
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=1e-6)


@pytest.mark.parametrize("block", [4, 8, 16, 32, "all"])
def test_each_block_of_inputs_has_the_scale_of_its_largest_value(block):
    cfg, params = built("llama, untied head")
    for path, inputs in ((("mixer", "q"), 1), (("mixer", "o"), 2), ((), 0)):
        found, array = quantize(cfg, params, "int8", block, ("q", "o", "head")), params
        for key in ("block_0", *path) if path else ("head",):
            found, array = found[key], array[key]
        w_IO = np.asarray(array.reshape(32, -1)) if path else np.asarray(array).T
        size = len(w_IO) if block == "all" else block
        scales = np.abs(w_IO.reshape(-1, size, w_IO.shape[1])).max(1, keepdims=True) / 127
        wanted = (np.round(w_IO.reshape(-1, size, w_IO.shape[1]) / scales) * scales).reshape(w_IO.shape)
        wide = np.asarray(found.dense(jnp.float32))
        np.testing.assert_allclose(wide.reshape(w_IO.shape) if path else wide.T, wanted, atol=1e-6)
        assert found.shape == array.shape and found.block == size and len(found.inputs) == max(inputs, 1)
        matrix = found.matrix()
        assert matrix.values_IO.shape == w_IO.shape and matrix.block == size


QUICK = (
    ("llama, untied head", "nf4"),
    ("moe", "int8"),
    ("mamba-2, rg-lru", "nf4"),
    ("latent attention", "int8"),
)


def slow_but_for(quick, *cases):
    """Parameters of a test, the slow ones marked."""
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    "name, kind", slow_but_for(QUICK, *[(name, kind) for name in MODELS for kind in ("int8", "nf4")])
)
def test_a_model_computes_what_its_widened_weights_do(name, kind):
    cfg, params = built(name)
    quantized = quantize(cfg, params, kind, 16)
    plain, tokens = dequantize(quantized), random_tokens(cfg, (2, 9))
    if cfg.mtp is not None:
        close(forward(cfg, quantized, tokens).mtp_logits, forward(cfg, plain, tokens).mtp_logits)
    train = name == "experts with slots"
    found = forward(cfg, quantized, tokens, train=train).logits
    close(found, forward(cfg, plain, tokens, train=train).logits)
    assert np.abs(found - forward(cfg, params, tokens, train=train).logits).max() > 1e-3
    assert is_quantized(quantized.get("head", quantized["block_0"]["mixer"]["o"]))
    assert not is_quantized(quantized["embedding"])


@pytest.mark.parametrize(
    "kind", ["fp8", *[pytest.param(k, marks=pytest.mark.slow) for k in ("mxfp4", "int4")]]
)
def test_other_formats_do_so_too(kind):
    cfg, params = built("moe")
    quantized, tokens = quantize(cfg, params, kind, 16), random_tokens(cfg, (2, 9))
    close(forward(cfg, quantized, tokens).logits, forward(cfg, dequantize(quantized), tokens).logits)


@pytest.mark.parametrize("name", ["latent attention", pytest.param("moe", marks=pytest.mark.slow)])
def test_decoding_with_a_cache_equals_the_full_forward_pass(name):
    cfg, params = built(name)
    quantized = quantize(cfg, params, "int8", 16)
    check_decoding(forward, cfg, quantized, random_tokens(cfg, (2, 9)), init_cache(cfg, 2, 16), (6, 1, 2))


@pytest.mark.parametrize("name, double", [("llama, untied head", True), ("moe", False)])
def test_scanned_and_unrolled_are_one_model(name, double):
    cfg, params = built(name)
    quantized, tokens = quantize(cfg, params, "nf4", 16, double=double), random_tokens(cfg, (2, 9))
    scanned_cfg, scanned = relayout(cfg, quantized, scan=True)
    wanted = forward(cfg, quantized, tokens).logits
    close(forward(scanned_cfg, scanned, tokens).logits, wanted)
    again = quantize(scanned_cfg, relayout(cfg, params, scan=True)[1], "nf4", 16, double=double)
    jax.tree.map(np.testing.assert_array_equal, again, scanned)
    jax.tree.map(np.testing.assert_array_equal, relayout(scanned_cfg, scanned, scan=False)[1], quantized)


@pytest.mark.parametrize(
    "name, kind, decomposed",
    slow_but_for(
        (("llama, untied head", "nf4", False), ("moe", "int8", True)),
        *[("llama, untied head", "int8", True), ("llama, untied head", "nf4", False)],
        *[("moe", "int8", True), ("moe", "nf4", False)],
        *[("latent attention", "int8", True), ("latent attention", "nf4", False)],
    ),
)
def test_adapters_get_the_gradient_that_they_get_over_widened_weights(name, kind, decomposed):
    cfg, params = built(name)
    quantized, adapters = quantize(cfg, params, kind, 16), LoRA(2, 4.0, decomposed=decomposed)
    cfg, quantized = add_adapters(cfg, quantized, adapters, jax.random.key(0))
    tokens = random_tokens(cfg, (2, 9))
    rng = np.random.default_rng(1)
    trained, rest = split_trained(quantized)
    assert not any(is_quantized(leaf) for leaf in jax.tree.leaves(trained, is_leaf=is_quantized))
    trained = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), trained)

    @functools.partial(compiled_fast, static_argnums=0)
    def gradient(cfg, trained, rest):
        return jax.grad(lambda trained: jnp.square(apply(cfg, join(trained, rest), tokens).logits).mean())(
            trained
        )

    found, wanted = gradient(cfg, trained, rest), gradient(cfg, trained, dequantize(rest))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))
    close(found, wanted)


def test_an_adapter_is_merged_into_widened_weights_alone():
    cfg, params = built("llama, untied head")
    cfg, params = add_adapters(cfg, quantize(cfg, params, "int8", 16), LoRA(2, 4.0), jax.random.key(0))
    with pytest.raises(ValueError, match=r"block_0/ffn/down is quantized.*dequantize"):
        merge_adapter(cfg, params)
    merge_adapter(cfg, dequantize(params))


def test_products_pass_gradients_to_what_is_multiplied():
    """The kernels', interpreted, and the plain form's, for a map, a map the other way, and experts."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(64, 2, 24)), jnp.float32)
    weight = quantized_array(w, 1, 32)
    for spec, given in (("MI,IHO->MHO", x), ("MHO,IHO->MI", jnp.ones((3, 2, 24)))):
        wanted = jax.vjp(lambda x, spec=spec: jnp.einsum(spec, x, weight.dense(jnp.float32)), given)
        for name in ("plain", "tpu"):
            with backend.use(name, interpret=True):
                value, back = jax.vjp(lambda x, spec=spec: matmul(x, weight, spec), given)
                close((value, back(value)), (wanted[0], wanted[1](value)), 2e-4)
    sizes_E, experts = jnp.asarray([1, 0, 2]), jnp.asarray(rng.normal(size=(3, 64, 24)), jnp.float32)
    one_scale = quantized_array(experts.swapaxes(0, 1), 1, 64, experts=True)
    rows = [np.asarray(one_scale.dense(jnp.float32))[e] for e in (0, 2, 2)]
    wanted = np.stack([x_I @ w_IO for x_I, w_IO in zip(np.asarray(x), rows)])
    for name in ("plain", "tpu"):
        with backend.use(name, interpret=True):
            run = lambda x: grouped_product(Split(), x, one_scale, sizes_E, (None, None))
            value, back = jax.vjp(run, x)
            close(value, wanted, 2e-4)
            close(back(value)[0], np.stack([y @ w_IO.T for y, w_IO in zip(wanted, rows)]), 2e-3)
            _, moved = jax.jvp(run, (x,), (x[::-1],))  # the product is linear in x
            close(moved, np.stack([x_I @ w_IO for x_I, w_IO in zip(np.asarray(x)[::-1], rows)]), 2e-4)


def quantized_array(w, inputs, block, experts=False):
    """Of [*inputs, *outputs]; of experts the first output is theirs, and comes first."""
    from model.kernels.quantized_matmul.formats import quantize as rounded

    matrix = rounded(w.reshape(w.shape[0], -1), "int8", block)
    values, scales = matrix.values_IO.reshape(w.shape), matrix.scales_NO.reshape(-1, *w.shape[1:])
    if experts:
        return Quantized(values.swapaxes(0, 1), scales.swapaxes(0, 1), "int8", (-2,))
    return Quantized(values, scales, "int8", tuple(range(-w.ndim, -w.ndim + inputs)))


def test_bytes_fall_as_the_format_says():
    cfg, params = built("llama, untied head")
    weights = [info for info in jax.tree.leaves(param_info(cfg)) if info.is_weight]
    count = sum(int(np.prod(info.shape)) for info in weights)
    for kind, bits in (("int8", 8), ("nf4", 4)):
        leaves = jax.tree.leaves(quantize(cfg, params, kind, 16), is_leaf=is_quantized)
        quantized = [leaf for leaf in leaves if is_quantized(leaf)]
        assert len(quantized) == len(weights)
        assert sum(leaf.nbytes for leaf in quantized) == count * bits // 8 + count // 16 * 4


def test_blocks_run_along_the_last_inputs_first():
    assert [scale_blocks((4, 6), n) for n in (2, 6, 12, 24)] == [(4, 3), (4, 1), (2, 1), (1, 1)]
    assert [scale_blocks((4, 6), n) for n in (4, 5, 9, 48)] == [None] * 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "int3"}, "Use one of int8, int4"),
        ({"targets": ("embedding",)}, "embedding is no weight that can be quantized"),
        ({"targets": ("mixer/q", "ffn/rooter")}, "'ffn/rooter': no parameter is named so"),
        ({"targets": ("router",)}, "ffn/router is no weight"),
        (
            {"block": 12},
            r"block_0/\S+: blocks of 12 do not fit its inputs \((32|4 x 8)\)",
        ),
        (
            {"block": 32, "targets": ("down",)},
            r"down: blocks of 32 do not fit its inputs \(48\). Use one of 1, 2",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_quantized_is_named(options, message):
    cfg, params = built("moe")
    with pytest.raises(ValueError, match=message):
        quantize(cfg, params, **({"kind": "int8"} | options))


def test_only_the_targets_are_quantized_and_only_once():
    cfg, params = built("moe")
    quantized = quantize(cfg, params, "int8", 16, ("ffn/experts/*",))
    of_block = quantized["block_0"]
    assert all(map(is_quantized, of_block["ffn"]["experts"].values()))
    assert not is_quantized(of_block["mixer"]["q"]) and not is_quantized(of_block["ffn"]["shared"]["up"])
    with pytest.raises(ValueError, match="already quantized, as int8"):
        quantize(cfg, quantized, "int8", 16)


@pytest.mark.parametrize("double", [False, True], ids=["float32 scales", "8-bit scales"])
def test_a_mesh_splits_values_and_scales_alike(double):
    cfg, params = built("moe")
    quantized, rules = quantize(cfg, params, "int8", 4, double=double), ShardingRules()
    mesh = jax.make_mesh((1, 2, 1, 1, 2, 2), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 6)
    is_axes = lambda leaf: isinstance(leaf, tuple)
    dense = jax.tree.map(lambda names: named_sharding(mesh, rules, names), logical_axes(cfg), is_leaf=is_axes)
    placed = jax.device_put(quantized, shardings_like(quantized, dense))
    for path, ways in ((("mixer", "q"), 4), (("ffn", "experts", "down"), 8)):
        leaf = functools.reduce(lambda tree, key: tree[key], path, placed["block_0"])
        for array in (leaf.values, leaf.scales):
            assert array.addressable_shards[0].data.size * ways == array.size, path
    tokens = random_tokens(cfg, (2, 8))
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(apply, cfg, rules=rules))(placed, tokens).logits
    close(np.asarray(found), forward(cfg, dequantize(quantized), tokens).logits)


@pytest.mark.parametrize("kind, double", [("int8", False), ("nf4", True), ("fp8", False)])
def test_a_checkpoint_holds_them_as_they_are(tmp_path, kind, double):
    cfg, params = built("moe")
    quantized = quantize(cfg, params, kind, 16, double=double)
    save(tmp_path / "model", cfg, quantized)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal, quantized)
    same(load_model(tmp_path / "model")[1])
    same(load_model(tmp_path / "model", dtype="float32")[1])
    lazy_cfg, lazy = load_lazily(tmp_path / "model")
    save(tmp_path / "again", lazy_cfg, lazy)
    same(load_model(tmp_path / "again")[1])
    scanned_cfg, scanned = load_model(tmp_path / "model", cfg=cfg.replace(scan=True))
    same(relayout(scanned_cfg, scanned, scan=False)[1])
    mesh = jax.make_mesh((8,), ("tensor",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: split, params)
    shardings["block_0"]["ffn"]["shared"]["up"] = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(None, "tensor")
    )
    placed = load_model(tmp_path / "model", shardings=shardings)[1]
    same(placed)
    for array in jax.tree.leaves(placed["block_0"]["ffn"]["shared"]["up"]):
        assert array.addressable_shards[0].data.size * 8 == array.size
    for format in ("huggingface", "gguf"):
        with pytest.raises(
            ValueError, match=r"does not support quantized weights such as block_0/.*dequantize"
        ):
            save(tmp_path / "other", cfg, quantized, format=format)


def test_a_weight_of_another_shape_is_named():
    cfg, params = built("llama, untied head")
    quantized = quantize(cfg, params, "int8", 16)
    quantized["block_1"]["mixer"]["q"] = quantized["block_1"]["mixer"]["k"]
    with pytest.raises(ValueError, match=r"mixer/q is quantized with the shape \(32, 2, 8\)"):
        apply(cfg, quantized, random_tokens(cfg, (1, 3)))


@needs_libtpu
def test_kernels_read_values_as_they_are_stored():
    """A step of decoding for a TPU: each map by its kernel."""
    blocks = (Block(ATTENTION, MoE(8, 2, SwiGLU(1024))), Block(ATTENTION, SwiGLU(2048)))
    cfg = ModelConfig(512, 1024, blocks, tied_head=False, dtype="bfloat16", param_dtype="bfloat16")

    def rounded(params):
        params = quantize(cfg, params, "int8", "all", ("ffn/experts/*",))
        return quantize(cfg, params, "nf4", 32, ("q", "k", "v", "o", "head"))

    quantized = jax.eval_shape(lambda key: rounded(init(cfg, key)), jax.random.key(0))

    def step(params, tokens):
        with backend.use("tpu", chip="v5e"):
            return apply(cfg, params, tokens).logits

    program = compile_for("v5e", step, quantized, jax.ShapeDtypeStruct((4, 1), jnp.int32)).as_text()
    kernels = re.findall(r'custom_call_target="tpu_custom_call".*?op_name="([^"]*)"', program)
    by_kernel = lambda name: sum(name in kernel for kernel in kernels)
    assert by_kernel("quantized_matmul_nf4") == 9 and by_kernel("grouped") == 3, kernels


@pytest.mark.parametrize("name", ["llama_dora", "llama_pissa"])
def test_adapters_of_peft_go_beside_quantized_weights(name):
    """The lengths of DoRA and what PiSSA takes out are those of the weights as they are, that is widened."""
    cfg, params = load_model(GOLDENS / "llama_tied")
    quantized = quantize(cfg, params, "int8", "all")
    trees = [
        load_adapters(cfg, tree, [GOLDENS / "adapters" / name]) for tree in (quantized, dequantize(quantized))
    ]
    assert is_quantized(trees[0][1]["block_0"]["mixer"]["q"])
    found, wanted = (forward(*tree, random_tokens(cfg, (2, 9))).logits for tree in trees)
    close(found, wanted)
    assert np.abs(found - forward(cfg, quantized, random_tokens(cfg, (2, 9))).logits).max() > 1e-3


def test_nf4_is_that_of_bitsandbytes_code_by_code():
    """tests/goldens/make_nf4.py. A weight is [outputs, inputs] there."""
    golden = np.load(GOLDENS / "nf4.npz")
    weight = jnp.asarray(golden["weight"]).T  # [inputs, outputs]
    rounded = formats.quantize(weight, "nf4", 64)
    codes, scales = rounded.values_IO, rounded.scales_NO
    plain = Quantized(codes, scales, "nf4", (-2,))
    np.testing.assert_array_equal(np.asarray(codes).astype(int).T + 8, golden["plain_codes"])
    np.testing.assert_allclose(np.asarray(scales).T, golden["scales"], rtol=1e-6)
    np.testing.assert_allclose(plain.dense(jnp.float32).T, golden["plain_dense"], rtol=1e-6, atol=1e-7)
    double = plain.double_quantized()
    assert double.scales.dtype == jnp.uint8 and double.nbytes < plain.nbytes
    np.testing.assert_array_equal(double.values, plain.values)
    step = np.abs(golden["scales"]).max(axis=1, keepdims=True) / 510
    off = (
        np.abs(np.asarray(double.dense(jnp.float32)).T - golden["plain_dense"]).reshape(24, 4, 64).max(axis=2)
    )
    assert (off <= step * 1.001).all()
    theirs = np.linalg.norm(golden["double_dense"] - golden["weight"])
    assert np.linalg.norm(np.asarray(double.dense(jnp.float32)).T - golden["weight"]) < 1.02 * theirs

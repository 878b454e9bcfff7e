"""Mixtures of experts whose products are kernels, on eight devices: nothing changes but where things are computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import MESH_AXES, ShardingRules
from model.blocks.common import Context, TokenInfo
from model.blocks.ffn import MLP, GatedMLP
from model.blocks.lora import LoRA
from model.blocks.moe import MoE
from model.kernels import backend
from model.kernels.grouped_matmul.sharded import split_of
from model.sharding import named_sharding
from tests.meshes import assert_divided, compiled

from ..conftest import compiled_fast as jit
from ..tpu import chips_of, needs_libtpu

B, T, D, F, E = 4, 6, 16, 8, 4
SPEC = MoE(E, 2, GatedMLP(F, bias=True))
RULES = ShardingRules()


def mesh_of(devices, **sizes):
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=kinds)


def pulled(spec, ctx):
    """(what comes out, gradients of parameters and input) along a direction."""

    def run(params, x, direction):
        positions = jnp.tile(jnp.arange(x.shape[1]), (len(x), 1))
        forward = lambda params, x: spec.module(ctx, "ffn").apply(
            {"params": params}, x, TokenInfo(positions, None)
        )[0]
        y, pull = jax.vjp(forward, params, x)
        return y, pull(direction)

    return jit(run)


def draws(spec, ctx, rows=B, length=T):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, positions = normal(rows, length, D), jnp.zeros((rows, length), jnp.int32)
    init = lambda: spec.module(ctx, "ffn").init(jax.random.key(0), x, TokenInfo(positions, None))["params"]
    is_box = lambda leaf: hasattr(leaf, "names")
    params = jax.tree.map(
        lambda box: normal(*box.value.shape) * D**-0.5, jax.eval_shape(init), is_leaf=is_box
    )
    return params, x, normal(rows, length, D)


EVERYWHERE = {"fsdp": 2, "expert": 2, "tensor": 2}
MESHES = {  # mixture, adapters, mesh, rules
    "tokens, experts and widths": (SPEC, None, EVERYWHERE, RULES),
    "tokens alone, and weights that multiply inputs": (
        *(dataclasses.replace(SPEC, expert=MLP(F, "relu"), weigh_input=True), None),
        *({"data": 2, "fsdp": 2, "context": 2}, RULES),
    ),
    # which are split as the map beside them is
    "adapters": (SPEC, LoRA(2, 4.0), EVERYWHERE, RULES),
    "no rules": (SPEC, None, {"data": 8}, None),
}
SLOW = ("adapters", "no rules")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in MESHES]
)
def test_values_and_gradients_are_those_of_one_device(case):
    spec, adapters, sizes, rules = MESHES[case]
    float32 = jnp.dtype("float32")
    ctx = Context(D, 2, float32, float32, adapters=adapters)
    inputs = draws(spec, ctx)
    wanted = pulled(spec, ctx)(*inputs)
    with jax.set_mesh(mesh_of(jax.devices(), **sizes)), backend.use("tpu", interpret=True):
        ours = pulled(spec, dataclasses.replace(ctx, rules=rules))(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), ours, wanted)


def test_a_mesh_splits_what_it_divides_and_says_what_it_does_not():
    mesh = mesh_of(jax.devices(), data=2, context=2, expert=2)
    with jax.set_mesh(mesh):
        assert not split_of(None, 4, 6).axes  # left to the compiler, as long as products are no kernels
        with backend.use("tpu"):
            assert split_of(None, 4, 6).axes
        split = split_of(RULES, 4, 6)
        assert (split.batch, split.length, split.experts) == (("data", "fsdp"), ("context",), ("expert",))
        assert split.width("mlp") == ("tensor",) and split.width("embed") == ()
        assert split.gathers("embed") is False  # over one device
        assert split_of(RULES, 4, 1).length == ()  # one token of a row, as in decoding
        with pytest.raises(
            ValueError,
            match=r"data\*fsdp = 2 do not divide the 3 rows of the batch. Use axes of 1, 3 devices, a multiple of 2",
        ):
            split_of(RULES, 3, 6)
        with pytest.raises(ValueError, match="context = 2 do not divide the 5 tokens of a row"):
            split_of(RULES, 4, 5)
        assert split_of(ShardingRules(batch=("expert",)), 4, 6).experts == ()
    with jax.set_mesh(mesh_of(jax.devices(), fsdp=4, tensor=2)), backend.use("tpu"):
        split = split_of(RULES, 4, 6)
        assert split.gathers("embed") and not split.gathers("mlp") and not split.gathers(None)


@needs_libtpu
@pytest.mark.slow
def test_four_chips_that_split_tokens_and_experts_have_a_program():
    bfloat16 = jnp.dtype("bfloat16")
    spec, ctx = MoE(8, 2, GatedMLP(1024)), Context(512, 2, bfloat16, bfloat16, rules=RULES)
    positions = jnp.zeros((4, 256), jnp.int32)
    init = lambda: spec.module(ctx, "ffn").init(
        jax.random.key(0), jnp.zeros((4, 256, 512), bfloat16), TokenInfo(positions, None)
    )

    def step(params, x):
        forward = lambda params, x: spec.module(ctx, "ffn").apply(
            {"params": params}, x, TokenInfo(positions, None)
        )[0]
        y, pull = jax.vjp(forward, params, x)
        return pull(y)

    def program_on(mesh):
        def shaped(names, shape):
            return jax.ShapeDtypeStruct(shape, bfloat16, sharding=named_sharding(mesh, RULES, names))

        with jax.set_mesh(mesh), backend.use("tpu", "v5p"):
            boxes = jax.eval_shape(init)["params"]
            params = jax.tree.map(
                lambda box: shaped(box.names, box.value.shape),
                boxes,
                is_leaf=lambda leaf: hasattr(leaf, "names"),
            )
            return compiled(jax.jit(step), params, shaped(("batch", "length", None), (4, 256, 512)))

    split = program_on(chips_of("v5p", fsdp=2, expert=2))
    # half the tokens; room is counted for all of them to be of a chip's experts, whatever is then multiplied
    assert_divided(program_on(chips_of("v5p")), split, 0.55, 0.6)
    program = split.as_text()
    assert all(name in program for name in ("grouped_products", "grouped_matrix_gradients", "all-reduce"))

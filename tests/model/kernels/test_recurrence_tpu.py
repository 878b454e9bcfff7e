"""The kernels of SSD and of the delta rule, interpreted, against their plain forms; then compiled for every TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from model.kernels import backend, delta_rule, ssd
from model.kernels.delta_rule import tpu as delta_tpu
from model.kernels.recurrence.tpu_chunks import TileSizes
from model.kernels.ssd import tpu as ssd_tpu
from model.sharding import MESH_AXES, ShardingRules
from tests.meshes import assert_divided, compiled

from ..conftest import compiled_fast as jit
from ..tpu import CHIPS, chips_of, compile_for, needs_libtpu, sweep

SMALL = TileSizes(256, 128)


def ssd_draws(B, T, H, P, G, N, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    decays = jnp.asarray(-np.exp(rng.uniform(-6, 4, (B, T, H))), jnp.float32)
    first, state = jnp.asarray(rng.random((B, T)) < 0.02), normal(B, H, P, N).astype(jnp.float32)
    return normal(B, T, H, P), decays, normal(B, T, G, N), normal(B, T, G, N), first, state


def scaled_draws(B, T, H, *sizes, dtype=jnp.float32):
    scale = np.random.default_rng(2).uniform(0, 3, (B, T, H))
    return jnp.asarray(scale, jnp.float32), *ssd_draws(B, T, H, *sizes, dtype=dtype)


def of_scaled(function, scale, *inputs, **options):
    return function(*inputs, scale_BTH=scale, **options)


def delta_draws(B, T, H, K, V, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    k = normal(B, T, H, K)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q, k, v = (jnp.asarray(x, dtype) for x in (normal(B, T, H, K), k, normal(B, T, H, V)))
    decays, beta = -np.exp(rng.uniform(-6, 4, (B, T, H, 1))), rng.uniform(0, 2, (B, T, H))
    first, state = jnp.asarray(rng.random((B, T)) < 0.02), normal(B, H, K, V)
    return q, k, v, *(jnp.asarray(x, jnp.float32) for x in (decays, beta)), first, jnp.float32(state)


def delta_kernel(q, k, v, log_decay, *rest, **options):
    return delta_tpu.delta_rule(q, k, v, log_decay[..., 0], *rest, **options)


SSD = functools.partial(ssd_tpu.ssd, tiles=SMALL, interpret=True)
KERNELS = {  # draws, kernel, plain form
    "ssd": (ssd_draws, SSD, ssd.in_chunks),
    "ssd of scaled values": (
        scaled_draws,
        functools.partial(of_scaled, SSD),
        functools.partial(of_scaled, ssd.in_chunks),
    ),
    "delta rule": (
        delta_draws,
        functools.partial(delta_kernel, tiles=SMALL, interpret=True),
        functools.partial(delta_rule.in_chunks, chunk=128),
    ),
}


@functools.cache
def pulled(function):
    """(results, gradients of all floats along a direction)."""

    def run(inputs, direction):
        floats = [i for i, x in enumerate(inputs) if x.dtype != bool]

        def of_floats(*values):
            given = dict(zip(floats, values, strict=True))
            return function(*(given.get(i, x) for i, x in enumerate(inputs)))

        results, pull = jax.vjp(of_floats, *(inputs[i] for i in floats))
        return results, pull(direction)

    return jit(run)


def directions(function, inputs, seed=1):
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(function, *inputs)
    return tuple(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in shapes)


def check(name, inputs, atol):
    _, kernel, plain = KERNELS[name]
    direction = directions(plain, inputs)
    exact = tuple(x if x.dtype == bool else x.astype(jnp.float32) for x in inputs)
    ours, wanted = pulled(kernel)(inputs, direction), pulled(plain)(exact, direction)
    assert [x.dtype for x in ours[1]] == [x.dtype for x in inputs if x.dtype != bool]
    assert_close(ours, wanted, atol)


def assert_close(ours, wanted, atol):
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert np.isfinite(want).all()
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=atol * max(1, np.abs(want).max()))


SHAPES = {
    "ssd": (2, 300, 4, 3, 2, 5),
    "ssd of scaled values": (2, 300, 4, 3, 2, 5),
    "delta rule": (2, 300, 2, 7, 5),
}
FIRSTS = {
    "some": lambda first: first,
    "none": jnp.zeros_like,
    "runs of them": lambda first: first.at[:, 100:260].set(True).at[:, 299].set(True).at[:, 0].set(False),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("which", FIRSTS)
def test_values_and_gradients_are_those_of_the_plain_form(name, which):
    """In ragged rows, from a state that is not zero, under decays from mild to deadly."""
    *before, first, state = KERNELS[name][0](*SHAPES[name])
    check(name, (*before, FIRSTS[which](first), state), 2e-5)


ROUNDED = {
    "ssd": (1, 300, 4, 64, 1, 16),
    "ssd of scaled values": (1, 300, 4, 64, 1, 16),
    "delta rule": (1, 300, 2, 16, 8),
}


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_is_as_near_as_its_rounding(name):
    check(name, KERNELS[name][0](*ROUNDED[name], dtype=jnp.bfloat16), 1e-2)


@pytest.mark.parametrize("name", KERNELS)
def test_one_token_meets_the_state(name):
    B, _, *rest = SHAPES[name]
    check(name, KERNELS[name][0](B, 1, *rest), 1e-6)


PICKS = {
    "ssd": ssd.ssd,
    "ssd of scaled values": functools.partial(of_scaled, ssd.ssd),
    "delta rule": delta_rule.delta_rule,
}


def public(name, inputs, rules=None):
    """The function that picks, of float inputs and `first`."""
    return functools.partial(PICKS[name], rules=rules), inputs


def traced(function, inputs):
    return str(jax.make_jaxpr(function)(*inputs))


@pytest.mark.parametrize("name", KERNELS)
def test_tpus_take_the_kernel_unless_tokens_are_few(name):
    B, _, *rest = SHAPES[name]
    function, long = public(name, KERNELS[name][0](B, 17, *rest))
    short, kernel = KERNELS[name][0](B, 16, *rest), name.split()[0] + "_forward"
    assert kernel not in traced(function, long)
    with backend.use("tpu", interpret=True):
        assert kernel in traced(function, long) and kernel not in traced(function, short)


def test_decays_by_channel_are_left_to_the_plain_form():
    q, k, v, log_decay, *rest = delta_draws(1, 20, 1, 4, 4)
    with backend.use("tpu"):
        program = traced(delta_rule.delta_rule, (q, k, v, jnp.repeat(log_decay, 4, axis=3), *rest))
    assert "delta_forward" not in program


def mesh_of(devices, **sizes):
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=kinds)


MESHES = {  # shape of the inputs, sizes of the mesh
    "ssd, each device one group": ("ssd", (2, 20, 2, 3, 2, 5), {"data": 2, "tensor": 2}),
    "ssd, groups on several devices": ("ssd of scaled values", (2, 20, 4, 3, 2, 5), {"data": 2, "tensor": 4}),
    "delta rule": ("delta rule", (2, 20, 2, 7, 5), {"fsdp": 2, "context": 2, "tensor": 2}),
}
QUICK = "ssd, groups on several devices"


@pytest.mark.parametrize(
    "case", [c if c == QUICK else pytest.param(c, marks=pytest.mark.slow) for c in MESHES]
)
def test_a_mesh_that_splits_rows_and_heads_changes_no_value_or_gradient(case):
    """Keys of fewer groups than devices are whole on each."""
    name, shape, sizes = MESHES[case]
    function, inputs = public(name, KERNELS[name][0](*shape), ShardingRules())
    direction = directions(KERNELS[name][2], inputs)
    wanted = pulled(KERNELS[name][2])(inputs, direction)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    with jax.set_mesh(mesh_of(devices, **sizes)), backend.use("tpu", interpret=True):
        assert_close(pulled(function)(inputs, direction), wanted, 2e-5)


@pytest.mark.parametrize(
    "rows, heads, groups, message",
    [
        (2, 6, 1, "do not divide the 6 heads"),
        (2, 12, 3, "neither divide nor are a multiple of the 3 groups"),
        (3, 8, 1, "do not divide the 3 rows of the batch"),
    ],
)
def test_rows_and_heads_that_a_mesh_does_not_divide_are_named(rows, heads, groups, message):
    function, inputs = public("ssd", ssd_draws(rows, 20, heads, 3, groups, 5), ShardingRules())
    with (
        jax.set_mesh(mesh_of(jax.devices(), data=2, tensor=4)),
        backend.use("tpu", interpret=True),
        pytest.raises(ValueError, match=message),
    ):
        function(*inputs)


MODELS = {  # heads, value width, groups, state width; heads, key width, value width
    "Mamba-2 1.3B": ("ssd of scaled values", (64, 64, 1, 128)),
    "Falcon-H1 7B": ("ssd of scaled values", (24, 128, 1, 256)),
    "Nemotron-H 47B": ("ssd of scaled values", (256, 64, 8, 256)),
    "Nemotron Nano 9B": ("ssd of scaled values", (128, 80, 8, 128)),
    "RetNet 1.3B": ("ssd", (8, 512, 8, 256)),
    "Qwen3-Next 80B": ("delta rule", (32, 128, 128)),
    "Gated DeltaNet 1.3B": ("delta rule", (6, 256, 512)),
}


def arguments(kind, B, T, sizes, dtype):
    """As the mixers give them."""
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((B, *shape), dtype)
    if kind.startswith("ssd"):
        H, P, G, N = sizes
        keys, values = of(T, G, N, dtype=dtype), of(T, H, P, dtype=dtype)
        scale = () if kind == "ssd" else (of(T, H),)
        return *scale, values, of(T, H), keys, keys, of(T, dtype=bool), of(H, P, N)
    H, K, V = sizes
    values = of(T, H, V, dtype=dtype)
    return of(T, H, K), of(T, H, K), values, of(T, H, 1), of(T, H), of(T, dtype=bool), of(H, K, V)


def compiled_step(chip, model, T=8192, dtype=jnp.bfloat16):
    """Values and gradients of one row."""
    kind, sizes = MODELS[model]
    with backend.use("tpu", chip):
        inputs = arguments(kind, 1, T, sizes, dtype)
        function, _ = public(kind, inputs)

        def step(inputs, direction):
            first = [x for x in inputs if x.dtype == bool]
            fill = lambda values: [values.pop(0) if x.dtype != bool else first[0] for x in inputs]
            results, pull = jax.vjp(
                lambda *values: function(*fill(list(values))), *(x for x in inputs if x.dtype != bool)
            )
            return results, pull(direction)

        return compile_for(chip, step, inputs, jax.eval_shape(function, *inputs))


SMALLEST = "v4"  # of the fast memories
MAIN = ("Mamba-2 1.3B", "Qwen3-Next 80B")


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", MAIN)
def test_every_chip_has_a_program(chip, model):
    program, kind = compiled_step(chip, model).as_text(), MODELS[model][0].split()[0]
    assert f"{kind}_forward" in program and f"{kind}_backward" in program


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip, model", sweep([m for m in MODELS if m not in MAIN], SMALLEST))
def test_chips_have_a_program_for_each_model(chip, model):
    compiled_step(chip, model)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("model", MAIN)
def test_every_chip_has_a_program_for_float32(model):
    compiled_step(SMALLEST, model, T=1000, dtype=jnp.float32)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("model", MAIN)
def test_four_chips_that_split_rows_and_heads_have_a_quarter_of_the_work_each(model):
    kind, sizes = MODELS[model]
    inputs = arguments(kind, 2, 2048, sizes, jnp.bfloat16)
    function, _ = public(kind, inputs, ShardingRules())

    def spec(x):
        heads = 2 if x.shape[1] == 2048 else 1
        over = lambda i: (
            "tensor" if i == heads and x.shape[i] == sizes[0] else None
        )  # keys of one group are whole
        return PartitionSpec("data", *map(over, range(1, x.ndim)))

    programs = []
    for ways in (1, 2):
        mesh = chips_of("v5p", data=ways, tensor=ways)
        placed = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))) for x in inputs
        ]
        with jax.set_mesh(mesh), backend.use("tpu", "v5p"):
            programs.append(compiled(jax.jit(function), *placed))
    assert_divided(*programs, 0.26, 0.4)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_long_rows_equal_the_plain_form(name):
    """8192 tokens with the blocks of the chips; a kernel can be right at small sizes and wrong at large ones."""
    shape = {"ssd": (4, 64, 1, 128), "ssd of scaled values": (4, 64, 1, 128), "delta rule": (2, 128, 128)}[
        name
    ]
    *before, first, state = KERNELS[name][0](1, 8192, *shape)
    first = jnp.zeros_like(first).at[:, jnp.array([1, 2, 3000, 3001, 8191])].set(True)
    inputs = (*before, first, state)
    wanted, (function, _) = jit(KERNELS[name][2])(*inputs), public(name, inputs)
    with backend.use("tpu", "v5p", interpret=True):
        assert_close(jit(function)(*inputs), wanted, 1e-5)

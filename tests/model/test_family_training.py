"""Every family starts, learns, and is split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from model import MESH_AXES, ShardingRules, init, load_config, logical_axes, param_shapes
from model.families import FAMILIES
from tests.meshes import assert_divided, compiled

from .conftest import GOLDENS, applied, compiled_fast
from .test_families import CHECKPOINTS, config_of

ONE_EACH = {config_of(GOLDENS / name)["model_type"]: name for name in CHECKPOINTS}
QUICK = ("gemma2",)
every_family = pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in sorted(ONE_EACH)]
)
MESH = {"fsdp": 2, "expert": 2, "tensor": 2}
WHOLE = (
    "conv_B",
    "conv_C",
)  # a few numbers for each group of Mamba-2's heads: groups are too few to be split


def config_for(family):
    """One of each kind of block, since most of the time here is compiling."""
    cfg = load_config(GOLDENS / ONE_EACH[family]).replace(dtype="float32", param_dtype="float32")
    return cfg.replace(blocks=tuple(dict.fromkeys(cfg.blocks)))


def loss(cfg, params, tokens):
    encoder = {"encoder_tokens": tokens[:, :-5]} if cfg.encoder else {}
    out = applied(cfg, params, tokens[:, :-1], **encoder)
    nll = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens[:, 1:]).mean()
    return nll + (out.aux["loss"].mean() if "loss" in out.aux else 0.0)


def batch(cfg):
    return jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (4, 17)), jnp.int32)


@every_family
def test_a_fresh_model_learns_one_batch_in_three_steps(family):
    cfg = config_for(family)
    params, optimizer, tokens = init(cfg, jax.random.key(0)), optax.adam(3e-3), batch(cfg)
    state = optimizer.init(params)

    @compiled_fast
    def step(params, state):
        value, grads = jax.value_and_grad(loss, argnums=1)(cfg, params, tokens)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value, optax.global_norm(grads)

    losses = []
    for _ in range(4):
        params, state, value, norm = step(params, state)
        losses.append(float(value))
        assert np.isfinite(norm) and norm > 0
    assert losses[0] > losses[1] > losses[2] > losses[3]


def split(names, shape, mesh, rules):
    """The spec of a parameter, whole along the axes that do not divide."""
    spec = []
    for name, size in zip(names, shape, strict=True):
        axes = getattr(rules, name) if name else ()
        spec.append(axes if axes and size % ways(axes, mesh) == 0 else None)
    return PartitionSpec(*spec)


def ways(axes, mesh):
    """How many parts a spec's entry makes; it is a name, a tuple of names or None."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return int(np.prod([mesh.shape[name] for name in names]))


@every_family
def test_a_model_on_eight_devices_has_every_matrix_split_and_the_same_loss(family):
    cfg, rules = config_for(family), ShardingRules()
    mesh = jax.make_mesh(
        [MESH.get(axis, 1) for axis in MESH_AXES],
        MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES),
    )
    is_names = lambda x: isinstance(x, tuple)
    specs = jax.tree.map(
        lambda names, leaf: split(names, leaf.shape, mesh, rules),
        logical_axes(cfg),
        param_shapes(cfg),
        is_leaf=is_names,
    )

    def check(path, spec, leaf):
        if leaf.ndim >= 2 and not path[-1].key.startswith(WHOLE):
            assert any(ways(axes, mesh) > 1 for axes in spec), (
                f"{jax.tree_util.keystr(path)} {leaf.shape} is whole on every device"
            )

    jax.tree_util.tree_map_with_path(
        check, specs, param_shapes(cfg), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    params, tokens = init(cfg, jax.random.key(0)), batch(cfg)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    step = compiled_fast(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    one = compiled(step, cfg, params, tokens)
    alone, _ = one(params, tokens)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        program = compiled(step, cfg, placed, tokens)
        value, grads = program(placed, tokens)
    assert_divided(one, program, 0.5, 0.9)
    np.testing.assert_allclose(value, alone, rtol=2e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_every_family_is_among_them():
    assert set(ONE_EACH) | {"kimi_k2"} == set(FAMILIES)

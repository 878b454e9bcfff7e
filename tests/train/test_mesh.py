"""Meshes: each axis divides a device's work, rows follow the sharding, and the optimizer's state its parameters."""

import dataclasses
import functools
import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from configs import ConfigError
from model import MESH_AXES, ShardingRules, decoder, init, param_shapes
from model.kernels import backend
from tests.conftest import ROOT
from tests.model.tpu import needs_libtpu
from tests.policy import language_modelling
from train.algorithms import LanguageModelling
from train.config import MeshSpec
from train.mesh import check_mesh, make_mesh, param_shardings, place_batch, rows_here, state_shardings
from train.optimizers import Adafactor, Lion, Muon, make_optimizer
from train.presets import Mixture
from train.schedules import Constant
from train.step import accumulate, make_train_step, new_state

from .test_step import packed_batch

RULES = ShardingRules()
DENSE = decoder(64, 64, 2, 8, 8, 8, 128)
MOE = Mixture(ffn_width=64).put_into(DENSE)


def mesh_of(**axes):
    count = int(np.prod(list(axes.values())))
    return make_mesh(MeshSpec(**{"data": 1} | axes), jax.devices()[:count])


@functools.cache
def compiled(cfg, **axes):
    """The gradient of a loss on such a mesh."""
    mesh = mesh_of(**axes)
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            param_shapes(cfg),
            param_shardings(cfg, mesh, RULES),
        )
        rows = NamedSharding(mesh, RULES.spec(("batch",)))
        batch = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=rows) for k, v in packed_batch(8, 64).items()
        }
        gradient = jax.jit(lambda p, b: accumulate(language_modelling(cfg, RULES), p, b, 1, RULES))
        return gradient.lower(params, batch).compile()


SPLITS = [("data", 2), ("data", 4), ("fsdp", 2), ("fsdp", 4), ("tensor", 2), ("tensor", 4)]


@pytest.mark.parametrize(("axis", "ways"), SPLITS)
@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
def test_an_axis_divides_the_flops_and_bytes_of_a_device(cfg, axis, ways):
    alone, split = (program.cost_analysis() for program in (compiled(cfg), compiled(cfg, **{axis: ways})))
    share = {figure: split[figure] / alone[figure] for figure in ("flops", "bytes accessed")}
    assert share["flops"] < 1.2 / ways
    # over tensor the residual stream is whole on each device
    assert share["bytes accessed"] < (1.6 / ways if axis != "tensor" else 0.5 + 0.75 / ways)
    if axis != "tensor":  # rows, and the tokens of a mixture of experts, stay where they are
        program = compiled(cfg, **{axis: ways}).as_text()
        assert not re.findall(r" collective-permute(?:-start)?\(", program)


def test_the_axis_of_experts_divides_what_a_device_holds_of_them():
    alone, split = compiled(MOE), compiled(MOE, expert=4)
    sizes = jax.tree.map(lambda x: x.size * x.dtype.itemsize, param_shapes(MOE))
    experts = sum(sum(jax.tree.leaves(sizes[f"block_{i}"]["ffn"]["experts"])) for i in range(2))
    saved = alone.memory_analysis().argument_size_in_bytes - split.memory_analysis().argument_size_in_bytes
    assert saved == experts * 3 // 4


@pytest.mark.parametrize(
    ("cfg", "axes", "said"),
    [
        (DENSE, {"stage": 2}, "config.mesh.stage=2 splits no work: blocks are not yet handed"),
        (MOE, {"stage": 2}, "config.mesh.stage=2 splits no work"),
        (DENSE, {"expert": 2}, "config.mesh.expert=2 splits no work: this model has no experts"),
        (DENSE, {"context": 2}, "config.mesh.context=2 splits no work: only the attention kernel for TPUs"),
    ],
)
def test_an_axis_that_splits_nothing_is_refused(cfg, axes, said):
    with pytest.raises(ConfigError, match=said):
        check_mesh(cfg, mesh_of(**axes), RULES)


def test_axes_that_split_something_are_not_refused():
    check_mesh(MOE, mesh_of(data=2, expert=2, tensor=2), RULES)
    check_mesh(DENSE, mesh_of(expert=2), dataclasses.replace(RULES, batch=("data", "fsdp", "expert")))
    with backend.use("tpu"):
        check_mesh(DENSE, mesh_of(context=2), RULES)


OPTIMIZERS = {"muon": Muon(), "adafactor": Adafactor(b1=0.9, min_factored=8), "lion": Lion()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_of_a_parameter_is_split_as_that_is(name):
    mesh = mesh_of(fsdp=4, tensor=2)
    optimizers = {"policy": make_optimizer(OPTIMIZERS[name], Constant(0), 10, DENSE)}
    make = lambda p: new_state({"policy": p}, optimizers)
    with jax.set_mesh(mesh):
        places = param_shardings(DENSE, mesh, RULES)
        params = jax.tree.map(jax.device_put, init(DENSE, jax.random.key(0)), places)
        layout = state_shardings(jax.eval_shape(make, params), {"policy": places}, mesh)
        state = jax.jit(make, out_shardings=layout)(params)
        train_step = make_train_step(LanguageModelling(), {"policy": DENSE}, optimizers, 1, RULES)
        step = jax.jit(train_step, out_shardings=(layout, None))
        state, metrics = step(state, {}, place_batch(packed_batch(), mesh, RULES))
    assert np.isfinite(float(metrics["loss"].mean()))
    for x in sorted(jax.tree.leaves(state.opt_state), key=lambda x: x.size)[-8:]:
        assert x.addressable_shards[0].data.size * 4 <= x.size, x.shape  # over fsdp at least
    step = jax.jit(make_train_step(LanguageModelling(), {"policy": DENSE}, optimizers))
    alone = step(make(jax.device_get(params)), {}, packed_batch())[0].params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), state.params, alone)


def hosts(topology, **axes):
    """A mesh of a slice of several hosts of four chips."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sizes = tuple(axes.get(name, 1) for name in MESH_AXES)
    by_host = sorted(devices, key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(by_host).reshape(sizes), MESH_AXES)


@needs_libtpu
@pytest.mark.parametrize(
    ("axes", "wanted"),
    [
        ({"data": 16}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"fsdp": 4, "tensor": 4}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 2, "tensor": 8}, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two hosts have the same rows
        ({"tensor": 16}, [(0, 1)] * 4),
    ],
)
def test_hosts_load_the_rows_that_their_devices_have(axes, wanted):
    mesh = hosts("v5p:2x2x4", **axes)
    found = [rows_here(mesh, RULES, 32, process) for process in range(4)]
    assert found == wanted
    sharding = NamedSharding(mesh, RULES.spec(("batch",)))
    for device, (rows,) in sharding.devices_indices_map((32,)).items():
        index, count = found[device.process_index]
        start, stop, _ = rows.indices(32)
        assert index * 32 // count <= start and stop <= (index + 1) * 32 // count


def test_one_process_loads_all_rows():
    assert rows_here(mesh_of(fsdp=4, tensor=2), RULES, 8) == (0, 1)
    placed = place_batch(packed_batch(), mesh_of(data=4), RULES)
    np.testing.assert_array_equal(placed["tokens"], packed_batch()["tokens"])
    assert jnp.asarray(placed["tokens"]).sharding.shard_shape((8, 16)) == (2, 16)


HOST = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from model import ShardingRules
from train.config import MeshSpec
from train.mesh import make_mesh, place_batch, rows_here
whole = np.arange(48).reshape(16, 3)
for axes, parts in (({"data": 4, "tensor": 2}, 2), ({"data": 1, "tensor": 8}, 1), ({"data": 2, "fsdp": 4}, 2)):
    mesh = make_mesh(MeshSpec(**axes))
    index, count = rows_here(mesh, ShardingRules(), 16)
    assert count == parts, (axes, index, count)
    placed = place_batch({"tokens": whole[index * 16 // count : (index + 1) * 16 // count]}, mesh, ShardingRules())
    assert placed["tokens"].shape == whole.shape
    for shard in placed["tokens"].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
print("placed")
"""


def test_two_processes_place_the_rows_of_one_batch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    start = lambda i: subprocess.Popen(
        [sys.executable, "-c", HOST, port, str(i)], cwd=ROOT, env=environment, stdout=-1, stderr=-2, text=True
    )
    said = [process.communicate(timeout=200)[0] for process in [start(0), start(1)]]
    assert all("placed" in text for text in said), said

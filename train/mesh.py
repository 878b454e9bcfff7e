"""The mesh, and the placement of a train state and of batches on it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs import ConfigError
from model import MESH_AXES, ModelConfig, ShardingRules, logical_axes, param_shapes
from model.blocks.moe import MoE
from model.function import Params
from model.kernels import backend
from model.readouts.mtp import mtp_blocks
from model.sharding import check_divisible, named_sharding
from model.weights import is_quantized, shardings_like
from train.config import MeshSpec

_log = logging.getLogger(__name__)


def make_mesh(spec: MeshSpec, devices: list | None = None) -> Mesh:
    """The mesh over all devices, axes data, fsdp, stage, context, expert, tensor.

    Raises:
      ConfigError: the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(spec)
    free = [name for name in MESH_AXES if sizes[name] == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shown = ", ".join(f"{name}={sizes[name]}" for name in MESH_AXES)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"mesh {shown}: sizes are at least 1, and at most one axis may be -1.")
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise ConfigError(
            f"mesh {shown} asks for {'a multiple of ' if free else ''}{fixed} devices, and there are {len(devices)}. "
            "Set config.mesh.data=-1 to use all remaining devices."
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes[name] for name in MESH_AXES)
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except AssertionError:  # v4 with two devices a chip: jax has no order of these for a torus
        _log.warning("mesh %s: devices are used in the platform's order.", shown)
        return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=types)
    except NotImplementedError:  # as of 64 by 4 on a torus of 16 by 16
        _log.info("mesh %s: an axis of the slice's torus is divided among axes of the mesh.", shown)
        placed = create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=types)


def param_shardings(cfg: ModelConfig, mesh: Mesh, rules: ShardingRules) -> Params:
    """A `NamedSharding` for each parameter. Raises ValueError that names an axis that does not divide."""
    axes = logical_axes(cfg)
    check_divisible(param_shapes(cfg), axes, rules, mesh)
    return jax.tree.map(
        lambda names: named_sharding(mesh, rules, names), axes, is_leaf=lambda x: isinstance(x, tuple)
    )


def check_mesh(cfg: ModelConfig, mesh: Mesh, rules: ShardingRules) -> None:
    """Every axis of the mesh splits work of this model.

    Raises:
      ConfigError: the devices of an axis would all compute the same; names the axes to use instead.
    """
    blocks = [block for stack in cfg.stacks for block in stack.blocks] + list(mtp_blocks(cfg.mtp).values())
    has_experts = any(isinstance(network, MoE) for block in blocks for network in block.networks)
    reasons = {
        "stage": "blocks are not yet handed from stage to stage",
        "expert": None if has_experts else "this model has no experts",
        "context": None
        if backend.current().name == "tpu"
        else "only the attention kernel for TPUs splits the tokens of a row",
    }
    for axis, reason in reasons.items():
        size = mesh.shape.get(axis, 1)
        if size > 1 and reason is not None and axis not in (*rules.batch, *rules.embed, *rules.mlp):
            raise ConfigError(
                f"config.mesh.{axis}={size} splits no work: {reason}, so {size} devices would compute the same. Set "
                f"config.mesh.{axis}=1, and give these devices to data, fsdp or tensor."
            )


def rows_here(mesh: Mesh, rules: ShardingRules, rows: int, process: int | None = None) -> tuple[int, int]:
    """(index, count): this process loads part `index` of `count` equal parts of a batch's rows.

    Processes load the same part if their devices have the same rows, for example if `tensor` spans two hosts.

    Args:
      process: default: this one.

    Raises:
      ConfigError: a process' rows are not one such part.
    """
    process = jax.process_index() if process is None else process
    sharding = NamedSharding(mesh, rules.spec(("batch",)))
    taken: dict[int, set[tuple[int, int]]] = {}
    for device, (device_rows,) in sharding.devices_indices_map((rows,)).items():
        start, stop, _ = device_rows.indices(rows)
        taken.setdefault(device.process_index, set()).add((start, stop))
    size = rows // len({min(spans) for spans in taken.values()})
    first = min(start for start, _ in taken[process])
    for spans in taken.values():
        covered = sorted({row for start, stop in spans for row in range(start, stop)})
        if covered[0] % size or covered != list(range(covered[0], covered[0] + size)):
            raise ConfigError(
                f"the hosts' devices have rows {sorted(taken[process])} and others of {rows}, which are not equal "
                "parts in a row each. Order config.mesh so that data and fsdp are spread over hosts first."
            )
    return first // size, rows // size


def state_shardings(state: Any, layouts: Mapping[str, Params], mesh: Mesh) -> Any:
    """Shardings of a whole `train.step.State`, given with shapes: all that belongs to a parameter is split like it.

    Args:
      layouts: the shardings of each role's parameters.
    """
    like = lambda tree, role: shardings_beside(tree, state.params[role], layouts[role], mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    return dataclasses.replace(
        state,
        step=whole,
        rng=whole,
        params={role: shardings_like(params, layouts[role]) for role, params in state.params.items()},
        opt_state={role: like(tree, role) for role, tree in state.opt_state.items()},
        extra={name: like(tree, "policy") for name, tree in state.extra.items()},
    )


def shardings_beside(tree: Any, params: Params, shardings: Params, mesh: Mesh) -> Any:
    """Shardings of a tree of arrays beside a model's parameters, such as an optimizer's state.

    An array belongs to the parameter with the longest path that ends the array's path. An array with fewer axes, such
    as a factored second moment, is split along the axes that it has.
    """
    known = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)}
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    shapes = {_keys(path): leaf.shape for path, leaf in flat}
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        keys = _keys(path)
        for start in range(len(keys)):
            if (name := keys[start:]) in known:
                return _like(known[name], shapes[name], leaf.shape, mesh)
        return whole

    return jax.tree_util.tree_map_with_path(place, tree)


def _keys(path: tuple) -> tuple[str, ...]:
    """The dict keys along a path, without fields and tuple indices."""
    return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def _like(
    sharding: NamedSharding, shape: tuple[int, ...], wanted: tuple[int, ...], mesh: Mesh
) -> NamedSharding:
    """The sharding of an array with some of a parameter's axes, in their order."""
    spec, axes = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))], iter(enumerate(shape))
    found = [next((spec[i] for i, n in axes if n == size), None) for size in wanted]
    return NamedSharding(mesh, PartitionSpec(*found))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, rules: ShardingRules) -> dict[str, jax.Array]:
    """The global batch, made of each process' rows (see `rows_here`)."""
    sharding = NamedSharding(mesh, rules.spec(("batch",)))
    ways = math.prod(mesh.shape[axis] for axis in rules.batch)
    rows = len(next(iter(batch.values()))) * rows_here(mesh, rules, ways)[1]
    return {
        k: jax.make_array_from_process_local_data(sharding, v, (rows, *v.shape[1:])) for k, v in batch.items()
    }

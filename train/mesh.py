"""The mesh, and the placement of a train state and of batches on it."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs import ConfigError
from model import MESH_AXES, ModelConfig, ShardingRules, logical_axes, param_shapes
from model.adapters import split_trained
from model.function import Params
from model.sharding import check_divisible, named_sharding
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
            "Set config.mesh.data=-1 to use what is left."
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes[name] for name in MESH_AXES)
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # as of 64 by 4 on a torus of 16 by 16
        _log.info("mesh %s: an axis of the slice's torus is divided among axes of the mesh.", shown)
        placed = create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=types)


def param_shardings(cfg: ModelConfig, mesh: Mesh, rules: ShardingRules) -> Params:
    """A `NamedSharding` for each parameter; an axis that does not divide is an error that names it."""
    axes = logical_axes(cfg)
    check_divisible(param_shapes(cfg), axes, rules, mesh)
    return jax.tree.map(
        lambda names: named_sharding(mesh, rules, names), axes, is_leaf=lambda x: isinstance(x, tuple)
    )


def state_shardings(abstract_state: Any, shardings: Params, mesh: Mesh) -> Any:
    """Shardings of a whole train state: whatever has the tree of the parameters, or of those that are trained, is laid
    out like them."""
    layouts = {jax.tree.structure(tree): tree for tree in (shardings, split_trained(shardings)[0])}
    whole = NamedSharding(mesh, PartitionSpec())
    of = lambda x: layouts.get(jax.tree.structure(x))
    return jax.tree.map(lambda x: of(x) or whole, abstract_state, is_leaf=lambda x: of(x) is not None)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, rules: ShardingRules) -> dict[str, jax.Array]:
    """This host's rows as its part of the global batch."""
    sharding = NamedSharding(mesh, rules.spec(("batch",)))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

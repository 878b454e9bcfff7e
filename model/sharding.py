"""Sharding is a table that maps logical axis names of parameters and activations to mesh axes.

Layers name their axes ("embed", "heads", "batch"); `ShardingRules` maps each name to mesh axes. To change the
parallelism, change the table and the mesh, never a layer.
"""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.typed import ConfigError

MESH_AXES = ("data", "fsdp", "stage", "context", "expert", "tensor")

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that split each logical axis; (): every device has the whole axis."""

    # activations
    batch: Axes = ("data", "fsdp")
    length: Axes = ("context",)
    act_embed: Axes = ()
    act_heads: Axes = ("tensor",)
    act_kv_heads: Axes = ("tensor",)
    act_mlp: Axes = ("tensor",)
    act_vocab: Axes = ("tensor",)
    act_experts: Axes = ("expert",)
    # the cache
    pages: Axes = ()
    slots: Axes = ()
    rows: Axes = ()
    # parameters
    vocab: Axes = ("tensor",)
    embed: Axes = ("fsdp",)
    heads: Axes = ("tensor",)
    kv_heads: Axes = ("tensor",)
    head_dim: Axes = ()
    mlp: Axes = ("tensor",)
    experts: Axes = ("expert",)
    norm: Axes = ()
    adapters: Axes = ()
    layers: Axes = ("stage",)

    def spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
        """The `PartitionSpec` of logical names, one for each array axis (None: whole)."""
        return PartitionSpec(*(self._mesh_axes(name) for name in names))

    def _mesh_axes(self, name: str | None) -> Axes | None:
        if name is None:
            return None
        axes = getattr(self, name, None)
        if axes is None:
            known = ", ".join(f.name for f in dataclasses.fields(self))
            raise ValueError(f"ShardingRules has no logical axis {name!r}. Known axes: {known}.")
        return axes or None


def constrain(x: jax.Array, rules: ShardingRules | None, *names: str | None) -> jax.Array:
    """Constrain the sharding of an activation on the mesh of `jax.set_mesh`; the identity without rules."""
    if rules is None:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(names))


def named_sharding(mesh: Mesh, rules: ShardingRules, names: tuple[str | None, ...]) -> NamedSharding:
    return NamedSharding(mesh, rules.spec(names))


def check_divisible(shapes, axes, rules: ShardingRules, mesh: Mesh) -> None:
    """Check that the devices divide every array axis that they split.

    Args:
      shapes: tree of arrays or ShapeDtypeStructs.
      axes: the same tree with a tuple of logical names at each leaf (see `model.logical_axes`).

    Raises:
      ConfigError: names the parameter, its axis, the mesh axes and possible sizes.
    """

    def check(path, names, leaf):
        for name, size in zip(names, leaf.shape, strict=True):
            mesh_axes = getattr(rules, name) if name else ()
            ways = math.prod(mesh.shape[a] for a in mesh_axes)
            if size % ways:
                fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0 and n <= 4 * ways)
                raise ConfigError(
                    f"mesh axes {'*'.join(mesh_axes)} = {ways} do not divide the axis {name!r} ({size}) of parameter "
                    f"{jax.tree_util.keystr(path)}. Use one of {fitting}, or keep the axis whole with "
                    f"sharding.{name}=()."
                )

    jax.tree_util.tree_map_with_path(check, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))

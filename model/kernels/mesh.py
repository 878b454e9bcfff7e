"""Kernels on a mesh: the compiler cannot split a kernel, so each device gets its part explicitly.

`mesh_axes` returns the axes of `jax.set_mesh`, `split_by` those that split logical names, `check_divides` raises an
error with sizes that fit, and `on_mesh` runs a function on each device's parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType

from model.sharding import Axes, ShardingRules


def mesh_axes() -> frozenset[str]:
    """The axes of the current mesh that no surrounding `shard_map` uses; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual)


def split_by(rules: ShardingRules | None, *names: str) -> tuple[Axes, ...]:
    """The axes of `mesh_axes` that split each logical name; none without rules."""
    free = mesh_axes()
    return tuple(tuple(axis for axis in getattr(rules, name, ()) if axis in free) for name in names)


def ways(axes: Axes) -> int:
    """The number of parts that these axes of the current mesh make."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in axes)


def on_mesh(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on each device's parts; `function` itself without a mesh."""
    free = mesh_axes()
    if not free:
        return function
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=set(free), check_vma=False
    )


class Size(NamedTuple):
    """A size that mesh axes must divide."""

    count: int
    what: str  # "heads"
    rule: str  # the field of `ShardingRules` that splits it


def check_divides(axes: Axes, size: Size, shared: bool = False) -> None:
    """Raises ValueError if the axes do not divide a size; it names the numbers of devices that do.

    Args:
      shared: devices may share a part: their number may also be a multiple of the size.
    """
    parts = ways(axes)
    fits = lambda n: size.count % n == 0 or (shared and n % size.count == 0)
    if fits(parts):
        return
    problem = "do not divide" if not shared else "neither divide nor are a multiple of"
    fitting = ", ".join(str(n) for n in range(1, jax.sharding.get_abstract_mesh().size + 1) if fits(n))
    raise ValueError(
        f"mesh axes {'*'.join(axes)} = {parts} {problem} the {size.count} {size.what}. Use axes of {fitting} devices, "
        f"a multiple of {parts} {size.what}, or sharding.{size.rule}=(), which keeps them whole."
    )

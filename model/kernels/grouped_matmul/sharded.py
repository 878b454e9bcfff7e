"""Grouped products on a mesh.

Each device sorts its own tokens. If the mesh splits experts, or the width of experts, several devices share tokens.
Each multiplies the rows of its own experts or channels, and the outputs for each token are summed at the end. Devices
exchange only matrices, gathered over `fsdp`, and these sums: of outputs in the forward pass, of gradients in the
backward pass.
"""

# B batch, T tokens, M rows (pairs of a token and an expert), I inputs, O outputs, E experts

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.kernels import backend, mesh
from model.kernels.grouped_matmul import grouped_matmul
from model.sharding import Axes, ShardingRules


@dataclasses.dataclass(frozen=True)
class Split:
    """The mesh axes that split tokens and experts; empty if the compiler splits the work."""

    axes: frozenset[str] = frozenset()
    batch: Axes = ()
    length: Axes = ()
    experts: Axes = ()
    rules: ShardingRules | None = None

    @property
    def tokens(self) -> PartitionSpec:
        """Of arrays [B, T, ...]."""
        return PartitionSpec(self.batch, self.length)

    @property
    def rows(self) -> PartitionSpec:
        """Of arrays [M, ...], and of the sizes [E] of each device's groups."""
        return PartitionSpec((*self.batch, *self.length, *self.parts))

    @property
    def parts(self) -> Axes:
        """The axes of devices that share tokens; each device computes a part of these tokens' sums."""
        return (*self.experts, *self.width("mlp"))

    def width(self, name: str | None) -> Axes:
        """The axes that split an axis of the matrices, except those that split tokens or experts."""
        taken = {*self.batch, *self.length, *self.experts}
        return tuple(a for a in getattr(self.rules, name or "", ()) if a in self.axes and a not in taken)

    def gathers(self, name: str | None) -> bool:
        """Whether each device gathers an axis of the matrices before the product."""
        sizes = jax.sharding.get_abstract_mesh().shape
        axes = (axis for axis in getattr(self.rules, name or "", ()) if axis in self.axes)
        return any(sizes[axis] > 1 and axis not in self.width(name) for axis in axes)

    def experts_here(self, num_experts: int) -> tuple[jax.Array | int, int]:
        """(the first, how many)."""
        count = num_experts // math.prod(jax.lax.axis_size(axis) for axis in self.experts)
        return (jax.lax.axis_index(self.experts) * count if self.experts else 0), count

    def run(self, function: Callable, in_specs, out_specs) -> Callable:
        """`function` on each device's parts."""
        return mesh.on_mesh(function, in_specs, out_specs) if self.axes else function


def split_of(rules: ShardingRules | None, B: int, T: int) -> Split:
    """How the mesh set with `jax.set_mesh` splits B rows of T tokens: each device sorts its own.

    Devices that split a row's tokens all have the token of a row with one token, as in decoding. If an axis splits
    tokens and experts, the experts are gathered; there is no all-to-all of tokens.

    Args:
      rules: None: every device of the mesh computes everything; without kernels the compiler decides.

    Raises:
      ValueError: the devices do not divide the rows or the tokens.
    """
    free = mesh.mesh_axes()
    if not free or (rules is None and backend.current().name != "tpu"):
        return Split()
    if rules is None:
        return Split(free)
    batch, length, experts = mesh.split_by(rules, "batch", "length", "experts")
    mesh.check_divides(batch, mesh.Size(B, "rows of the batch", "batch"))
    if T > 1:
        mesh.check_divides(length, mesh.Size(T, "tokens of a row", "length"))
    else:
        length = ()
    experts = tuple(axis for axis in experts if axis not in (*batch, *length))
    return Split(free, batch, length, experts, rules)


def grouped_on_mesh(
    split: Split,
    x_MI: jax.Array,
    w_EIO: jax.Array,
    sizes_E: jax.Array,
    names: tuple[str | None, str | None],
) -> jax.Array:
    """`grouped_matmul` of each device's rows and experts.

    Args:
      names: logical names of the axes I and O of `w`. A device has the channels of its rows for the axis "mlp", so
        outputs of a map from "mlp" are partial sums.
    """
    inputs, outputs = (split.width(name) for name in names)
    x_inputs, y_outputs = (split.width(name) if name != "mlp" else () for name in names)
    # A matrix gathered along its last axis would arrive in pieces of a few channels, which need a copy.
    transposed = split.gathers(names[1]) and not split.gathers(names[0])

    def part(x_MI, w_EIO, sizes_E):
        w_EIO = w_EIO.swapaxes(1, 2) if transposed else w_EIO
        y_MO = grouped_matmul(x_MI, w_EIO, sizes_E, transposed)
        return jax.lax.psum(y_MO, x_inputs) if x_inputs else y_MO

    in_specs = PartitionSpec(*split.rows, x_inputs), PartitionSpec(split.experts, inputs, outputs), split.rows
    return split.run(part, in_specs, PartitionSpec(*split.rows, y_outputs))(x_MI, w_EIO, sizes_E)


def spread_on_mesh(split: Split, vectors_EO: jax.Array, expert_M: jax.Array, name: str) -> jax.Array:
    """[M, O]: the vector of each row's expert; any vector for rows of other devices' experts.

    Args:
      name: the logical name of the axis O.
    """
    outputs = split.width(name)
    pick = lambda vectors_EO, expert_M: vectors_EO[jnp.minimum(expert_M, len(vectors_EO) - 1)]
    in_specs = PartitionSpec(split.experts, outputs), split.rows
    y_outputs = outputs if name != "mlp" else ()
    return split.run(pick, in_specs, PartitionSpec(*split.rows, y_outputs))(vectors_EO, expert_M)


def first_part_on_mesh(split: Split, y_MO: jax.Array) -> jax.Array:
    """A summand for partial sums: the value in the first part, zeros in the others."""
    widths = split.width("mlp")
    if not widths:
        return y_MO
    own = lambda y_MO: jnp.where(jax.lax.axis_index(widths) == 0, y_MO, 0)
    return split.run(own, split.rows, split.rows)(y_MO)

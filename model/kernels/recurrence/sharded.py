"""Recurrences on a mesh: the compiler can't cut a kernel, so each device is given its rows and heads by hand.

Rows and heads need nothing of each other. A row's tokens follow one another, so where the mesh splits them each device
is given all, and computes what the others compute.
"""

# B batch, T tokens, H heads in G groups of R, P value width, N key (state) width; K key width, V value width

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from model.kernels import backend
from model.kernels.delta_rule import tpu as delta_tpu
from model.kernels.recurrence.tpu_chunks import Sizes
from model.kernels.ssd import tpu as ssd_tpu
from model.sharding import Axes, ShardingRules

Results = tuple[jax.Array, jax.Array]


def ssd_on_mesh(
    v_BTHP: jax.Array,
    log_decay_BTH: jax.Array,
    k_BTGN: jax.Array,
    q_BTGN: jax.Array,
    first_BT: jax.Array,
    state_BHPN: jax.Array,
    scale_BTH: jax.Array | None,
    rules: ShardingRules | None,
) -> Results:
    """`ssd_tpu.ssd` on the mesh set with `jax.set_mesh`; without one, on one device.

    Args:
      rules: None: every device of the mesh computes the whole.
    """
    split = _split(rules, v_BTHP.shape[0], v_BTHP.shape[2])
    G = k_BTGN.shape[2]
    whole_keys = split.ways > 1 and G % split.ways != 0
    if whole_keys and split.ways % G:
        raise ValueError(
            f"mesh axes {'*'.join(split.heads)} = {split.ways} neither divide the {G} groups of heads nor are a "
            "multiple of them. Use another size, or sharding.act_heads=()."
        )
    kernel = functools.partial(ssd_tpu.ssd, **_options(ssd_tpu.SIZES))

    def part(v_BTHP, log_decay_BTH, k_BTGN, q_BTGN, *others):
        if whole_keys:  # a device's heads are of one group
            group = jax.lax.axis_index(split.heads) * G // split.ways
            k_BTGN, q_BTGN = (jax.lax.dynamic_slice_in_dim(x, group, 1, axis=2) for x in (k_BTGN, q_BTGN))
        return kernel(v_BTHP, log_decay_BTH, k_BTGN, q_BTGN, *others)

    tokens = PartitionSpec(split.batch, None, split.heads)
    keys = PartitionSpec(split.batch, None, () if whole_keys else split.heads)
    rows, states = PartitionSpec(split.batch), PartitionSpec(split.batch, split.heads)
    run = split.run(part, (tokens, tokens, keys, keys, rows, states, tokens))
    return run(v_BTHP, log_decay_BTH, k_BTGN, q_BTGN, first_BT, state_BHPN, scale_BTH)


def delta_on_mesh(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_BTH: jax.Array,
    beta_BTH: jax.Array,
    first_BT: jax.Array,
    state_BHKV: jax.Array,
    rules: ShardingRules | None,
) -> Results:
    """`delta_tpu.delta_rule` likewise."""
    split = _split(rules, v_BTHV.shape[0], v_BTHV.shape[2])
    tokens = PartitionSpec(split.batch, None, split.heads)
    specs = (tokens,) * 5 + (PartitionSpec(split.batch), PartitionSpec(split.batch, split.heads))
    kernel = functools.partial(delta_tpu.delta_rule, **_options(delta_tpu.SIZES))
    return split.run(kernel, specs)(q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH, first_BT, state_BHKV)


@dataclasses.dataclass(frozen=True)
class _Split:
    """The axes of the mesh that split rows and heads."""

    mesh: frozenset[str]
    batch: Axes = ()
    heads: Axes = ()
    ways: int = 1  # into how many parts heads are split

    def run(self, function: Callable[..., Results], in_specs) -> Callable[..., Results]:
        """`function` of what each device has, giving values of tokens and states."""
        if not self.mesh:
            return function
        out_specs = PartitionSpec(self.batch, None, self.heads), PartitionSpec(self.batch, self.heads)
        return jax.shard_map(
            function, in_specs=in_specs, out_specs=out_specs, axis_names=self.mesh, check_vma=False
        )


def _split(rules: ShardingRules | None, B: int, H: int) -> _Split:
    mesh = jax.sharding.get_abstract_mesh()
    ours = frozenset(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual)
    if not ours or rules is None:
        return _Split(ours)
    ways = lambda axes: math.prod(mesh.shape[axis] for axis in axes)
    batch, heads = (tuple(axis for axis in axes if axis in ours) for axes in (rules.batch, rules.act_heads))
    if H % ways(heads):
        raise ValueError(
            f"mesh axes {'*'.join(heads)} = {ways(heads)} do not divide the {H} heads. Use another size, or "
            "sharding.act_heads=()."
        )
    if B % ways(batch):
        raise ValueError(
            f"mesh axes {'*'.join(batch)} = {ways(batch)} do not divide the {B} rows of the batch. Give a multiple of "
            f"{ways(batch)}, or sharding rules that keep them whole."
        )
    return _Split(ours, batch, heads, ways(heads))


def _options(sizes: dict[str, Sizes]) -> dict:
    chosen = backend.current()
    return {"sizes": sizes[chosen.chip] if chosen.chip else Sizes(), "interpret": chosen.interpret}

"""Flash attention on a mesh: the compiler can't cut a kernel, so each device is given its part by hand.

Rows and heads are split and need nothing of each other. Where a row's tokens are split as well, each device has some
of the queries and is given the keys and values of the whole row, as in Llama 3, arXiv:2407.21783, section 3.3.2.
"""

# B batch, T queries, S keys, H query heads, K key/value heads, C width of a query and a key, E width of a value

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from model.kernels.attention.tpu import flash_attention
from model.sharding import ShardingRules


def flash_on_mesh(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    ids_BT: jax.Array | None,
    rules: ShardingRules | None,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """`flash_attention` of tokens among themselves, on the mesh set with `jax.set_mesh`; without one, on one device.

    Args:
      rules: None: every device of the mesh computes the whole.
      options: those of `flash_attention`.
    """
    split = _split(rules)
    if split is None:
        return flash_attention(q_BTHC, k_BTKC, v_BTKE, ids_BT, ids_BT, **options)
    ours, batch, length, heads, kv_heads = split
    part = functools.partial(_part, length, () if kv_heads else heads, options)
    keys = PartitionSpec(batch, None, kv_heads, None)
    return jax.shard_map(
        part,
        in_specs=(PartitionSpec(batch, length, heads, None), keys, keys)
        + (PartitionSpec(batch, length), PartitionSpec(batch, None)),
        out_specs=(PartitionSpec(batch, length, heads, None), PartitionSpec(batch, heads, length)),
        axis_names=ours,
        check_vma=False,
    )(q_BTHC, k_BTKC, v_BTKE, ids_BT, ids_BT)


def on_mesh(
    attend: Callable[..., jax.Array],
    rules: ShardingRules | None,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    ids_BT: jax.Array | None,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """`attend(q, k, v, ids, sinks)` [B, T, H, E] of whole rows, on the mesh set with `jax.set_mesh`."""
    split = _split(rules)
    if split is None:
        return attend(q_BTHC, k_BTKC, v_BTKE, ids_BT, sinks_H)
    ours, batch, _, heads, kv_heads = split

    def part(q_BTHC, k_BTKC, v_BTKE, ids_BT, sinks_H):
        return attend(q_BTHC, *_of_heads(() if kv_heads else heads, k_BTKC, v_BTKE), ids_BT, sinks_H)

    queries, keys = (PartitionSpec(batch, None, axes, None) for axes in (heads, kv_heads))
    return jax.shard_map(
        part,
        in_specs=(queries, keys, keys, PartitionSpec(batch, None), PartitionSpec(heads)),
        out_specs=queries,
        axis_names=ours,
        check_vma=False,
    )(q_BTHC, k_BTKC, v_BTKE, ids_BT, sinks_H)


def _split(rules: ShardingRules | None) -> tuple | None:
    """(axes of the mesh that is set, those that split rows, tokens, heads, key/value heads); None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
    if not ours:
        return None
    split = lambda name: tuple(axis for axis in getattr(rules, name, ()) if axis in ours)
    batch, length, heads, kv_heads = (split(n) for n in ("batch", "length", "act_heads", "act_kv_heads"))
    if kv_heads not in ((), heads):
        raise ValueError(
            f"sharding.act_kv_heads={kv_heads} splits keys and values otherwise than act_heads={heads} splits queries. "
            "Give both the same mesh axes, or keep keys and values whole with sharding.act_kv_heads=()."
        )
    return ours, batch, length, heads, kv_heads


def _part(length: tuple[str, ...], heads: tuple[str, ...], options: dict, q_BTHC, k_BSKC, v_BSKE, *ids_BT_BS):
    """What one device computes; `heads`: the axes that split the heads of queries only."""
    k_BSKC, v_BSKE = _of_heads(heads, k_BSKC, v_BSKE)
    offset = jax.lax.axis_index(length) * q_BTHC.shape[1] if length else 0
    return flash_attention(q_BTHC, k_BSKC, v_BSKE, *ids_BT_BS, offset=offset, **options)


def _of_heads(heads: tuple[str, ...], k_BSKC: jax.Array, v_BSKE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values that a device's queries need, of all of them."""
    ways, K = math.prod(jax.lax.axis_size(axis) for axis in heads), k_BSKC.shape[2]
    if ways > 1:
        if K % ways and ways % K:
            raise ValueError(
                f"mesh axes {'*'.join(heads)} = {ways} neither divide the {K} key/value heads nor are a multiple of "
                "them. Use another size, or sharding.act_heads=()."
            )
        first = jax.lax.axis_index(heads) * K // ways
        k_BSKC, v_BSKE = (
            jax.lax.dynamic_slice_in_dim(x, first, max(1, K // ways), axis=2) for x in (k_BSKC, v_BSKE)
        )
    return k_BSKC, v_BSKE

"""Attention on a mesh, which splits rows and heads, and the tokens of a row for flash attention.

Rows and heads need nothing of each other. Where a row's tokens are split as well, each device has some of the queries
and is given the keys and values of the whole row, as in Llama 3, arXiv:2407.21783, section 3.3.2.
"""

# B batch, T queries, S keys, H query heads, K key/value heads, C width of a query and a key, E width of a value

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from model.kernels import mesh
from model.sharding import Axes, ShardingRules


def flash_on_mesh(
    attend: Callable[..., tuple[jax.Array, jax.Array]],
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    ids_BT: jax.Array | None,
    rules: ShardingRules | None,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """Flash attention of tokens among themselves, on the mesh set with `jax.set_mesh`; without one, on one device.

    Args:
      attend: `flash_attention` of a platform.
      rules: None: every device of the mesh computes the whole.
      options: those of `attend`.
    """
    if not mesh.mesh_axes():
        return attend(q_BTHC, k_BTKC, v_BTKE, ids_BT, ids_BT, **options)
    batch, length, heads, kv_heads = _splits(rules)
    keys = PartitionSpec(batch, None, kv_heads, None)
    return mesh.on_mesh(
        functools.partial(_part, functools.partial(attend, **options), length, () if kv_heads else heads),
        in_specs=(PartitionSpec(batch, length, heads, None), keys, keys)
        + (PartitionSpec(batch, length), PartitionSpec(batch, None)),
        out_specs=(PartitionSpec(batch, length, heads, None), PartitionSpec(batch, heads, length)),
    )(q_BTHC, k_BTKC, v_BTKE, ids_BT, ids_BT)


def whole_rows_on_mesh(
    attend: Callable[..., jax.Array],
    rules: ShardingRules | None,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    ids_BT: jax.Array | None,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """`attend(q, k, v, ids, sinks)` [B, T, H, E] of whole rows, on the mesh set with `jax.set_mesh`."""
    if not mesh.mesh_axes():
        return attend(q_BTHC, k_BTKC, v_BTKE, ids_BT, sinks_H)
    batch, _, heads, kv_heads = _splits(rules)

    def part(q_BTHC, k_BTKC, v_BTKE, ids_BT, sinks_H):
        return attend(q_BTHC, *_of_heads(() if kv_heads else heads, k_BTKC, v_BTKE), ids_BT, sinks_H)

    queries, keys = (PartitionSpec(batch, None, axes, None) for axes in (heads, kv_heads))
    return mesh.on_mesh(
        part,
        in_specs=(queries, keys, keys, PartitionSpec(batch, None), PartitionSpec(heads)),
        out_specs=queries,
    )(q_BTHC, k_BTKC, v_BTKE, ids_BT, sinks_H)


def _splits(rules: ShardingRules | None) -> tuple[Axes, Axes, Axes, Axes]:
    """Axes that split rows, tokens, heads and key/value heads."""
    batch, length, heads, kv_heads = mesh.split_by(rules, "batch", "length", "act_heads", "act_kv_heads")
    if kv_heads not in ((), heads):
        raise ValueError(
            f"sharding.act_kv_heads={kv_heads} splits keys and values otherwise than act_heads={heads} splits queries. "
            "Give both the same mesh axes, or keep keys and values whole with sharding.act_kv_heads=()."
        )
    return batch, length, heads, kv_heads


def _part(attend, length: Axes, heads: Axes, q_BTHC, k_BSKC, v_BSKE, *ids_BT_BS):
    """What one device computes; `heads`: the axes that split the heads of queries only."""
    k_BSKC, v_BSKE = _of_heads(heads, k_BSKC, v_BSKE)
    offset = jax.lax.axis_index(length) * q_BTHC.shape[1] if length else 0
    return attend(q_BTHC, k_BSKC, v_BSKE, *ids_BT_BS, offset=offset)


def _of_heads(heads: Axes, k_BSKC: jax.Array, v_BSKE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of all keys and values, those that a device's queries need."""
    ways, K = mesh.ways(heads), k_BSKC.shape[2]
    if ways > 1:
        mesh.check_divides(heads, mesh.Size(K, "key/value heads", "act_heads"), shared=True)
        first = jax.lax.axis_index(heads) * K // ways
        k_BSKC, v_BSKE = (
            jax.lax.dynamic_slice_in_dim(x, first, max(1, K // ways), axis=2) for x in (k_BSKC, v_BSKE)
        )
    return k_BSKC, v_BSKE

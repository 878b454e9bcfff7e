"""Paged attention on a mesh: the compiler can't cut a kernel, so each device is given its heads by hand.

Heads are split as pages are, over the mesh axes of `act_kv_heads`; heads of queries that share one key, as in latent
attention, over those of `act_heads`, and then each device keeps all pages and writes the same into its own.
"""

# B batch, T tokens, H query heads, K key/value heads, C channels of a key, E channels of a value

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import AxisType, PartitionSpec

from model.kernels.attention.reference import Scores, Sight
from model.kernels.paged_attention import Kept, attend_in_rows
from model.kernels.paged_attention.pages import SCALE
from model.sharding import ShardingRules


def attend_on_mesh(
    q_BTHC: jax.Array,
    new: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_BP: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    kept: Kept,
    sight: Sight,
    scores: Scores,
    rules: ShardingRules | None,
    first_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`attend_in_rows` on the mesh set with `jax.set_mesh`; without one, on one device.

    Rows are whole on every device: any of them may be in any page.

    Args:
      rules: None: the table's defaults, by which the engine places its pages.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ours = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
    table_and_rows = page_table_BP, start_B, count_B, first_B
    if not ours:
        return attend_in_rows(q_BTHC, new, cache, *table_and_rows[:3], kept, sight, scores, first_B)
    rules = rules or ShardingRules()
    heads, kv_heads = (
        tuple(axis for axis in axes if axis in ours and mesh.shape[axis] > 1)
        for axes in (rules.act_heads, rules.act_kv_heads)
    )
    ways = math.prod(mesh.shape[axis] for axis in heads)
    if kept.heads == 1:
        kv_heads = ()
    H, K = q_BTHC.shape[2], kept.heads
    if H % ways or (kv_heads and K % ways):
        fitting = [n for n in range(1, H + 1) if H % n == 0 and (K == 1 or K % n == 0)]
        raise ValueError(
            f"mesh axes {'*'.join(heads)} = {ways} do not divide {H} heads of queries over {K} of keys and values. Use "
            f"{', '.join(map(str, fitting))}, or keep heads whole with sharding.act_heads=() and act_kv_heads=()."
        )
    if kv_heads not in ((), heads):
        raise ValueError(
            f"sharding.act_kv_heads={kv_heads} splits keys and values otherwise than act_heads={heads} splits queries. "
            "Give both the same mesh axes."
        )
    if K > 1 and not kv_heads:
        heads = ()  # the rules keep pages whole
    kept = dataclasses.replace(kept, heads=kept.heads // math.prod(mesh.shape[axis] for axis in kv_heads))

    def part(q_BTHC, new, cache, sinks_H, page_table_BP, start_B, count_B, first_B):
        rows, of_part = (page_table_BP, start_B, count_B), dataclasses.replace(scores, sinks_H=sinks_H)
        return attend_in_rows(q_BTHC, new, cache, *rows, kept, sight, of_part, first_B)

    of_queries, whole = PartitionSpec(None, None, heads, None), PartitionSpec()
    of_new = jax.tree.map(lambda x: PartitionSpec(None, None, kv_heads), new)
    of_cache = {
        name: PartitionSpec(None, kv_heads) if name.endswith(SCALE) else PartitionSpec(None, None, kv_heads)
        for name in cache
    }
    return jax.shard_map(
        part,
        in_specs=(of_queries, of_new, of_cache, PartitionSpec(heads), *[whole] * 4),
        out_specs=(of_queries, of_cache),
        axis_names=ours,
        check_vma=False,
    )(q_BTHC, new, cache, scores.sinks_H, *table_and_rows)

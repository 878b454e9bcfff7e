"""Paged attention on a mesh, which splits heads.

Heads are split as pages are, over the mesh axes of `act_kv_heads`. Where all heads of queries share one key, as in
latent attention, they are split over those of `act_heads`; each device then has all pages and writes the same to them.
"""

# B batch, T tokens, H query heads, K key/value heads, C channels of a key, E channels of a value

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import PartitionSpec

from model.kernels import mesh
from model.kernels.attention import Mask, Scores
from model.kernels.paged_attention import attend_in_rows
from model.kernels.paged_attention.kv_layout import KVLayout
from model.kernels.paged_attention.pages import SCALE
from model.sharding import Axes, ShardingRules


def attend_on_mesh(
    q_BTHC: jax.Array,
    new: dict[str, jax.Array] | None,
    cache: dict[str, jax.Array],
    page_table_BP: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    kv_layout: KVLayout,
    mask: Mask,
    scores: Scores,
    rules: ShardingRules | None,
    first_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`attend_in_rows` on the mesh set with `jax.set_mesh`; without one, on one device.

    Rows are whole on every device: any of them may be in any page.

    Args:
      rules: None: the table's defaults, by which the engine places its pages.
    """
    table_and_rows = page_table_BP, start_B, count_B, first_B
    if not mesh.mesh_axes():
        return attend_in_rows(q_BTHC, new, cache, *table_and_rows[:3], kv_layout, mask, scores, first_B)
    K = kv_layout.heads
    heads, kv_heads = _splits(rules or ShardingRules(), q_BTHC.shape[2], K)
    layout_here = dataclasses.replace(kv_layout, heads=K // mesh.ways(kv_heads))

    def part(q_BTHC, new, cache, sinks_H, mask, page_table_BP, start_B, count_B, first_B):
        rows, of_part = (page_table_BP, start_B, count_B), dataclasses.replace(scores, sinks_H=sinks_H)
        return attend_in_rows(q_BTHC, new, cache, *rows, layout_here, mask, of_part, first_B)

    of_queries, whole = PartitionSpec(None, None, heads, None), PartitionSpec()
    of_new = jax.tree.map(lambda x: PartitionSpec(None, None, kv_heads), new)
    of_cache = {
        name: PartitionSpec(None, kv_heads) if name.endswith(SCALE) else PartitionSpec(None, None, kv_heads)
        for name in cache
    }
    of_mask = jax.tree.map(lambda _: whole, mask)
    return mesh.on_mesh(
        part,
        in_specs=(of_queries, of_new, of_cache, PartitionSpec(heads), of_mask, *[whole] * 4),
        out_specs=(of_queries, of_cache),
    )(q_BTHC, new, cache, scores.sinks_H, mask, *table_and_rows)


def _splits(rules: ShardingRules, H: int, K: int) -> tuple[Axes, Axes]:
    """The axes of the mesh that split the heads of queries, and those of keys and values."""
    heads, kv_heads = (
        tuple(axis for axis in axes if mesh.ways((axis,)) > 1)
        for axes in mesh.split_by(rules, "act_heads", "act_kv_heads")
    )
    if K == 1:
        kv_heads = ()
    mesh.check_divides(heads, mesh.Size(H, "heads", "act_heads"))
    mesh.check_divides(kv_heads, mesh.Size(K, "key/value heads", "act_kv_heads"))
    if kv_heads not in ((), heads):
        raise ValueError(
            f"sharding.act_kv_heads={kv_heads} splits keys and values otherwise than act_heads={heads} splits queries. "
            "Give both the same mesh axes."
        )
    if K > 1 and not kv_heads:
        heads = ()  # the rules keep pages whole
    return heads, kv_heads

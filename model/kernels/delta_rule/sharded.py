"""The delta rule on a mesh that splits rows and heads; tokens that it splits are gathered."""

# B batch, T tokens, H heads, K key width, V value width

from __future__ import annotations

import functools

import jax
from jax.sharding import PartitionSpec

from model.kernels import backend, mesh
from model.kernels.delta_rule import tpu
from model.kernels.recurrence.sharded import split_rows_and_heads
from model.kernels.recurrence.tpu_chunks import TileSizes
from model.sharding import ShardingRules


def delta_on_mesh(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_BTH: jax.Array,
    beta_BTH: jax.Array,
    first_BT: jax.Array,
    state_BHKV: jax.Array,
    rules: ShardingRules | None,
) -> tuple[jax.Array, jax.Array]:
    """`tpu.delta_rule` on the mesh set with `jax.set_mesh`; without one, on one device.

    Args:
      rules: None: every device of the mesh computes everything.
    """
    batch, heads = split_rows_and_heads(rules, v_BTHV.shape[0], v_BTHV.shape[2])
    tokens, states = PartitionSpec(batch, None, heads), PartitionSpec(batch, heads)
    chosen = backend.current()
    tiles = chosen.of_chip(tpu.TILE_SIZES, TileSizes())
    kernel = functools.partial(tpu.delta_rule, tiles=tiles, interpret=chosen.interpret)
    run = mesh.on_mesh(kernel, (tokens,) * 5 + (PartitionSpec(batch), states), (tokens, states))
    return run(q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH, first_BT, state_BHKV)

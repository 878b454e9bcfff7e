"""State-space duality on a mesh that splits rows and heads; tokens that it splits are gathered."""

# B batch, T tokens, H heads in G groups, P value width, N key (state) width

from __future__ import annotations

import functools

import jax
from jax.sharding import PartitionSpec

from model.kernels import backend, mesh
from model.kernels.recurrence.sharded import split_rows_and_heads
from model.kernels.recurrence.tpu_chunks import TileSizes
from model.kernels.ssd import tpu
from model.sharding import ShardingRules


def ssd_on_mesh(
    v_BTHP: jax.Array,
    log_decay_BTH: jax.Array,
    k_BTGN: jax.Array,
    q_BTGN: jax.Array,
    first_BT: jax.Array,
    state_BHPN: jax.Array,
    scale_BTH: jax.Array | None,
    rules: ShardingRules | None,
) -> tuple[jax.Array, jax.Array]:
    """`tpu.ssd` on the mesh set with `jax.set_mesh`; without one, on one device.

    Args:
      rules: None: every device of the mesh computes everything.
    """
    batch, heads = split_rows_and_heads(rules, v_BTHP.shape[0], v_BTHP.shape[2])
    ways, G = mesh.ways(heads), k_BTGN.shape[2]
    whole_keys = ways > 1 and G % ways != 0
    mesh.check_divides(heads, mesh.Size(G, "groups of heads", "act_heads"), shared=True)
    chosen = backend.current()
    tiles = chosen.of_chip(tpu.TILE_SIZES, TileSizes())
    kernel = functools.partial(tpu.ssd, tiles=tiles, interpret=chosen.interpret)

    def part(v_BTHP, log_decay_BTH, k_BTGN, q_BTGN, *others):
        if whole_keys:  # the heads of a device belong to one group
            group = jax.lax.axis_index(heads) * G // ways
            k_BTGN, q_BTGN = (jax.lax.dynamic_slice_in_dim(x, group, 1, axis=2) for x in (k_BTGN, q_BTGN))
        return kernel(v_BTHP, log_decay_BTH, k_BTGN, q_BTGN, *others)

    tokens = PartitionSpec(batch, None, heads)
    keys = PartitionSpec(batch, None, () if whole_keys else heads)
    rows, states = PartitionSpec(batch), PartitionSpec(batch, heads)
    run = mesh.on_mesh(part, (tokens, tokens, keys, keys, rows, states, tokens), (tokens, states))
    return run(v_BTHP, log_decay_BTH, k_BTGN, q_BTGN, first_BT, state_BHPN, scale_BTH)

"""Grouped products in blocks of rows; each block is multiplied by one matrix.

As in MegaBlocks (Gale et al. 2022, arXiv:2211.15841), in plain jnp: on a CPU `jax.lax.ragged_dot` multiplies every row
by every matrix.
"""

# M rows, I inputs, O outputs, E groups, N blocks, R rows a block

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels import cpu
from model.kernels.derivatives import differentiable
from model.kernels.grouped_matmul.reference import group_of_rows, within_groups

# rows of a block; a block has rows of one group only, so each group wastes half a block on average
MIN_BLOCK, MAX_BLOCK = 8, 256


def in_blocks(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Blocks of rows of one group, one block after the other."""
    return differentiable(_forward, _tangent, _backward, _products)(x_MI, w_EIO, sizes_E)


def _products(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    slot_M, group_N, R = _layout(sizes_E, x_MI.shape[0])
    x_NRI = _to_blocks(x_MI, slot_M, len(group_N), R)

    def step(n, y_NRO):
        return y_NRO.at[n].set(x_NRI[n] @ w_EIO[group_N[n]])

    empty = cpu.zeros_after(x_MI, (*x_NRI.shape[:2], w_EIO.shape[2]), jnp.result_type(x_MI, w_EIO))
    y_NRO = jax.lax.fori_loop(0, _blocks_of(sizes_E, R).sum(), step, empty)  # rows of no group have no block
    return within_groups(sizes_E, y_NRO.reshape(-1, w_EIO.shape[2])[slot_M])


def _forward(x_MI, w_EIO, sizes_E):
    return in_blocks(x_MI, w_EIO, sizes_E), (x_MI, w_EIO, sizes_E)


def _tangent(saved, tangents):
    (x_MI, w_EIO, sizes_E), (moved_x_MI, moved_w_EIO, _) = saved, tangents
    return in_blocks(moved_x_MI, w_EIO, sizes_E) + in_blocks(x_MI, moved_w_EIO, sizes_E)


def _backward(saved, dy_MO: jax.Array):
    x_MI, w_EIO, sizes_E = saved
    dy_MO = within_groups(sizes_E, dy_MO)
    slot_M, group_N, R = _layout(sizes_E, x_MI.shape[0])
    x_NRI, dy_NRO = (_to_blocks(rows, slot_M, len(group_N), R) for rows in (x_MI, dy_MO))

    def step(n, gradients):
        (dx_NRI, dw_EIO), group = gradients, group_N[n]
        product = jnp.einsum("RI,RO->IO", x_NRI[n], dy_NRO[n], preferred_element_type=jnp.float32)
        return dx_NRI.at[n].set(dy_NRO[n] @ w_EIO[group].T), dw_EIO.at[group].add(product)

    empty = cpu.zeros_after(dy_MO, x_NRI.shape, jnp.result_type(dy_MO, w_EIO))
    zeros = cpu.zeros_after(dy_MO, w_EIO.shape, jnp.float32)
    dx_NRI, dw_EIO = jax.lax.fori_loop(0, _blocks_of(sizes_E, R).sum(), step, (empty, zeros))
    return dx_NRI.reshape(-1, x_MI.shape[1])[slot_M], dw_EIO.astype(w_EIO.dtype), None


def _layout(sizes_E: jax.Array, M: int) -> tuple[jax.Array, jax.Array, int]:
    """(index of each row among the rows of all blocks [M], group of each block [N], rows a block)."""
    E = len(sizes_E)
    R = min(max(MIN_BLOCK, 1 << (M // E).bit_length() - 1), MAX_BLOCK) if M >= E else MIN_BLOCK
    blocks_E = _blocks_of(sizes_E, R)
    group_M = group_of_rows(sizes_E, M)
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    first_row_E = jnp.cumsum(sizes_E) - sizes_E
    slot_M = first_block_E[group_M] * R + jnp.arange(M) - first_row_E[group_M]
    return slot_M, group_of_rows(blocks_E, M // R + E), R


def _blocks_of(sizes_E: jax.Array, R: int) -> jax.Array:
    return -(-sizes_E // R)


def _to_blocks(x_MI: jax.Array, slot_M: jax.Array, blocks: int, R: int) -> jax.Array:
    """[N, R, I] with zeros between the groups."""
    row_NR = jnp.full((blocks * R,), len(x_MI)).at[slot_M].set(jnp.arange(len(x_MI)), unique_indices=True)
    return x_MI.at[row_NR].get(mode="fill", fill_value=0).reshape(blocks, R, -1)

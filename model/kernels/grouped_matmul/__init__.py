"""Rows sorted into groups, each group times its own matrix: what the experts of a mixture compute.

`reference` is the plain form, `FORMS` has all others. TPUs have the kernels of grouped_kernels; GPUs are left to
`jax.lax.ragged_dot`, which on CPU multiplies every row with every matrix, so there blocks of rows are multiplied one
after the other, each with the one matrix it needs, as in MegaBlocks (Gale et al. 2022, arXiv:2211.15841).
"""

# M rows, I inputs, O outputs, E groups, N blocks, R rows a block

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.kernels import backend, order

MIN_BLOCK, MAX_BLOCK = 8, 256  # rows; a block holds rows of one group only, so each group wastes half a block
MEGABLOX_TILE = 512  # rows, inputs and outputs


def grouped_matmul(
    x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, transposed: bool = False
) -> jax.Array:
    """[M, O]: the first sizes_E[0] rows of `x` times w_EIO[0], the next sizes_E[1] rows times w_EIO[1], and so on.

    Args:
      sizes_E: int32, adding up to M at most; rows beyond them become zeros.
      transposed: matrices are given as [E, O, I], which the kernel reads as they lie.
    """
    chosen = backend.current()
    form = form_for(chosen, backend.kernels().grouped)
    if form == "kernel":
        return _by_kernel(x_MI, w_EIO, sizes_E, chosen, transposed)
    return FORMS[form].run(x_MI, w_EIO.swapaxes(1, 2) if transposed else w_EIO, sizes_E, chosen)


def form_for(chosen: backend.Backend, named: str = "auto") -> str:
    """The name of the form of `FORMS` that is wanted; ValueError where it does not run."""
    if named == "auto":
        return "kernel" if chosen.name == "tpu" else "blocks" if backend.for_cpu() else "ragged_dot"
    can = [name for name, form in FORMS.items() if chosen.name in form.platforms or chosen.interpret]
    if named not in can:
        raise ValueError(
            f"kernels.grouped={named!r} is not one of auto, {', '.join(can)} (for {chosen.name})."
        )
    return named


def reference(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Every row times every matrix, and what is not wanted times zero."""
    E, M = w_EIO.shape[0], x_MI.shape[0]
    with_rest = jnp.append(sizes_E, M - sizes_E.sum())  # a group without a matrix
    of_group_ME = jax.nn.one_hot(_groups(with_rest, M), E, dtype=x_MI.dtype)
    return jnp.einsum("MI,EIO,ME->MO", x_MI, w_EIO, of_group_ME)


@jax.custom_vjp
def in_blocks(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Blocks of rows of one group, one block after the other."""
    slot_M, group_N, R = _layout(sizes_E, x_MI.shape[0])
    x_NRI = _to_blocks(x_MI, slot_M, len(group_N), R)

    def step(n, y_NRO):
        return y_NRO.at[n].set(x_NRI[n] @ w_EIO[group_N[n]])

    empty = order.zeros_after(x_MI, (*x_NRI.shape[:2], w_EIO.shape[2]), jnp.result_type(x_MI, w_EIO))
    y_NRO = jax.lax.fori_loop(0, _blocks_of(sizes_E, R).sum(), step, empty)  # rows of no group have no block
    return _within(sizes_E, y_NRO.reshape(-1, w_EIO.shape[2])[slot_M])


def _forward(x_MI, w_EIO, sizes_E):
    return in_blocks(x_MI, w_EIO, sizes_E), (x_MI, w_EIO, sizes_E)


def _backward(saved, dy_MO: jax.Array):
    x_MI, w_EIO, sizes_E = saved
    dy_MO = _within(sizes_E, dy_MO)
    slot_M, group_N, R = _layout(sizes_E, x_MI.shape[0])
    x_NRI, dy_NRO = (_to_blocks(rows, slot_M, len(group_N), R) for rows in (x_MI, dy_MO))

    def step(n, gradients):
        (dx_NRI, dw_EIO), group = gradients, group_N[n]
        product = jnp.einsum("RI,RO->IO", x_NRI[n], dy_NRO[n], preferred_element_type=jnp.float32)
        return dx_NRI.at[n].set(dy_NRO[n] @ w_EIO[group].T), dw_EIO.at[group].add(product)

    empty = order.zeros_after(dy_MO, x_NRI.shape, jnp.result_type(dy_MO, w_EIO))
    zeros = order.zeros_after(dy_MO, w_EIO.shape, jnp.float32)
    dx_NRI, dw_EIO = jax.lax.fori_loop(0, _blocks_of(sizes_E, R).sum(), step, (empty, zeros))
    return dx_NRI.reshape(-1, x_MI.shape[1])[slot_M], dw_EIO.astype(w_EIO.dtype), None


in_blocks.defvjp(_forward, _backward)


def _within(sizes_E: jax.Array, rows_M: jax.Array) -> jax.Array:
    """The rows of groups, and zeros for those beyond."""
    return jnp.where(jnp.arange(len(rows_M))[:, None] < sizes_E.sum(), rows_M, 0)


def _groups(sizes_E: jax.Array, length: int) -> jax.Array:
    """The group of each of `length` rows; rows beyond the sizes count to the last group."""
    return jnp.repeat(jnp.arange(len(sizes_E)), sizes_E, total_repeat_length=length)


def _layout(sizes_E: jax.Array, M: int) -> tuple[jax.Array, jax.Array, int]:
    """(where each row stands among the rows of all blocks [M], the group of each block [N], rows a block)."""
    E = len(sizes_E)
    R = min(max(MIN_BLOCK, 1 << (M // E).bit_length() - 1), MAX_BLOCK) if M >= E else MIN_BLOCK
    blocks_E = _blocks_of(sizes_E, R)
    group_M = _groups(sizes_E, M)
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    first_row_E = jnp.cumsum(sizes_E) - sizes_E
    slot_M = first_block_E[group_M] * R + jnp.arange(M) - first_row_E[group_M]
    return slot_M, _groups(blocks_E, M // R + E), R


def _blocks_of(sizes_E: jax.Array, R: int) -> jax.Array:
    return -(-sizes_E // R)


def _to_blocks(x_MI: jax.Array, slot_M: jax.Array, blocks: int, R: int) -> jax.Array:
    """[N, R, I] with zeros between the groups."""
    row_NR = jnp.full((blocks * R,), len(x_MI)).at[slot_M].set(jnp.arange(len(x_MI)), unique_indices=True)
    return x_MI.at[row_NR].get(mode="fill", fill_value=0).reshape(blocks, R, -1)


def _by_kernel(
    x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, chosen: backend.Backend, transposed: bool = False
) -> jax.Array:
    # here, since Pallas takes long to import and is wanted on TPUs alone
    from model.kernels.grouped_matmul.tpu import grouped_product, plan_for

    dtype = jnp.result_type(x_MI, w_EIO)
    return grouped_product(plan_for(chosen, transposed), x_MI.astype(dtype), w_EIO.astype(dtype), sizes_E)


def _megablox(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, chosen: backend.Backend) -> jax.Array:
    """By jax.experimental.pallas.ops.tpu.megablox, which takes whole tiles of rows and leaves those beyond the sizes
    as they were in memory."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    M, dtype = x_MI.shape[0], jnp.result_type(x_MI, w_EIO)
    x_MI = jnp.pad(_within(sizes_E, x_MI.astype(dtype)), ((0, -M % MEGABLOX_TILE), (0, 0)))
    tiles = (MEGABLOX_TILE, *(min(MEGABLOX_TILE, size) for size in w_EIO.shape[1:]))
    y_MO = gmm(x_MI, w_EIO.astype(dtype), sizes_E, dtype, tiles, interpret=chosen.interpret)
    return _within(sizes_E, y_MO[:M])


def _tokamax(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, chosen: backend.Backend) -> jax.Array:
    dtype = jnp.result_type(x_MI, w_EIO)
    how = {"implementation": "xla"} if chosen.interpret else {}
    y_MO = backend.tokamax().ragged_dot(
        _within(sizes_E, x_MI.astype(dtype)), w_EIO.astype(dtype), sizes_E, **how
    )
    return _within(sizes_E, y_MO.astype(dtype))


class Form(NamedTuple):
    """One way to compute it: the names of the back ends that it is for, and the function."""

    platforms: tuple[str, ...]
    run: Callable[..., jax.Array]


FORMS = {
    "blocks": Form(
        ("plain", "gpu", "tpu"), lambda x_MI, w_EIO, sizes_E, chosen: in_blocks(x_MI, w_EIO, sizes_E)
    ),
    "ragged_dot": Form(
        ("plain", "gpu", "tpu"), lambda x_MI, w_EIO, sizes_E, chosen: jax.lax.ragged_dot(x_MI, w_EIO, sizes_E)
    ),
    "kernel": Form(("tpu",), _by_kernel),
    "megablox": Form(("tpu",), _megablox),
    "tokamax": Form(("gpu", "tpu"), _tokamax),
}

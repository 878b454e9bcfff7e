"""Runs blocks on chosen tokens of a row, for mixtures of depths and of recursions.

The chosen tokens move to the front of the row, keep their positions, and see only each other. Then the blocks' changes
are added at the tokens' places in the row.
"""

# B batch, T tokens, D model width, M chosen tokens a row at most, S slots of a row

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from model.blocks.balance import token_weights
from model.blocks.block import Block, BlockModule
from model.blocks.common import NO_PAGE, Carry, TokenInfo, fan_in_normal, in_float32, param
from model.kernels.paged_attention.pages import gather
from model.weighted import WeightedSum

FILLED = "filled"  # name in a state: which slots of the pages hold a chosen token


class Chosen(NamedTuple):
    """The chosen tokens of a row, in their order, before padding."""

    index_BM: jax.Array  # int32, the index of each in its row
    real_BM: jax.Array  # bool; False: padding

    def take(self, x_BT: jax.Array) -> jax.Array:
        index = self.index_BM.reshape(self.index_BM.shape + (1,) * (x_BT.ndim - 2))
        return jnp.take_along_axis(x_BT, index, axis=1)

    def add(self, x_BTD: jax.Array, change_BMD: jax.Array) -> jax.Array:
        """`x` with the chosen tokens' changes."""
        change_BMD = jnp.where(self.real_BM[..., None], change_BMD, 0).astype(x_BTD.dtype)
        rows_B1 = jnp.arange(x_BTD.shape[0])[:, None]
        return x_BTD.at[rows_B1, self.index_BM].add(change_BMD)

    def info(self, info: TokenInfo) -> TokenInfo:
        """The `TokenInfo` of the chosen tokens."""
        real_BM = self.real_BM.astype(jnp.int32)
        segments_BM = real_BM if info.segment_ids is None else self.take(info.segment_ids) * real_BM
        pages: dict[str, Any] = {}
        if info.write_page is not None and info.write_slot is not None:
            page_BM = jnp.where(self.real_BM, self.take(info.write_page), NO_PAGE)
            pages = {"write_page": page_BM, "write_slot": self.take(info.write_slot)}
        begins_B = info.begins
        if begins_B is None:
            begins_B = jnp.any((info.positions == 0) & real_tokens(info), axis=1)
        return dataclasses.replace(
            info,
            positions=self.take(info.positions),
            segment_ids=segments_BM,
            weights=None if info.weights is None else self.take(info.weights),
            tokens=None if info.tokens is None else self.take(info.tokens),
            rope_positions=None if info.rope_positions is None else self.take(info.rope_positions),
            begins=begins_B,
            carry=Carry(),
            cached=None,
            **pages,
        )


def real_tokens(info: TokenInfo) -> jax.Array:
    """[B, T] bool."""
    if info.segment_ids is None:
        return jnp.ones(info.positions.shape, bool)
    return info.segment_ids != 0


def choose_positive(scores_BT: jax.Array, real_BT: jax.Array) -> Chosen:
    """All real tokens with a positive score. The choice is causal, so it works in decoding."""
    wanted_BT = (scores_BT > 0) & real_BT
    index_BT = jnp.argsort(~wanted_BT, axis=1, stable=True)
    return Chosen(index_BT, jnp.take_along_axis(wanted_BT, index_BT, axis=1))


def choose_best(
    scores_BT: jax.Array,
    left_BT: jax.Array,
    real_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    share: float,
) -> Chosen:
    """The tokens in `left_BT` with the highest scores: a share of each document's real tokens, rounded down.

    The choice in a document does not depend on the rest of the row.
    """
    B, T = scores_BT.shape
    segment_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    first_BT = jnp.pad(segment_BT[:, 1:] != segment_BT[:, :-1], ((0, 0), (1, 0)))
    number_BT = jnp.cumsum(first_BT, axis=1)
    document_BT = jnp.where(left_BT, number_BT, T)
    by_score_BT = jnp.lexsort((-scores_BT, document_BT), axis=1)  # a document's best tokens first
    sorted_BT = jnp.take_along_axis(document_BT, by_score_BT, axis=1)
    count = jax.vmap(lambda ids: jnp.bincount(ids, length=T + 1))
    left_BN, real_BN = count(document_BT), count(jnp.where(real_BT, number_BT, T))
    begins_BT = jnp.take_along_axis(jnp.cumsum(left_BN, axis=1) - left_BN, sorted_BT, axis=1)
    most_BT = jnp.floor(share * jnp.take_along_axis(real_BN, sorted_BT, axis=1) + 1e-4)
    best_BT = (jnp.arange(T) - begins_BT < most_BT) & (sorted_BT < T)
    wanted_BT = jnp.zeros((B, T), bool).at[jnp.arange(B)[:, None], by_score_BT].set(best_BT)
    most = max(1, math.floor(share * T + 1e-4))  # the sum over a row's documents
    index_BM = jnp.argsort(~wanted_BT, axis=1, stable=True)[:, :most]
    return Chosen(index_BM, jnp.take_along_axis(wanted_BT, index_BM, axis=1))


def membership(chosen: Chosen, length: int) -> jax.Array:
    """[B, T] bool: which tokens of the row were chosen."""
    rows_B1 = jnp.arange(chosen.index_BM.shape[0])[:, None]
    return (
        jnp.zeros((chosen.index_BM.shape[0], length), bool).at[rows_B1, chosen.index_BM].set(chosen.real_BM)
    )


def router_scores(module: Any, x_BTD: jax.Array, name: str, role: str) -> jax.Array:
    """[B, T] float32: a linear map of each token to one score, with the parameter `name` [D]."""
    D = x_BTD.shape[-1]
    w_D = param(module, in_float32(module.ctx), name, (D,), ("norm",), fan_in_normal(D), 1, role)
    return jnp.einsum("BTD,D->BT", x_BTD.astype(jnp.float32), w_D, precision=jax.lax.Precision.HIGHEST)


def check_nested(block: Block) -> None:
    """Raises ValueError for a block that cannot be within a mixer."""
    if block.residual.copies is not None:
        raise ValueError(
            f"{block.residual} widens the stream of a whole stack. Give it to the outer blocks, and give the blocks "
            "within a mixer a plain residual."
        )


def check_choosable(block: Block) -> None:
    """Raises ValueError for a block with windows or distances, which skipped tokens would change."""
    check_nested(block)
    for name in ("window", "alibi", "relative"):
        value = getattr(block.mixer, name, None)
        if value is not None:
            raise ValueError(
                f"{name}={value} counts tokens, and this block skips some. Give the block "
                "attention without it; rotary positions are those of the row."
            )


def init_states(
    block: Block, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
) -> dict[str, jax.Array]:
    """A block's state, with the slots of its pages that hold a token."""
    state = block.init_cache(num_pages, page_size, num_rows, dtype)
    return state | ({FILLED: jnp.zeros((num_pages, page_size), bool)} if has_pages(block) else {})


def state_axes(block: Block) -> dict[str, tuple[str | None, ...]]:
    return block.cache_axes() | ({FILLED: ("pages", "slots")} if has_pages(block) else {})


def has_pages(block: Block) -> bool:
    return any("slots" in axes for axes in block.cache_axes().values())


def run_chosen(
    module: BlockModule, chosen: Chosen, x_BTD: jax.Array, state: dict | None, info: TokenInfo
) -> tuple[jax.Array, dict | None, dict]:
    """(the block's change of each chosen token [B, M, D], its state, its losses and metrics)."""
    chosen_info, filled = chosen.info(info), {}
    if state is not None and FILLED in state:
        filled_NZ, chosen_info = _fill(state[FILLED], info, chosen_info)
        filled = {FILLED: filled_NZ}
        state = {key: value for key, value in state.items() if key != FILLED}
    read_BMD = chosen.take(x_BTD)
    made_BMD, (state, report) = module(read_BMD, state, chosen_info)
    aux = report.aux
    if "loss" in aux:  # a mean over all tokens, not over the chosen ones, so that parts of a batch add up
        parts = aux["loss"].weight / jnp.maximum(token_weights(chosen_info, chosen.real_BM).sum(), 1e-9)
        everyone = token_weights(info, real_tokens(info)).sum()
        aux = aux | {"loss": WeightedSum(aux["loss"].total, parts * everyone)}
    return made_BMD - read_BMD, None if state is None else state | filled, aux


def _fill(filled_NZ: jax.Array, info: TokenInfo, chosen_info: TokenInfo) -> tuple[jax.Array, TokenInfo]:
    """(the slots that hold a token after this call, the chosen tokens' info with them).

    Every real token writes whether it was chosen, which clears what an earlier row left in a page.
    """
    filled_NZ = filled_NZ.at[info.write_page, info.write_slot].set(False, mode="drop")
    filled_NZ = filled_NZ.at[chosen_info.write_page, chosen_info.write_slot].set(True, mode="drop")
    filled_BS = gather(filled_NZ, cast(jax.Array, info.page_table))
    return filled_NZ, dataclasses.replace(chosen_info, slots_filled=filled_BS)

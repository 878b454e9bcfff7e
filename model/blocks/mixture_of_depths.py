"""A block that processes only the tokens that its router chooses; the others skip it.

Raposo et al. 2024, arXiv:2404.02258.
"""

# B batch, T tokens, D model width, M chosen tokens a row at most

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.balance import token_weights
from model.blocks.block import Block, BlockModule
from model.blocks.chosen import (
    Chosen,
    check_choosable,
    choose_best,
    choose_positive,
    init_states,
    membership,
    real_tokens,
    router_scores,
    run_chosen,
    state_axes,
)
from model.blocks.common import Context, Report, TokenInfo, add_up
from model.weighted import WeightedSum


@dataclasses.dataclass(frozen=True)
class MixtureOfDepths:
    """x + score(x) * (block(x) - x) for chosen tokens, x for the others; use it as a block's whole mixer.

    In training with a `capacity`, the tokens of a document with the highest scores are chosen. This choice depends on
    later tokens, so a loss trains the scores' signs to predict it. Otherwise tokens with a positive score are chosen.
    """

    block: Block
    capacity: float | None = 0.125  # share of a document's tokens
    predict_loss: float = 0.01  # coefficient of the cross-entropy that trains the sign of the scores

    def __post_init__(self):
        if self.capacity is not None and not 0 < self.capacity <= 1:
            raise ValueError(
                f"capacity={self.capacity} is a share of a row's tokens, above 0 and at most 1, or None."
            )
        check_choosable(self.block)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (self.block,)

    def active_share(self, path: str) -> float:
        return self.block.active_share(path.removeprefix("block/"))

    def module(self, ctx: Context, name: str) -> nn.Module:
        return MixtureOfDepthsModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """The block's cache, with the slots of its pages that hold a token."""
        return init_states(self.block, num_pages, page_size, num_rows, dtype)

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return state_axes(self.block)

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass; without a capacity, as if all tokens were chosen."""
        share = 1.0 if self.capacity is None else self.capacity
        chosen = max(1, math.ceil(share * seq_len))
        return 2 * width + share * self.block.flops_per_token(width, chosen)


class MixtureOfDepthsModule(nn.Module):
    spec: MixtureOfDepths
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, real_BT = self.spec, real_tokens(info)
        role = "which tokens pass through the block, and how much they change"
        scores_BT = router_scores(self, x_BTD, "router", role)
        chosen = self._choose(scores_BT, real_BT, info)
        block = BlockModule(spec.block, self.ctx, name="block")
        change_BMD, cache, aux = run_chosen(block, chosen, x_BTD, cache, info)
        change_BMD *= chosen.take(scores_BT)[..., None].astype(x_BTD.dtype)
        report = self._report(scores_BT, chosen, real_BT, token_weights(info, real_BT))
        return chosen.add(jnp.zeros_like(x_BTD), change_BMD), cache, Report(add_up(aux, report))

    def _choose(self, scores_BT: jax.Array, real_BT: jax.Array, info: TokenInfo) -> Chosen:
        if self.spec.capacity is None or not self.ctx.train:
            return choose_positive(scores_BT, real_BT)
        return choose_best(scores_BT, real_BT, real_BT, info.segment_ids, self.spec.capacity)

    def _report(self, scores_BT, chosen: Chosen, real_BT, weights_BT) -> dict[str, WeightedSum]:
        passed_BT = membership(chosen, scores_BT.shape[1]).astype(jnp.float32)
        report = {"depth_share": WeightedSum.of(passed_BT, real_BT)}
        if self.spec.capacity is not None:
            report |= predict(scores_BT, passed_BT, real_BT, weights_BT, self.spec.predict_loss)
        return report


def predict(
    scores_BT: jax.Array, passed_BT: jax.Array, real_BT: jax.Array, weights_BT: jax.Array, coefficient: float
) -> dict[str, WeightedSum]:
    """The loss that trains scores to predict the choice, and the accuracy of their signs.

    It is the binary cross-entropy of sigmoid(score), section 3.5 of the paper.
    """
    entropy_BT = jax.nn.softplus(scores_BT) - passed_BT * scores_BT
    return {
        "loss": WeightedSum.of(coefficient * jnp.where(real_BT, entropy_BT, 0), weights_BT),
        "depth_predict_loss": WeightedSum.of(entropy_BT, real_BT),
        "depth_predicted": WeightedSum.of((scores_BT > 0) == (passed_BT > 0), real_BT),
    }

"""The same blocks several times over; a router decides how many times for each token.

Bae et al. 2025, arXiv:2507.10524; without a router, all tokens equally often: Dehghani et al. 2018, arXiv:1807.03819.
Each recursion keeps keys and values of its own tokens ("recursion-wise caching" in the paper).
"""

# B batch, T tokens, D model width, M chosen tokens a row at most, R recursions

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.balance import balance_of_tokens, token_weights
from model.blocks.block import Block, BlockModule
from model.blocks.chosen import (
    Chosen,
    check_choosable,
    check_nested,
    choose_best,
    choose_positive,
    init_states,
    membership,
    real_tokens,
    router_scores,
    run_chosen,
    state_axes,
)
from model.blocks.common import Context, Report, TokenInfo, add_up, fan_in_normal, in_float32, param
from model.blocks.mixture_of_depths import predict
from model.weighted import WeightedSum


@dataclasses.dataclass(frozen=True)
class RecursionExpertChoice:
    """ "Expert choice": each recursion has a router, which chooses among the tokens of the recursion before.

    A chosen token changes by score * (blocks(x) - x). `capacities` has one share of a document's tokens for each
    recursion. In training with capacities the highest scores are chosen, and a loss trains the scores' signs to predict
    the choice, as in `MixtureOfDepths`. Otherwise tokens with a positive score are chosen.
    """

    capacities: tuple[float, ...] | None = None
    predict_loss: float = 0.01


@dataclasses.dataclass(frozen=True)
class RecursionTokenChoice:
    """ "Token choice": one router gives each token its number of recursions before the first.

    The last recursion is weighted by the router's probability of that number.
    """

    balance_loss: float = 0.01  # coefficient of R * sum_r share_r * probability_r, as for experts


@dataclasses.dataclass(frozen=True)
class MixtureOfRecursions:
    """`blocks` applied up to `times` times, with the same parameters; use it as a block's whole mixer."""

    blocks: tuple[Block, ...]
    times: int
    router: RecursionExpertChoice | RecursionTokenChoice | None = None  # None: all tokens, every time

    def __post_init__(self):
        if not self.blocks or self.times < 1:
            raise ValueError(
                f"recursions need blocks and at least one time; given {len(self.blocks)} blocks, times={self.times}."
            )
        for block in self.blocks:
            check_nested(block) if self.router is None else check_choosable(block)
        shares = self.router.capacities if isinstance(self.router, RecursionExpertChoice) else None
        if shares is not None and (len(shares) != self.times or not all(0 < share <= 1 for share in shares)):
            raise ValueError(
                f"capacities={shares}: wanted a share of the tokens, above 0 and at most 1, for each of "
                f"{self.times} times."
            )

    def active_share(self, path: str) -> float:
        name, _, rest = path.partition("/")
        return self.blocks[int(name.removeprefix("block_"))].active_share(rest) if rest else 1.0

    def module(self, ctx: Context, name: str) -> nn.Module:
        return MixtureOfRecursionsModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """Each block's cache in each recursion; names start with "recursion_1/block_0/" and so on."""
        states = [init_states(block, num_pages, page_size, num_rows, dtype) for block in self.blocks]
        return self._of_each(states)

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return self._of_each([state_axes(block) for block in self.blocks])

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass; without capacities, as if all tokens went through all recursions."""
        shares = (1.0,) * self.times
        if isinstance(self.router, RecursionExpertChoice) and self.router.capacities is not None:
            shares = self.router.capacities
        routers = {RecursionExpertChoice: self.times, RecursionTokenChoice: self.times}.get(
            type(self.router), 0
        )
        return 2 * width * routers + sum(
            share * block.flops_per_token(width, max(1, math.ceil(share * seq_len)))
            for share in shares
            for block in self.blocks
        )

    def _of_each(self, parts: list[dict]) -> dict:
        return {
            f"recursion_{r}/block_{i}/{key}": value
            for r in range(self.times)
            for i, part in enumerate(parts)
            for key, value in part.items()
        }


class MixtureOfRecursionsModule(nn.Module):
    spec: MixtureOfRecursions
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec = self.spec
        blocks = [BlockModule(block, self.ctx, name=f"block_{i}") for i, block in enumerate(spec.blocks)]
        recursions = _Recursions(blocks, info, cache)
        if isinstance(spec.router, RecursionExpertChoice):
            y_BTD, aux = self._expert_choice(spec.router, x_BTD, recursions)
        elif isinstance(spec.router, RecursionTokenChoice):
            y_BTD, aux = self._token_choice(spec.router, x_BTD, recursions)
        else:
            y_BTD, aux = self._all(x_BTD, recursions)
        return (
            y_BTD - x_BTD,
            None if cache is None else recursions.states,
            Report(add_up(aux, recursions.aux)),
        )

    def _all(self, x_BTD: jax.Array, recursions: _Recursions) -> tuple[jax.Array, dict]:
        everyone = choose_positive(jnp.ones(x_BTD.shape[:2]), recursions.real_BT)
        for r in range(self.spec.times):
            x_BTD = everyone.add(x_BTD, recursions.through(r, everyone, x_BTD))
        return x_BTD, {}

    def _expert_choice(
        self, router: RecursionExpertChoice, x_BTD: jax.Array, recursions: _Recursions
    ) -> tuple[jax.Array, dict]:
        left_BT, aux, length = recursions.real_BT, {}, x_BTD.shape[1]
        for r in range(self.spec.times):
            role = f"which tokens go through recursion {r}, and how much they change"
            scores_BT = router_scores(self, x_BTD, f"router_{r}", role)
            if router.capacities is None or not self.ctx.train:
                chosen = choose_positive(scores_BT, left_BT)
            else:
                share, segment_ids_BT = router.capacities[r], recursions.info.segment_ids
                chosen = choose_best(scores_BT, left_BT, recursions.real_BT, segment_ids_BT, share)
            change_BMD = recursions.through(r, chosen, x_BTD)
            x_BTD = chosen.add(x_BTD, change_BMD * chosen.take(scores_BT)[..., None].astype(x_BTD.dtype))
            passed_BT = membership(chosen, length)
            aux |= {f"recursion_{r}_share": WeightedSum.of(passed_BT, recursions.real_BT)}
            if router.capacities is not None:
                passed = passed_BT.astype(jnp.float32)
                aux = add_up(
                    aux, predict(scores_BT, passed, left_BT, recursions.weights_BT, router.predict_loss)
                )
            left_BT = passed_BT
        return x_BTD, aux

    def _token_choice(
        self, router: RecursionTokenChoice, x_BTD: jax.Array, recursions: _Recursions
    ) -> tuple[jax.Array, dict]:
        probabilities_BTR, last_BT = self._depths(x_BTD)
        for r in range(self.spec.times):
            chosen = choose_positive((last_BT >= r).astype(jnp.float32), recursions.real_BT)
            weight_BT = jnp.where(last_BT == r, probabilities_BTR[..., r], 1.0).astype(x_BTD.dtype)
            x_BTD = chosen.add(
                x_BTD, recursions.through(r, chosen, x_BTD) * chosen.take(weight_BT)[..., None]
            )
        return x_BTD, _balance(probabilities_BTR, last_BT, recursions, router.balance_loss)

    def _depths(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(probabilities of each number of recursions [B, T, R] float32, the last recursion of each token [B, T])."""
        D, R = x_BTD.shape[-1], self.spec.times
        declared = "router", (D, R), ("embed", None), fan_in_normal(D)
        role = "how many recursions a token goes through"
        w_DR = param(self, in_float32(self.ctx), *declared, inputs=1, role=role)
        logits_BTR = jnp.einsum(
            "BTD,DR->BTR", x_BTD.astype(jnp.float32), w_DR, precision=jax.lax.Precision.HIGHEST
        )
        return jax.nn.softmax(logits_BTR, axis=-1), jnp.argmax(logits_BTR, axis=-1)


class _Recursions:
    """The blocks, with the cache states and losses of the recursions so far."""

    def __init__(self, blocks: list[BlockModule], info: TokenInfo, cache: dict | None):
        self.blocks, self.info, self.cache = blocks, info, cache
        self.real_BT = real_tokens(info)
        self.weights_BT = token_weights(info, self.real_BT)
        self.states: dict[str, jax.Array] = {}
        self.aux: dict[str, WeightedSum] = {}

    def through(self, r: int, chosen: Chosen, x_BTD: jax.Array) -> jax.Array:
        """[B, M, D]: what the blocks add to the chosen tokens in recursion `r`."""
        start_BMD = chosen.take(x_BTD)
        for i, block in enumerate(self.blocks):
            prefix, state = f"recursion_{r}/block_{i}/", None
            if self.cache is not None:
                state = {
                    key.removeprefix(prefix): v for key, v in self.cache.items() if key.startswith(prefix)
                }
            change_BMD, state, aux = run_chosen(block, chosen, x_BTD, state, self.info)
            x_BTD = chosen.add(x_BTD, change_BMD)
            self.states |= {prefix + key: value for key, value in (state or {}).items()}
            self.aux = add_up(self.aux, aux)
        return chosen.take(x_BTD) - start_BMD


def _balance(
    probabilities_BTR: jax.Array, last_BT: jax.Array, recursions: _Recursions, coefficient: float
) -> dict[str, WeightedSum]:
    counts_BTR = jax.nn.one_hot(last_BT, probabilities_BTR.shape[-1])
    loss_BT = balance_of_tokens(
        counts_BTR, probabilities_BTR, recursions.real_BT, recursions.info, "document"
    )
    return {
        "loss": WeightedSum.of(coefficient * loss_BT, recursions.weights_BT),
        "recursion_balance": WeightedSum.of(loss_BT, recursions.real_BT),
        "recursions": WeightedSum.of(last_BT + 1.0, recursions.real_BT),
    }

"""Routers of a mixture of experts choose the experts of each token, and their weights.

Tokens choose experts: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961; groups of experts
and the choice bias: DeepSeek-AI 2024, arXiv:2405.04434 and 2412.19437. Experts choose tokens: Zhou et al. 2022,
arXiv:2202.09368.
"""

# B batch, T tokens, E experts, K experts of a token, G groups of experts, S tokens of an expert in one row

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}

GROUP_SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "max": lambda scores_BTGI: scores_BTGI.max(-1),  # DeepSeek-V2
    "top2": lambda scores_BTGI: jax.lax.top_k(scores_BTGI, 2)[0].sum(-1),  # DeepSeek-V3
}


@dataclasses.dataclass(frozen=True)
class Router:
    """Token choice: each token takes the experts with its highest scores, weighted by these scores, in float32.

    "softmax" with `normalize` is a softmax over the chosen experts' logits (gpt-oss, GraniteMoE).
    """

    scores: str = "softmax"  # or "sigmoid"
    normalize: bool = True  # divide the weights of a token's experts by their norm
    norm_order: float = 1.0  # 1: the weights sum to one
    norm_eps: float = 1e-20  # added to the norm
    scale: float = 1.0  # multiplies the normalized weights
    bias: bool = False  # added to the logits
    choice_bias: bool = False  # a bias of the scores that affects the choice, not the weights
    num_groups: int = 1
    groups_per_token: int = 1  # a token's experts come from its best groups
    group_score: str = "top2"  # a group's score: the sum of its two best experts, or "max", its best

    def __post_init__(self):
        for field, table in (("scores", SCORES), ("group_score", GROUP_SCORES)):
            if getattr(self, field) not in table:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(table)}.")
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(f"groups_per_token={self.groups_per_token} is not in 1 to {self.num_groups}.")

    def check(self, num_experts: int, experts_per_token: int) -> None:
        """Raises ValueError when the groups do not fit the experts."""
        size = num_experts // self.num_groups
        if num_experts % self.num_groups or size * self.groups_per_token < experts_per_token:
            raise ValueError(
                f"num_experts={num_experts}, num_groups={self.num_groups}, groups_per_token={self.groups_per_token}: "
                f"groups must be equal, and those of a token must have experts_per_token={experts_per_token} experts."
            )
        if self.num_groups > 1 and self.group_score == "top2" and size < 2:
            raise ValueError(
                f"group_score='top2' needs two experts a group; {self.num_groups} groups have one."
            )

    def probabilities(self, logits_BTE: jax.Array) -> jax.Array:
        """The scores, normalized to a distribution over experts."""
        scores_BTE = SCORES[self.scores](logits_BTE)
        return scores_BTE / jnp.maximum(scores_BTE.sum(-1, keepdims=True), 1e-20)

    def choose(
        self, logits_BTE: jax.Array, choice_bias_E: jax.Array | None, experts_per_token: int
    ) -> tuple[jax.Array, jax.Array]:
        """(chosen experts [B, T, K] int32, best first, their weights [B, T, K] float32)."""
        scores_BTE = SCORES[self.scores](logits_BTE)
        ranked_BTE = scores_BTE if choice_bias_E is None else scores_BTE + choice_bias_E
        ranked_BTE = self._within_best_groups(jax.lax.stop_gradient(ranked_BTE))
        chosen_BTK = jax.lax.top_k(ranked_BTE, experts_per_token)[1]
        weights_BTK = jnp.take_along_axis(scores_BTE, chosen_BTK, axis=-1)
        if self.normalize:
            norm_BT1 = jnp.sum(weights_BTK**self.norm_order, -1, keepdims=True) ** (1 / self.norm_order)
            weights_BTK = weights_BTK / (norm_BT1 + self.norm_eps)
        return chosen_BTK, weights_BTK * self.scale

    def _within_best_groups(self, ranked_BTE: jax.Array) -> jax.Array:
        if self.num_groups == 1:
            return ranked_BTE
        B, T, E = ranked_BTE.shape
        ranked_BTGI = ranked_BTE.reshape(B, T, self.num_groups, E // self.num_groups)
        group_BTG = GROUP_SCORES[self.group_score](ranked_BTGI)
        best = jax.lax.top_k(group_BTG, self.groups_per_token)[1]
        allowed_BTG = jax.nn.one_hot(best, self.num_groups, dtype=bool).any(axis=-2)
        return jnp.where(allowed_BTG[..., None], ranked_BTGI, -jnp.inf).reshape(B, T, E)


@dataclasses.dataclass(frozen=True)
class SparseMixer:
    """Each token takes its best experts one by one, weighted by a softmax over the remaining experts with close logits.

    PhiMoE, Liu et al. 2024, arXiv:2409.12136, at inference; its sampling of experts in training is not implemented.
    """

    jitter: float = 0.01  # close: below the best by at most 2 * jitter, relative to the larger of the two
    bias: bool = False  # added to the logits

    def check(self, num_experts: int, experts_per_token: int) -> None:
        pass

    def probabilities(self, logits_BTE: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits_BTE)

    def choose(
        self, logits_BTE: jax.Array, choice_bias_E: None, experts_per_token: int
    ) -> tuple[jax.Array, jax.Array]:
        """As `Router.choose`."""
        left_BTE, chosen, weights = logits_BTE, [], []
        for _ in range(experts_per_token):
            best_BT1 = left_BTE.max(-1, keepdims=True)
            size_BTE = jnp.maximum(jnp.abs(logits_BTE), best_BT1)
            # not a quotient, which is no number where all logits are 0
            close_BTE = best_BT1 - logits_BTE <= 2 * self.jitter * size_BTE
            weights_BTE = jax.nn.softmax(jnp.where(close_BTE, left_BTE, -jnp.inf))
            chosen.append(left_BTE.argmax(-1))
            weights.append(jnp.take_along_axis(weights_BTE, chosen[-1][..., None], -1)[..., 0])
            left_BTE = jnp.where(
                jax.nn.one_hot(chosen[-1], left_BTE.shape[-1], dtype=bool), -jnp.inf, left_BTE
            )
        return jnp.stack(chosen, -1), jnp.stack(weights, -1)


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Expert choice: each expert takes the tokens of a row with its highest scores, so the load is even.

    It is not causal, because the choice of a token depends on later tokens, so it cannot decode with a cache.
    """

    bias: bool = False  # added to the logits

    def check(self, num_experts: int, experts_per_token: int) -> None:
        pass

    def probabilities(self, logits_BTE: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits_BTE)

    def choose_tokens(
        self, logits_BTE: jax.Array, real_BT: jax.Array, tokens_per_expert: int
    ) -> tuple[jax.Array, jax.Array]:
        """(tokens of each expert [B, E, S] int32, their weights [B, E, S] float32, 0 for padding)."""
        scores_BET = jnp.where(real_BT[:, None], jax.nn.softmax(logits_BTE).swapaxes(1, 2), 0.0)
        weights_BES, tokens_BES = jax.lax.top_k(scores_BET, tokens_per_expert)
        return tokens_BES, weights_BES

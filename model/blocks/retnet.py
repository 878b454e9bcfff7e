"""The retention mixer of RetNet: linear attention with rotary positions and one fixed decay a head.

Sun et al. 2023, arXiv:2307.08621, in the form without xPos scales that published checkpoints have. The paper's
divisors of the scores are left out: the norm of each head's output cancels them.
"""

# B batch, T tokens, D model width, H heads, K key width, V value width

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from model.blocks.common import Context, TokenInfo
from model.blocks.linear import linear, linear_out
from model.blocks.positions import Rope
from model.blocks.recurrence import OUTPUT_GATE, READ_OUT, begin, finish, head_rms_norm
from model.kernels.ssd import ssd
from model.sharding import constrain

HEADS = ("heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class Retention:
    """Head h forgets at the rate log(1 - 2^(-5-h)) a token."""

    num_heads: int
    key_dim: int
    value_dim: int
    rope: Rope = Rope()
    norm_eps: float = 1e-5  # of the RMS norm of each head's output, before the gate

    def __post_init__(self):
        if self.key_dim % 2:
            raise ValueError(
                f"key_dim={self.key_dim} is odd; rotary positions rotate pairs of channels, so use an even width."
            )

    def module(self, ctx: Context, name: str) -> nn.Module:
        return RetentionModule(self, ctx, name=name)

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """A row's state [H, V, K]."""
        return {"state": jnp.zeros((num_rows, self.num_heads, self.value_dim, self.key_dim), jnp.float32)}

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {"state": ("rows", "act_heads", None, None)}

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of the forward pass, with the recurrence run token by token."""
        projected = self.num_heads * (2 * self.key_dim + 3 * self.value_dim)
        return 2 * width * projected + 4 * self.num_heads * self.key_dim * self.value_dim

    def log_decay(self) -> np.ndarray:
        """[H] float32."""
        return np.log1p(-(2.0 ** (-5.0 - np.arange(self.num_heads)))).astype(np.float32)


class RetentionModule(nn.Module):
    spec: Retention
    ctx: Context

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo, cache: dict | None):
        spec, ctx = self.spec, self.ctx
        x_BTD, order = begin(spec, x_BTD, info, cache)
        q_BTHK = self._project("q", x_BTD, spec.key_dim, "queries: where a token reads the state")
        k_BTHK = self._project("k", x_BTD, spec.key_dim, "keys: where it writes")
        q_BTHK, k_BTHK = (spec.rope(x_BTHK, order.positions_BT) for x_BTHK in (q_BTHK, k_BTHK))
        v_BTHV = self._project("v", x_BTD, spec.value_dim, "values: what it writes")
        z_BTHV = self._project("z", x_BTD, spec.value_dim, OUTPUT_GATE)
        log_decay_BTH = jnp.broadcast_to(spec.log_decay(), (*x_BTD.shape[:2], spec.num_heads))
        o_BTHV, state_BHVK = ssd(
            order.only_real(v_BTHV),
            order.only_real(log_decay_BTH),
            k_BTHK,
            q_BTHK * spec.key_dim**-0.5,
            order.first_BT,
            order.state["state"],
            rules=ctx.rules,
        )
        gate_BTHV = nn.silu(z_BTHV.astype(jnp.float32))
        y_BTHV = (head_rms_norm(self, ctx, o_BTHV, spec.norm_eps) * gate_BTHV).astype(ctx.dtype)
        return finish(linear_out(self, y_BTHV, HEADS, READ_OUT), {"state": state_BHVK}, order, info, cache)

    def _project(self, name: str, x_BTD: jax.Array, width: int, role: str) -> jax.Array:
        y_BTHC = linear(self, name, x_BTD, (self.spec.num_heads, width), HEADS, role)
        return constrain(y_BTHC, self.ctx.rules, "batch", "length", "act_heads", None)

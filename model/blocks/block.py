"""The block, a model's unit of depth: a token mixer and a feed-forward network with residual connections."""

# B batch, T tokens, D model width

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.common import Context, FeedForward, Report, TokenInfo
from model.blocks.cross_attention import CrossAttention
from model.blocks.norms import Norm, RMSNorm
from model.blocks.residual import Connection, HyperConnections, ParallelResidual, Residual
from model.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Block:
    """x + mixer(norm(x)), then x + cross(norm(x)) if the model has an encoder, then x + ffn(norm(x)).

    `post_norm` normalizes the outputs of mixer and network before they are added (OLMo 2; together with `norm`, Gemma
    2's sandwich). `sum_norm` normalizes the sums (BERT; with a `skip_scale`, DeepNorm).
    """

    mixer: Any = None  # a `Mixer` of model.blocks.common; None: the block is a network alone
    ffn: Any = None  # a `FeedForward`; None: the block is a mixer alone
    norm: Norm | None = RMSNorm()
    norm_mixer: bool = True  # False: no norm before the mixer (ModernBERT's first block)
    post_norm: Norm | None = None
    sum_norm: Norm | None = None
    residual: Residual | ParallelResidual | HyperConnections = Residual()
    cross: CrossAttention | None = None  # attends to `ModelConfig.encoder`

    def __post_init__(self):
        if self.mixer is None and self.ffn is None:
            raise ValueError("a block needs a mixer or a network, and both are None.")
        parallel = self.residual.parallel
        if self.cross is not None and parallel != "no":
            raise ValueError(f"a parallel residual ({parallel}) does not support cross attention.")
        if parallel != "no" and (self.mixer is None or self.ffn is None):
            raise ValueError(f"a parallel residual ({parallel}) needs a mixer and a network.")

    @property
    def parts(self) -> tuple[Any, ...]:
        """The mixer, cross attention and network that the block has."""
        return tuple(part for part in (self.mixer, self.cross, self.ffn) if part is not None)

    @property
    def networks(self) -> tuple[FeedForward, ...]:
        """Its feed-forward network and those of nested blocks."""
        inside = (network for block in getattr(self.mixer, "blocks", ()) for network in block.networks)
        return *(() if self.ffn is None else (self.ffn,)), *inside

    def init_cache(
        self, num_pages: int, page_size: int, num_rows: int, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """The mixer's empty state; `cross` has its own `init_cache`."""
        return {} if self.mixer is None else self.mixer.init_cache(num_pages, page_size, num_rows, dtype)

    def cache_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of `init_cache`."""
        return {} if self.mixer is None else self.mixer.cache_axes()

    def active_share(self, path: str) -> float:
        """The share of a parameter that one token uses; `path` is within the block."""
        part, _, rest = path.partition("/")
        share = getattr(getattr(self, part, None), "active_share", None)
        return 1.0 if share is None else share(rest)

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """Mean FLOPs of the forward pass over a row of `seq_len` tokens."""
        mixed = self.mixer.flops_per_token(width, seq_len) if self.mixer else 0
        crossed = self.cross.flops_per_token(width, seq_len) if self.cross else 0
        return mixed + crossed + (self.ffn.flops_per_token(width) if self.ffn else 0)


NORM_ROLES = {
    "mixer_norm": "what the mixer reads",
    "mixer_post_norm": "what the mixer adds",
    "mixer_sum_norm": "the sum after the mixer",
    "cross_norm": "what cross attention reads",
    "cross_post_norm": "what cross attention adds",
    "cross_sum_norm": "the sum after cross attention",
    "ffn_norm": "what the feed-forward network reads",
    "ffn_post_norm": "what the feed-forward network adds",
    "ffn_sum_norm": "the sum after the feed-forward network",
}


class BlockModule(nn.Module):
    spec: Block
    ctx: Context

    @nn.compact
    def __call__(self, x: jax.Array, state: dict | None, info: TokenInfo):
        """(x, (new state, `Report`)); x is the residual stream, [B, T, D] for a plain residual."""
        if self.spec.residual.parallel == "no":
            x, result = self._sequential(x, state, info)
        else:
            x, result = self._parallel(x, state, info)
        self.sow("intermediates", "residual", x)
        return x, result

    def _sequential(self, x: jax.Array, state: dict | None, info: TokenInfo):
        spec, ctx, report = self.spec, self._ctx(info), Report()
        new_state = None if state is None else {}
        if spec.mixer is not None:
            connection = self._connection("mixer")
            read_BTD = self._norm(self._mixer_norm(), "mixer", "norm", connection.read(x))
            y_BTD, mixed, report = self._mix(read_BTD, _part(state, cross=False), info)
            x, new_state = self._add("mixer", connection, x, y_BTD), mixed
        if spec.cross is not None:
            connection = self._connection("cross")
            read_BTD = self._norm(spec.norm, "cross", "norm", connection.read(x))
            y_BTD, crossed = spec.cross.module(ctx, "cross")(read_BTD, info, _part(state, cross=True))
            x = self._add("cross", connection, x, y_BTD)
            new_state = new_state if crossed is None else (new_state or {}) | crossed
        if spec.ffn is not None:
            connection = self._connection("ffn")
            read_BTD = self._norm(spec.norm, "ffn", "norm", connection.read(x))
            y_BTD, aux = spec.ffn.module(ctx, "ffn")(read_BTD, info)
            x = self._add("ffn", connection, x, y_BTD)
            report = report.join(Report(aux))
        return x, (new_state, report)

    def _parallel(self, x: jax.Array, state: dict | None, info: TokenInfo):
        spec, connection = self.spec, self._connection("mixer")
        read_BTD = self._norm(self._mixer_norm(), "mixer", "norm", connection.read(x))
        y_BTD, state, report = self._mix(read_BTD, state, info)
        if spec.residual.parallel == "two norms":
            read_BTD = self._norm(spec.norm, "ffn", "norm", connection.read(x))
        z_BTD, aux = spec.ffn.module(self._ctx(info), "ffn")(read_BTD, info)
        return self._add("mixer", connection, x, y_BTD + z_BTD), (state, report.join(Report(aux)))

    def _connection(self, part: str) -> Connection:
        return self.spec.residual.connection(self.ctx, f"{part}_residual")

    def _ctx(self, info: TokenInfo) -> Context:
        """The context of the parts, with the adapters of the rows."""
        return dataclasses.replace(self.ctx, adapter=info.adapter)

    def _mixer_norm(self) -> Norm | None:
        return self.spec.norm if self.spec.norm_mixer else None

    def _mix(self, read_BTD: jax.Array, state: dict | None, info: TokenInfo):
        y_BTD, state, *report = self.spec.mixer.module(self._ctx(info), "mixer")(read_BTD, info, state)
        return y_BTD, state, Report().join(*report)

    def _norm(self, norm: Norm | None, part: str, where: str, x_BTD: jax.Array) -> jax.Array:
        if norm is None:
            return x_BTD
        return norm.module(self.ctx, f"{part}_{where}", role=NORM_ROLES[f"{part}_{where}"])(x_BTD)

    def _add(self, part: str, connection: Connection, x: jax.Array, y_BTD: jax.Array) -> jax.Array:
        spec = self.spec
        y_BTD = self._norm(spec.post_norm, part, "post_norm", y_BTD)
        x = self._norm(spec.sum_norm, part, "sum_norm", connection.write(x, y_BTD))
        return constrain(x, self.ctx.rules, "batch", "length", *[None] * (x.ndim - 3), "act_embed")


def _part(state: dict | None, *, cross: bool) -> dict | None:
    """The part of a block's state that belongs to its cross attention, or to its mixer."""
    if state is None:
        return None
    return {key: value for key, value in state.items() if key.startswith("cross_") == cross}

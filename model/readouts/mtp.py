"""Multi-token prediction (MTP): logits of tokens after the next one.

Sequential modules: DeepSeek-V3, 2024, arXiv:2412.19437, section 2.2. Parallel heads on one trunk: Gloeckle et al. 2024,
arXiv:2404.19737. At token i, module (or head) k, counted from 1, gives the logits of token i + 1 + k.
"""

# B batch, T tokens, D model width

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.blocks.block import Block
from model.blocks.common import Context, TokenInfo, add_up
from model.blocks.linear import linear
from model.blocks.norms import Norm, RMSNorm
from model.readouts.hidden_states import HiddenStates
from model.sharding import constrain
from model.stacks import Stack, run_blocks, run_stack
from model.weighted import WeightedSum

Read = tuple[list[jax.Array], dict[str, WeightedSum]]  # (the hidden states of each module, the blocks' aux)


@dataclasses.dataclass(frozen=True)
class SequentialMTP:
    """h_k[i] = norm(block(join [norm(embedding of token i + k), norm(h_(k-1)[i])])), followed by the model's head.

    h_0 is the hidden state after the model's final norm, and h_k is after the module's norm, as in transformers. (vLLM
    has the same h_0, but passes DeepSeek's h_k on before that norm, which differs from the second module on.) If token
    i + k is in another segment or beyond the row, its embedding is zero, so no other document is seen.
    """

    blocks: tuple[Block, ...]  # one for each module
    norm: Norm = RMSNorm()

    def __post_init__(self):
        _check(self.blocks)

    def read(self, ctx: Context, hidden_states: HiddenStates, info: TokenInfo) -> Read:
        """Call it within a compact method; the MTP modules become submodules of the caller."""
        states, aux, hidden_BTD = [], {}, hidden_states.hidden_BTD
        ctx = dataclasses.replace(ctx, adapter=info.adapter)
        for name, block in mtp_blocks(self).items():
            ahead_BTD = _embedding_ahead(hidden_states.embedded_BTD, info.segment_ids, len(states) + 1)
            hidden_BTD, new_aux = SequentialModule(self, block, ctx, name=name)(ahead_BTD, hidden_BTD, info)
            states.append(hidden_BTD)
            aux = add_up(aux, new_aux)
        return states, aux

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """Mean FLOPs of the forward pass without logits over a row of `seq_len` tokens."""
        return sum(block.flops_per_token(width, seq_len) + 2 * 2 * width**2 for block in self.blocks)


@dataclasses.dataclass(frozen=True)
class ParallelMTP:
    """Head k is a block with the input of the model's last block, followed by the model's final norm and head.

    The last block is the head of the next token.
    """

    blocks: tuple[Block, ...]  # one for each head

    def __post_init__(self):
        _check(self.blocks)

    def read(self, ctx: Context, hidden_states: HiddenStates, info: TokenInfo) -> Read:
        """As `SequentialMTP.read`."""
        states, aux = [], {}
        for name, block in mtp_blocks(self).items():
            x_BTD, new_aux = ParallelModule(block, ctx, name=name)(hidden_states.before_last, info)
            states.append(hidden_states.final_norm(x_BTD))
            aux = add_up(aux, new_aux)
        return states, aux

    def flops_per_token(self, width: int, seq_len: int) -> float:
        """As `SequentialMTP.flops_per_token`."""
        return sum(block.flops_per_token(width, seq_len) for block in self.blocks)


MTP = SequentialMTP | ParallelMTP


HIDDEN = "the hidden state of the model or the previous module"


class SequentialModule(nn.Module):
    spec: SequentialMTP
    block: Block
    ctx: Context

    @nn.compact
    def __call__(self, ahead_BTD: jax.Array, hidden_BTD: jax.Array, info: TokenInfo):
        norm, ctx, D = self.spec.norm, self.ctx, self.ctx.width
        read = (
            norm.module(ctx, "embedding_norm", role="the embedding of the later token")(ahead_BTD),
            norm.module(ctx, "hidden_norm", role=HIDDEN)(hidden_BTD),
        )
        joined_BTE = jnp.concatenate(read, axis=-1)
        role = "combines the later token and the hidden state"
        x_BTD = linear(self, "join", joined_BTE, (D,), (None,), role)
        x_BTD = constrain(x_BTD, ctx.rules, "batch", "length", "act_embed")
        unrolled = dataclasses.replace(ctx, scan=False)
        x_BTD, _, report = run_stack(unrolled, Stack("", (self.block,)), x_BTD, None, info)
        return norm.module(ctx, "final_norm", role="the input of this module's logits")(x_BTD), report.aux


class ParallelModule(nn.Module):
    block: Block
    ctx: Context

    @nn.compact
    def __call__(self, trunk: jax.Array, info: TokenInfo):
        """Of the residual stream, which hyper-connections make wider than [B, T, D]."""
        ctx = dataclasses.replace(self.ctx, scan=False)
        x, _, report = run_blocks(ctx, Stack("", (self.block,)).runs(False), trunk, None, info)
        return self.block.residual.end(x), report.aux


def mtp_blocks(mtp: MTP | None) -> dict[str, Block]:
    """Parameter name of each module -> its block, nearest token first."""
    return {} if mtp is None else {f"mtp_{k}": block for k, block in enumerate(mtp.blocks, 1)}


def look_ahead(x: jax.Array, k: int) -> jax.Array:
    """[B, T, ...]: at token i the value of `x` at token i + k, zero beyond the row."""
    ends = [(0, 0), (0, min(k, x.shape[1]))] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x[:, k:], ends)


def same_segment(segment_ids_BT: jax.Array, k: int) -> jax.Array:
    """[B, T] bool: whether token i + k is in the row and in the segment of token i."""
    return (segment_ids_BT != 0) & (segment_ids_BT == look_ahead(segment_ids_BT, k))


def _embedding_ahead(embedded_BTD: jax.Array, segment_ids_BT: jax.Array | None, k: int) -> jax.Array:
    ahead_BTD = look_ahead(embedded_BTD, k)
    if segment_ids_BT is None:
        return ahead_BTD
    return jnp.where(same_segment(segment_ids_BT, k)[:, :, None], ahead_BTD, 0)


def _check(blocks: tuple[Block, ...]) -> None:
    if not blocks:
        raise ValueError(
            "multi-token prediction needs a block for each token that it predicts; use mtp=None for none."
        )

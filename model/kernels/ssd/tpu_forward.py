"""The forward kernel of state-space duality: a block of heads goes from chunk to chunk with its states.

Within a chunk tokens attend to one another, with a decay for each pair; all earlier tokens are one state a head. Let S
and S' be a head's states before and after a chunk. With decays from S to its tokens (into), from them to S' (out), from
S to S' (carry) and from token to token (D):

    y = into q S + P v, P = D q k^T
    S' = carry S + k^T (out v)
"""

# B batch, T tokens of a block, Q tokens of a chunk, R heads of a block, J blocks of heads of a walk, W walks
# I blocks of tokens, P value width, N key (state) width, F = R P channels of a block's values

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.recurrence.tpu_chunks import (
    CHUNK,
    ChunkMask,
    Decays,
    chunk_at,
    chunk_mask,
    cost,
    decays,
    product,
    upright,
)


class Inputs(NamedTuple):
    """What both kernels read beside states, or its gradients: arrays of all tokens, in a kernel refs to its blocks."""

    v: Any  # [B, T, H P], in a kernel [T, F]
    scale: Any  # of v, float32 [B, M, R, T], in a kernel [R, T]; None: 1
    totals: Any  # float32 [B, M, R, T], in a kernel [R, T]: of log decays from the chunk's first token on
    k: Any  # [B, T, G N], in a kernel [T, N]; a walk's part of gradients float32 [B, W, T, N]
    q: Any  # likewise
    documents: Any  # int32 [B, 1, T], in a kernel [1, T]; of gradients None

    def chunk(self, at) -> Chunk:
        """In a kernel: the chunk `at` of its block."""
        here = chunk_at(at)
        mask = chunk_mask(self.documents[:, here])
        scale_QL = None if self.scale is None else upright(self.scale[:, here])
        return Chunk(here, mask, decays(self.totals[:, here], mask), self.k[here], self.q[here], scale_QL)


class Results(NamedTuple):
    """Of the forward kernel, or gradients of them, float32."""

    y: Any  # [B, T, H P], in a kernel [T, F]
    last: Any  # [B, N, H P], in a kernel [N, F]: the states after the last token


class Chunk(NamedTuple):
    """What the heads of a block share."""

    here: Any  # its tokens in the block
    mask: ChunkMask
    decay: Decays
    k_QN: jax.Array
    q_QN: jax.Array
    scale_QL: jax.Array | None  # of values, one head a lane

    def scaled(self, h: int, v_QP: jax.Array) -> jax.Array:
        """Values of the block's head h, or their gradient, multiplied in float32."""
        if self.scale_QL is None:
            return v_QP
        return (v_QP.astype(jnp.float32) * self.scale_QL[:, h : h + 1]).astype(v_QP.dtype)

    def product(self, a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
        """With factors as wide as the inputs."""
        return product(a, b, contract, self.k_QN.dtype)

    def scores(self) -> jax.Array:
        """q k^T"""
        return self.product(self.q_QN, self.k_QN, (1, 1))


@dataclasses.dataclass(frozen=True)
class SSDCall:
    """A walk goes through the tokens of a row with some heads of one group, block of heads after block of heads."""

    groups: int
    walks: int  # of a group
    blocks: int  # of heads, of a walk
    heads: int  # of a block
    width: int  # of a head's values
    tokens: int  # of a block
    scaled: bool  # values are
    interpret: bool

    @property
    def channels(self) -> int:
        """Of the values of a block's heads."""
        return self.heads * self.width

    def grid(self, B: int, T: int) -> tuple[int, ...]:
        return B, self.groups * self.walks, T // self.tokens, self.blocks

    def head(self, h: int) -> slice:
        """The channels of a block's head h."""
        return slice(h * self.width, (h + 1) * self.width)

    def specs(self, N: int, at) -> Inputs:
        """Where step t of a walk has the block of tokens at(t)."""
        R, T = self.heads, self.tokens
        of_heads = pl.BlockSpec((None, None, R, T), lambda b, w, t, j: (b, w * self.blocks + j, 0, at(t)))
        keys = pl.BlockSpec((None, T, N), lambda b, w, t, j: (b, at(t), jax.lax.div(w, self.walks)))
        return Inputs(
            v=pl.BlockSpec((None, T, self.channels), lambda b, w, t, j: (b, at(t), w * self.blocks + j)),
            scale=of_heads if self.scaled else None,
            totals=of_heads,
            k=keys,
            q=keys,
            documents=pl.BlockSpec((None, 1, T), lambda b, w, t, j: (b, 0, at(t))),
        )

    def state_spec(self, N: int, step: int, resting: int) -> pl.BlockSpec:
        """Of states that only one step of a walk needs; at the others the block is the `resting` one of the walk, so
        that nothing is moved."""

        def where(b, w, t, j):
            return b, 0, w * self.blocks + jnp.where(t == step, j, resting)

        return pl.BlockSpec((None, N, self.channels), where)

    def entering_spec(self, N: int, at) -> pl.BlockSpec:
        """Of the states before each block of tokens."""
        return pl.BlockSpec(
            (None, None, N, self.channels), lambda b, w, t, j: (b, at(t), 0, w * self.blocks + j)
        )


# rows and walks are for any core; blocks of tokens and of heads follow one another
DIMENSIONS = ("parallel", "parallel", "arbitrary", "arbitrary")


def forward(call: SSDCall, inputs: Inputs, state: jax.Array, saves: bool) -> tuple[Results, jax.Array | None]:
    """(results from the states [B, N, H P] before the first token, if `saves` those before each block of tokens
    [B, I, N, H P]), float32."""
    (B, T, F), N = inputs.v.shape, state.shape[1]
    grid = call.grid(B, T)
    I, J = grid[2:]
    specs = call.specs(N, lambda t: t)
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    results = Results(float32(B, T, F), float32(B, N, F))
    entering = float32(B, I, N, F) if saves else None
    multiplied = grid[1] * J * CHUNK * N + F * (CHUNK + 2 * N)  # for a token
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid=grid,
        in_specs=[specs, call.state_spec(N, 0, J - 1)],
        out_specs=[
            Results(specs.v, call.state_spec(N, I - 1, 0)),
            call.entering_spec(N, lambda t: t) if saves else None,
        ],
        out_shape=[results, entering],
        scratch_shapes=[pltpu.VMEM((J, N, call.channels), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=DIMENSIONS),
        cost_estimate=cost(
            B * T * multiplied, B * T * F // call.width, (*inputs, state), (*results, entering)
        ),
        interpret=call.interpret,
        name="ssd_forward",
    )(inputs, state)


def _kernel(call: SSDCall, inputs: Inputs, start_NF, results: Results, entering_NF, states_JNF):
    t, state_NF = pl.program_id(2), states_JNF.at[pl.program_id(3)]

    @pl.when(t == 0)
    def start():
        state_NF[...] = start_NF[...]

    if entering_NF is not None:
        entering_NF[...] = state_NF[...]

    def step(at, _):
        chunk = inputs.chunk(at)
        scores_QQ = chunk.scores()
        for h in range(call.heads):
            head = call.head(h)
            v_QP, before_NP = chunk.scaled(h, inputs.v[chunk.here, head]), state_NF[:, head]
            results.y[chunk.here, head] = _found(chunk, h, scores_QQ, v_QP, before_NP)
            state_NF[:, head] = after(chunk, h, v_QP, before_NP)
        return 0

    jax.lax.fori_loop(0, call.tokens // CHUNK, step, 0)

    @pl.when(t == pl.num_programs(2) - 1)
    def finish():
        results.last[...] = state_NF[...]


def _found(chunk: Chunk, h: int, scores_QQ: jax.Array, v_QP: jax.Array, state_NP: jax.Array) -> jax.Array:
    """y = into q S + P v of the block's head h, P = D q k^T."""
    weights_QQ = scores_QQ * chunk.decay.between(h, chunk.mask.pairs_QQ)
    within_QP = chunk.product(weights_QQ, v_QP, (1, 0))
    before_QP = chunk.product(chunk.q_QN, state_NP, (1, 0))
    return within_QP + before_QP * chunk.decay.into_QL[:, h : h + 1]


def after(chunk: Chunk, h: int, v_QP: jax.Array, state_NP: jax.Array) -> jax.Array:
    """S' = carry S + k^T (out v) of the block's head h."""
    out_QP = v_QP.astype(jnp.float32) * chunk.decay.out_QL[:, h : h + 1]
    return state_NP * chunk.decay.carry(h) + chunk.product(chunk.k_QN, out_QP, (0, 0))

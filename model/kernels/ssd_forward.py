"""The forward kernel of state-space duality: a block of heads goes from chunk to chunk with its states.

Within a chunk tokens meet as in attention, with a decay for each pair; what came before is one state a head.
"""

# B batch, T tokens of a block, Q tokens of a chunk, R heads of a block, J blocks of heads of a walk, W walks
# I blocks of tokens, P value width, N key (state) width, F = R P channels of a block's values

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.chunk_tiles import CHUNK, cost, decays, product, sight


@dataclasses.dataclass(frozen=True)
class Plan:
    """A walk goes through the tokens of a row with some heads of one group, block of heads after block of heads."""

    groups: int
    walks: int  # of a group
    blocks: int  # of heads, of a walk
    heads: int  # of a block
    width: int  # of a head's values
    tokens: int  # of a block
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

    def specs(self, N: int, at) -> tuple[pl.BlockSpec, ...]:
        """Of values, totals, keys (and queries) and documents, where step t of a walk has the block of tokens at(t)."""
        R, T = self.heads, self.tokens
        return (
            pl.BlockSpec((None, T, self.channels), lambda b, w, t, j: (b, at(t), w * self.blocks + j)),
            pl.BlockSpec((None, None, R, T), lambda b, w, t, j: (b, w * self.blocks + j, 0, at(t))),
            pl.BlockSpec((None, T, N), lambda b, w, t, j: (b, at(t), jax.lax.div(w, self.walks))),
            pl.BlockSpec((None, 1, T), lambda b, w, t, j: (b, 0, at(t))),
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


def forward(plan: Plan, v_BTF, totals_BMRT, k_BTE, q_BTE, documents_B1T, state_BNF, saves: bool):
    """(y [B, T, F], the last states [B, N, F], if `saves` those before each block of tokens [B, I, N, F]), float32."""
    (B, T, F), N = v_BTF.shape, state_BNF.shape[1]
    grid = plan.grid(B, T)
    I, J = grid[2:]
    values, totals, keys, documents = plan.specs(N, lambda t: t)
    multiplied = grid[1] * J * CHUNK * N + F * (CHUNK + 2 * N)  # for a token
    inputs = v_BTF, totals_BMRT, k_BTE, q_BTE, documents_B1T, state_BNF
    outputs = [
        jax.ShapeDtypeStruct((B, T, F), jnp.float32),
        jax.ShapeDtypeStruct((B, N, F), jnp.float32),
        jax.ShapeDtypeStruct((B, I, N, F), jnp.float32) if saves else None,
    ]
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=grid,
        in_specs=[values, totals, keys, keys, documents, plan.state_spec(N, 0, J - 1)],
        out_specs=[
            values,
            plan.state_spec(N, I - 1, 0),
            plan.entering_spec(N, lambda t: t) if saves else None,
        ],
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM((J, N, plan.channels), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=DIMENSIONS),
        cost_estimate=cost(B * T * multiplied, B * T * F // plan.width, inputs, outputs),
        interpret=plan.interpret,
        name="ssd_forward",
    )(*inputs)


def _kernel(
    plan: Plan,
    v_TF,
    totals_RT,
    k_TN,
    q_TN,
    documents_1T,
    start_NF,
    y_TF,
    last_NF,
    entering_NF,
    states_JNF,
):
    t, state_NF = pl.program_id(2), states_JNF.at[pl.program_id(3)]

    @pl.when(t == 0)
    def start():
        state_NF[...] = start_NF[...]

    if entering_NF is not None:
        entering_NF[...] = state_NF[...]

    def chunk(at, _):
        here = pl.ds(pl.multiple_of(at * CHUNK, CHUNK), CHUNK)
        k_QN, q_QN, sees = k_TN[here], q_TN[here], sight(documents_1T[:, here])
        decay, multiply = decays(totals_RT[:, here], sees), functools.partial(product, dtype=k_TN.dtype)
        scores_QQ = multiply(q_QN, k_QN, (1, 1))
        for h in range(plan.heads):
            head = plan.head(h)
            v_QP, state_NP = v_TF[here, head], state_NF[:, head]
            within_QP = multiply(scores_QQ * decay.between(h, sees.pairs_QQ), v_QP, (1, 0))
            before_QP = multiply(q_QN, state_NP, (1, 0))
            y_TF[here, head] = within_QP + before_QP * decay.into_QL[:, h : h + 1]
            state_NF[:, head] = state_NP * decay.kept(h) + added(k_QN, v_QP, decay.out_QL[:, h : h + 1])
        return _

    jax.lax.fori_loop(0, plan.tokens // CHUNK, chunk, 0)

    @pl.when(t == pl.num_programs(2) - 1)
    def finish():
        last_NF[...] = state_NF[...]


def added(k_QN: jax.Array, v_QP: jax.Array, out_Q1: jax.Array) -> jax.Array:
    """[N, P]: what a chunk adds to the state."""
    return product(k_QN, v_QP.astype(jnp.float32) * out_Q1, (0, 0), k_QN.dtype)

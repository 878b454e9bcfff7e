"""The forward kernel of the gated delta rule: one head goes from chunk to chunk with its state.

What the tokens of a chunk write, u, solves (1 + A) u = beta (v - what the state before the chunk knows of their keys);
A [Q, Q] is strictly lower triangular and does not depend on the state, so the chunks of a block are inverted together.
"""

# B batch, T tokens of a block, Q tokens of a chunk, H heads, I blocks of tokens, K key width, V value width

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.chunk_tiles import CHUNK, Decays, Sight, cost, decays, product, sight, upright


@dataclasses.dataclass(frozen=True)
class Plan:
    keys: int  # width, of one head
    values: int
    tokens: int  # of a block
    interpret: bool

    def specs(self, at) -> tuple[pl.BlockSpec, ...]:
        """Of keys (and queries), values, a row of numbers, documents and inverses, where step t has block at(t)."""
        T = self.tokens
        wide = lambda width: pl.BlockSpec((None, T, width), lambda b, h, t: (b, at(t), h))
        return (
            wide(self.keys),
            wide(self.values),
            pl.BlockSpec((None, None, 1, T), lambda b, h, t: (b, h, 0, at(t))),
            pl.BlockSpec((None, 1, T), lambda b, h, t: (b, 0, at(t))),
            wide(CHUNK),
        )

    def state_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.keys, self.values), lambda b, h, t: (b, h, 0, 0))

    def entering_spec(self, at) -> pl.BlockSpec:
        """Of the states before each block."""
        return pl.BlockSpec((None, None, None, self.keys, self.values), lambda b, h, t: (b, h, at(t), 0, 0))


DIMENSIONS = ("parallel", "parallel", "arbitrary")  # rows and heads are for any core


def forward(plan: Plan, q_BTE, k_BTE, v_BTF, totals_BH1T, beta_BH1T, documents_B1T, state_BHKV, saves: bool):
    """(o [B, T, F], the last state, if `saves` states before each block [B, H, I, K, V] and inverses [B, T, H Q]),
    float32."""
    (B, T, F), H = v_BTF.shape, state_BHKV.shape[1]
    I = T // plan.tokens
    keys, values, row, documents, inverses = plan.specs(lambda t: t)
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    inputs = q_BTE, k_BTE, v_BTF, totals_BH1T, beta_BH1T, documents_B1T, state_BHKV
    outputs = [
        float32(B, T, F),
        float32(*state_BHKV.shape),
        float32(B, H, I, plan.keys, plan.values) if saves else None,
        float32(B, T, H * CHUNK) if saves else None,
    ]
    # for a token of a head: two products of keys, those of the inverse, of what is written and found, and of the state
    multiplied = CHUNK * (2 * plan.keys + 12 * CHUNK + 2 * plan.values) + 3 * plan.keys * plan.values
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(B, H, I),
        in_specs=[keys, keys, values, row, row, documents, plan.state_spec()],
        out_specs=[
            values,
            plan.state_spec(),
            plan.entering_spec(lambda t: t) if saves else None,
            inverses if saves else None,
        ],
        out_shape=outputs,
        scratch_shapes=[
            pltpu.VMEM((plan.keys, plan.values), jnp.float32),
            None if saves else pltpu.VMEM((plan.tokens, CHUNK), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=DIMENSIONS),
        cost_estimate=cost(B * T * H * multiplied, B * T * H, inputs, outputs),
        interpret=plan.interpret,
        name="delta_forward",
    )(*inputs)


def _kernel(
    plan: Plan,
    q_TK,
    k_TK,
    v_TV,
    totals_1T,
    beta_1T,
    documents_1T,
    start_KV,
    o_TV,
    last_KV,
    entering_KV,
    saved_inverses_TQ,
    state_KV,
    own_inverses_TQ,
):
    inverses_TQ = own_inverses_TQ if saved_inverses_TQ is None else saved_inverses_TQ
    multiply = functools.partial(product, dtype=k_TK.dtype)

    @pl.when(pl.program_id(2) == 0)
    def start():
        state_KV[...] = start_KV[...]

    if entering_KV is not None:
        entering_KV[...] = state_KV[...]
    chunks = [pl.ds(at * CHUNK, CHUNK) for at in range(plan.tokens // CHUNK)]
    overlaps = []
    for here in chunks:
        sees, decay, beta_Q1 = of_chunk(totals_1T, beta_1T, documents_1T, here)
        products_QQ = multiply(k_TK[here], k_TK[here], (1, 1))
        overlaps.append(beta_Q1 * products_QQ * decay.between(0, sees.earlier_QQ))
    for here, inverse_QQ in zip(chunks, inverses_unit_lower(overlaps, k_TK.dtype), strict=True):
        inverses_TQ[here] = inverse_QQ

    def chunk(at, _):
        here = pl.ds(pl.multiple_of(at * CHUNK, CHUNK), CHUNK)
        sees, decay, beta_Q1 = of_chunk(totals_1T, beta_1T, documents_1T, here)
        k_QK, q_QK, v_QV, before_KV = k_TK[here], q_TK[here], v_TV[here], state_KV[...]
        new_QV = new_values(k_QK, v_QV, before_KV, decay)
        written_QV = exact(inverses_TQ[here], beta_Q1 * new_QV, (1, 0), k_TK.dtype)
        scores_QQ = multiply(q_QK, k_QK, (1, 1)) * decay.between(0, sees.pairs_QQ)
        found_QV = multiply(q_QK, before_KV, (1, 0)) * decay.into_QL[:, :1]
        o_TV[here] = found_QV + multiply(scores_QQ, written_QV, (1, 0))
        state_KV[...] = before_KV * decay.kept(0) + added(k_QK, written_QV, decay)
        return 0

    jax.lax.fori_loop(0, len(chunks), chunk, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def finish():
        last_KV[...] = state_KV[...]


def of_chunk(totals_1T, beta_1T, documents_1T, here) -> tuple[Sight, Decays, jax.Array]:
    """(who sees whom, decays, beta [Q, 1])."""
    sees = sight(documents_1T[:, here])
    return sees, decays(totals_1T[:, here], sees), upright(beta_1T[:, here])[:, :1]


def new_values(k_QK: jax.Array, v_QV: jax.Array, state_KV: jax.Array, decay: Decays) -> jax.Array:
    """Values less what the state before the chunk knows of their keys."""
    known_QV = product(k_QK, state_KV, (1, 0), k_QK.dtype) * decay.into_QL[:, :1]
    return v_QV.astype(jnp.float32) - known_QV


def added(k_QK: jax.Array, written_QV: jax.Array, decay: Decays) -> jax.Array:
    """[K, V]: what a chunk adds to the state."""
    return product(k_QK, written_QV * decay.out_QL[:, :1], (0, 0), k_QK.dtype)


def inverses_unit_lower(stricts: list[jax.Array], dtype: jnp.dtype) -> list[jax.Array]:
    """Of 1 + each strictly lower triangular [Q, Q], from the inverses of the diagonal's blocks, doubling their size.

    With the blocks' inverses X and C the corners that join two of them to one, the joined ones' are X - X C X. All
    matrices take each step together: one's products wait for one another, but not for those of the others.
    """
    row_QQ, column_QQ = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
    one_QQ = jnp.where(row_QQ == column_QQ, 1.0, 0.0)

    def corners(half, strict_QQ):
        """Of the blocks of twice the size: rows of the lower half, columns of the upper half."""
        joins = (row_QQ ^ column_QQ) & -half == half
        return jnp.where(joins, strict_QQ, 0)

    found, half = [one_QQ - corners(1, strict_QQ) for strict_QQ in stricts], 2
    while half < CHUNK:
        joined = [
            exact(corners(half, strict_QQ), x_QQ, (1, 0), dtype)
            for strict_QQ, x_QQ in zip(stricts, found, strict=True)
        ]
        found = [x_QQ - exact(x_QQ, y_QQ, (1, 0), dtype) for x_QQ, y_QQ in zip(found, joined, strict=True)]
        half *= 2
    return found


def exact(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """A product of float32 factors, of which more is kept than the `dtype` of what they come from says: of bfloat16
    the 16 bits of two halves, in half as many passes of the matrix unit as all 24 take."""
    if dtype != jnp.bfloat16:
        dims = (((contract[0],), (contract[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST)
    (a, more_a), (b, more_b) = _halves(a), _halves(b)
    multiply = functools.partial(product, contract=contract, dtype=dtype)
    return multiply(a, b) + (multiply(a, more_b) + multiply(more_a, b))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bfloat16 numbers, and what they lack."""
    first = x.astype(jnp.bfloat16)
    return first, (x - first.astype(jnp.float32)).astype(jnp.bfloat16)

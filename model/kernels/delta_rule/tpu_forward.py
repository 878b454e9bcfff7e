"""The forward kernel of the gated delta rule: one head goes from chunk to chunk with its state.

Let S and S' be the states before and after a chunk. With decays from S to its tokens (into), from them to S' (out),
from S to S' (carry) and from token to token (D), its tokens write u and read o:

    A = beta D k k^T below the diagonal, X = (1 + A)^-1
    u = X r, r = beta (v - into k S)
    o = into q S + P u, P = D q k^T up to the diagonal
    S' = carry S + k^T (out u)

A [Q, Q] does not depend on the state, so the chunks of a block are inverted together.
"""

# B batch, T tokens of a block, Q tokens of a chunk, H heads, I blocks of tokens, K key width, V value width

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

    q: Any  # [B, T, H K], in a kernel [T, K]
    k: Any  # likewise
    v: Any  # [B, T, H V], in a kernel [T, V]
    totals: Any  # float32 [B, H, 1, T], in a kernel [1, T]: of log decays from the chunk's first token on
    beta: Any  # likewise
    documents: Any  # int32 [B, 1, T], in a kernel [1, T]; of gradients None

    def chunk(self, at) -> Chunk:
        """In a kernel: the chunk `at` of its block."""
        here = chunk_at(at)
        mask = chunk_mask(self.documents[:, here])
        decay, beta_Q1 = decays(self.totals[:, here], mask), upright(self.beta[:, here])[:, :1]
        return Chunk(here, mask, decay, beta_Q1, self.q[here], self.k[here], self.v[here])


class Results(NamedTuple):
    """Of the forward kernel, or gradients of them, float32."""

    o: Any  # [B, T, H V], in a kernel [T, V]
    last: Any  # [B, H, K, V], in a kernel [K, V]: the state after the last token


class Saved(NamedTuple):
    """What the forward kernel leaves for the backward one, float32; None where there is none."""

    entering: Any = None  # [B, H, I, K, V], in a kernel [K, V]: the states before each block
    inverses: Any = None  # [B, T, H Q], in a kernel [T, Q]: of the systems of chunks


class Chunk(NamedTuple):
    here: Any  # its tokens in the block
    mask: ChunkMask
    decay: Decays
    beta_Q1: jax.Array
    q_QK: jax.Array
    k_QK: jax.Array
    v_QV: jax.Array

    def product(self, a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
        """With factors as wide as the inputs."""
        return product(a, b, contract, self.k_QK.dtype)

    def exact(self, a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
        return exact(a, b, contract, self.k_QK.dtype)


@dataclasses.dataclass(frozen=True)
class DeltaCall:
    keys: int  # width, of one head
    values: int
    tokens: int  # of a block
    interpret: bool

    def specs(self, at) -> tuple[Inputs, Results, Saved]:
        """Where step t has block at(t). A state before the first token has the spec of the one after the last."""
        K, V, T = self.keys, self.values, self.tokens
        wide = lambda width: pl.BlockSpec((None, T, width), lambda b, h, t: (b, at(t), h))
        row = pl.BlockSpec((None, None, 1, T), lambda b, h, t: (b, h, 0, at(t)))
        documents = pl.BlockSpec((None, 1, T), lambda b, h, t: (b, 0, at(t)))
        state = pl.BlockSpec((None, None, K, V), lambda b, h, t: (b, h, 0, 0))
        entering = pl.BlockSpec((None, None, None, K, V), lambda b, h, t: (b, h, at(t), 0, 0))
        return (
            Inputs(wide(K), wide(K), wide(V), row, row, documents),
            Results(wide(V), state),
            Saved(entering, wide(CHUNK)),
        )


DIMENSIONS = ("parallel", "parallel", "arbitrary")  # rows and heads are for any core


def forward(call: DeltaCall, inputs: Inputs, state: jax.Array, saves: bool) -> tuple[Results, Saved]:
    """From the states [B, H, K, V] float32 before the first token; nothing is saved unless `saves`."""
    (B, T, F), (_, H, K, V) = inputs.v.shape, state.shape
    in_spec, out_spec, saved_spec = call.specs(lambda t: t)
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    results = Results(float32(B, T, F), float32(B, H, K, V))
    saved = Saved(float32(B, H, T // call.tokens, K, V), float32(B, T, H * CHUNK)) if saves else Saved()
    # for a token of a head: two products of keys, those of the inverse, of what is written and found, and of the state
    multiplied = CHUNK * (2 * K + 12 * CHUNK + 2 * V) + 3 * K * V
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid=(B, H, T // call.tokens),
        in_specs=[in_spec, out_spec.last],
        out_specs=[out_spec, saved_spec if saves else Saved()],
        out_shape=[results, saved],
        scratch_shapes=[
            pltpu.VMEM((K, V), jnp.float32),
            None if saves else pltpu.VMEM((call.tokens, CHUNK), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=DIMENSIONS),
        cost_estimate=cost(B * T * H * multiplied, B * T * H, (*inputs, state), (*results, *saved)),
        interpret=call.interpret,
        name="delta_forward",
    )(inputs, state)


def _kernel(
    call: DeltaCall, inputs: Inputs, start_KV, results: Results, saved: Saved, state_KV, own_inverses_TQ
):
    inverses_TQ = own_inverses_TQ if saved.inverses is None else saved.inverses

    @pl.when(pl.program_id(2) == 0)
    def start():
        state_KV[...] = start_KV[...]

    if saved.entering is not None:
        saved.entering[...] = state_KV[...]
    _invert(call, inputs, inverses_TQ)

    def step(at, _):
        chunk, before_KV = inputs.chunk(at), state_KV[...]
        written_QV = written(chunk, inverses_TQ[chunk.here], new_values(chunk, before_KV))
        results.o[chunk.here] = _found(chunk, before_KV, written_QV)
        state_KV[...] = after(chunk, before_KV, written_QV)
        return 0

    jax.lax.fori_loop(0, call.tokens // CHUNK, step, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def finish():
        results.last[...] = state_KV[...]


def _invert(call: DeltaCall, inputs: Inputs, inverses_TQ) -> None:
    """X of all chunks of the block."""
    chunks = range(call.tokens // CHUNK)
    overlaps = [_overlap(inputs.chunk(at)) for at in chunks]
    for at, inverse_QQ in zip(chunks, inverses_unit_lower(overlaps, inputs.k.dtype), strict=True):
        inverses_TQ[chunk_at(at)] = inverse_QQ


def _overlap(chunk: Chunk) -> jax.Array:
    """A = beta D k k^T below the diagonal."""
    products_QQ = chunk.product(chunk.k_QK, chunk.k_QK, (1, 1))
    return chunk.beta_Q1 * products_QQ * chunk.decay.between(0, chunk.mask.earlier_QQ)


def new_values(chunk: Chunk, state_KV: jax.Array) -> jax.Array:
    """v - into k S: values less what the state before the chunk knows of their keys."""
    known_QV = chunk.product(chunk.k_QK, state_KV, (1, 0)) * chunk.decay.into_QL[:, :1]
    return chunk.v_QV.astype(jnp.float32) - known_QV


def written(chunk: Chunk, inverse_QQ: jax.Array, new_QV: jax.Array) -> jax.Array:
    """u = X beta (v - into k S)."""
    return chunk.exact(inverse_QQ, chunk.beta_Q1 * new_QV, (1, 0))


def _found(chunk: Chunk, state_KV: jax.Array, written_QV: jax.Array) -> jax.Array:
    """o = into q S + P u, P = D q k^T up to the diagonal."""
    products_QQ = chunk.product(chunk.q_QK, chunk.k_QK, (1, 1))
    scores_QQ = products_QQ * chunk.decay.between(0, chunk.mask.pairs_QQ)
    before_QV = chunk.product(chunk.q_QK, state_KV, (1, 0)) * chunk.decay.into_QL[:, :1]
    return before_QV + chunk.product(scores_QQ, written_QV, (1, 0))


def after(chunk: Chunk, state_KV: jax.Array, written_QV: jax.Array) -> jax.Array:
    """S' = carry S + k^T (out u)."""
    added_KV = chunk.product(chunk.k_QK, written_QV * chunk.decay.out_QL[:, :1], (0, 0))
    return state_KV * chunk.decay.carry(0) + added_KV


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
    """A product of float32 factors, more exact than the `dtype` of the inputs: for bfloat16 with the 16 bits of two
    halves, in half as many passes of the matrix unit as all 24 bits take."""
    if dtype != jnp.bfloat16:
        dims = (((contract[0],), (contract[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST)
    (a, more_a), (b, more_b) = _halves(a), _halves(b)
    multiply = functools.partial(product, contract=contract, dtype=dtype)
    return multiply(a, b) + (multiply(a, more_b) + multiply(more_a, b))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x in bfloat16, the rest of x in bfloat16)."""
    first = x.astype(jnp.bfloat16)
    return first, (x - first.astype(jnp.float32)).astype(jnp.bfloat16)

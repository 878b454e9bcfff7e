"""The gated delta rule for TPUs, with one decay a head: the state goes from chunk to chunk in the chip's fast memory.

Gated DeltaNet, arXiv:2412.06464; in chunks by Yang et al. 2024, arXiv:2406.06484. The kernels are in
tpu_forward and tpu_backward. This file prepares their arguments: tokens in whole blocks, the channels of all heads side
by side, and sums of log decays over each chunk.

Factors of matrix products have the narrowest dtype of the inputs. The triangular system, its inverse and what is
solved with it are float32 throughout, since the inverse multiplies errors; so are sums, decays, states and the
gradients of decays, which are differences of sums.
"""

# B batch, T tokens, H heads, K key width, V value width, E = H K and F = H V channels

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.delta_rule.tpu_backward import gradients
from model.kernels.delta_rule.tpu_forward import DeltaCall, Inputs, Results, Saved, forward
from model.kernels.recurrence.tpu_chunks import (
    CHUNK,
    LANES,
    TileSizes,
    documents,
    narrowest,
    padded,
    totals,
    up,
)

# Sizes by chip. A block is of one head; its width bounds that of keys and values together. At 512 tokens a state a
# block is a quarter of the values of 128 channels in float32, the systems of four chunks are inverted side by side,
# which hides that each is a chain of products, and all fits the 16 MiB of a kernel on the smallest chip.
TILE_SIZES = {
    "v4": TileSizes(512),
    "v5e": TileSizes(512),
    "v5p": TileSizes(512),
    "v6e": TileSizes(512),
    "tpu7x": TileSizes(512),
}


def delta_rule(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_BTH: jax.Array,
    beta_BTH: jax.Array,
    first_BT: jax.Array,
    state_BHKV: jax.Array,
    *,
    tiles: TileSizes = TileSizes(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `delta_rule.delta_rule`, with gradients of all but `first_BT`."""
    (B, T, H, K), V = q_BTHK.shape, v_BTHV.shape[3]
    call = make_call(K, V, T, tiles, interpret)
    dtype, length = narrowest(q_BTHK, k_BTHK, v_BTHV), up(T, call.tokens)

    def wide(x_BTHC, width):
        """Heads side by side, each filled up with zeros to the width."""
        return padded(padded(x_BTHC.astype(dtype), 3, width).reshape(B, T, -1), 1, length)

    def rows(x_BHT):
        return x_BHT.reshape(B, H, 1, length)

    beta_BHT = padded(beta_BTH.astype(jnp.float32), 1, length).swapaxes(1, 2)
    inputs = Inputs(
        q=wide(q_BTHK, call.keys),
        k=wide(k_BTHK, call.keys),
        v=wide(v_BTHV, call.values),
        totals=rows(totals(padded(log_decay_BTH, 1, length))),
        beta=rows(beta_BHT),
        documents=documents(padded(first_BT, 1, length)),
    )
    state = padded(padded(state_BHKV.astype(jnp.float32), 2, call.keys), 3, call.values)
    o_BTF, last_BHKV = _delta(call, inputs, state)
    return o_BTF[:, :T].reshape(B, T, H, call.values)[..., :V], last_BHKV[:, :, :K, :V]


def make_call(K: int, V: int, T: int, tiles: TileSizes, interpret: bool) -> DeltaCall:
    """Blocks of keys and values together wider than `sizes` says have fewer tokens, that they fit."""
    K, V = up(K, LANES), up(V, LANES)
    fitting = tiles.tokens * tiles.width // max(K + V, tiles.width) // CHUNK * CHUNK
    return DeltaCall(K, V, min(max(fitting, CHUNK), up(T, CHUNK)), interpret)


def _run(call: DeltaCall, inputs: Inputs, state: jax.Array) -> Results:
    return forward(call, inputs, state, saves=False)[0]


_delta = jax.custom_vjp(_run, nondiff_argnums=(0,))


def _forward(call: DeltaCall, inputs: Inputs, state: jax.Array):
    results, saved = forward(call, inputs, state, saves=True)
    return results, (inputs, saved)


def _backward(call: DeltaCall, residuals: tuple[Inputs, Saved], dresults: Results):
    return gradients(call, *residuals, dresults)


_delta.defvjp(_forward, _backward)

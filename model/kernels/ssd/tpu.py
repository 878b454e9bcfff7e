"""State-space duality for TPUs: the state goes from chunk to chunk in the chip's fast memory.

Dao and Gu 2024, arXiv:2405.21060, section 6. The kernels are in tpu_forward and tpu_backward. This file
prepares their arguments: tokens in whole blocks, the channels of all heads side by side, and sums of log decays over
each chunk.

Factors of matrix products have the narrowest dtype of the inputs; sums, decays and states are float32, and so are
the gradients of decays, which are differences of sums.
"""

# B batch, T tokens, H heads in G groups, P value width, N key (state) width
# F = H P channels of values, E = G N channels of keys, R heads of a block

from __future__ import annotations

import jax
import jax.numpy as jnp

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
from model.kernels.ssd.tpu_backward import gradients
from model.kernels.ssd.tpu_forward import Inputs, Results, SSDCall, forward

# Sizes by chip. Keys of 128 channels make a state a block a quarter of float32 values at 512 tokens; blocks of values
# and of their gradients, each twice so that one is fetched meanwhile, and the states of a group fit the 16 MiB of a
# kernel on the smallest chip. A group's keys are read once for all its heads, whatever the width of a block.
TILE_SIZES = {
    "v4": TileSizes(512, 512),
    "v5e": TileSizes(512, 512),
    "v5p": TileSizes(512, 512),
    "v6e": TileSizes(512, 512),
    "tpu7x": TileSizes(512, 512),
}


def ssd(
    v_BTHP: jax.Array,
    log_decay_BTH: jax.Array,
    k_BTGN: jax.Array,
    q_BTGN: jax.Array,
    first_BT: jax.Array,
    state_BHPN: jax.Array,
    scale_BTH: jax.Array | None = None,
    *,
    tiles: TileSizes = TileSizes(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `ssd.ssd`, with gradients of all but `first_BT`."""
    B, T, H, P = v_BTHP.shape
    G, N = k_BTGN.shape[2:]
    N = up(N, LANES)
    call = make_call(H, P, G, N, T, scale_BTH is not None, tiles, interpret)
    dtype, length = narrowest(v_BTHP, k_BTGN, q_BTGN), up(T, call.tokens)

    def wide(x_BTHC, width):
        """Heads side by side, each filled up with zeros to the width."""
        return padded(padded(x_BTHC.astype(dtype), 3, width).reshape(B, T, -1), 1, length)

    blocks = lambda x_BHT: x_BHT.reshape(B, -1, call.heads, length)
    if scale_BTH is not None:
        scale_BTH = padded(scale_BTH.astype(jnp.float32), 1, length)
    state_BHPN = padded(padded(state_BHPN.astype(jnp.float32), 2, call.width), 3, N)
    state_BNF = state_BHPN.transpose(0, 3, 1, 2).reshape(B, N, -1)
    inputs = Inputs(
        v=wide(v_BTHP, call.width),
        scale=None if scale_BTH is None else blocks(scale_BTH.swapaxes(1, 2)),
        totals=blocks(totals(padded(log_decay_BTH, 1, length))),
        k=wide(k_BTGN, N),
        q=wide(q_BTGN, N),
        documents=documents(padded(first_BT, 1, length)),
    )
    y_BTF, state_BNF = _ssd(call, inputs, state_BNF)
    y_BTHP = y_BTF[:, :T].reshape(B, T, H, call.width)[..., :P]
    state_BHPN = state_BNF.reshape(B, N, H, call.width).transpose(0, 2, 3, 1)
    return y_BTHP, state_BHPN[:, :, :P, : k_BTGN.shape[3]]


def make_call(
    H: int, P: int, G: int, N: int, T: int, scaled: bool, tiles: TileSizes, interpret: bool
) -> SSDCall:
    """Blocks of heads have whole vectors of channels: where the heads of a group do not, each is filled up.

    States are to fit, so where keys have more than 128 channels, blocks have fewer.
    """
    group, channels = H // G, tiles.width * LANES // N
    if group * P % LANES:
        P = up(P, LANES)
    fits = lambda R: group % R == 0 and R * P % LANES == 0 and R <= LANES and R * P <= channels
    fewest = min(R for R in range(1, group + 1) if group % R == 0 and R * P % LANES == 0)
    heads = max((R for R in range(1, group + 1) if fits(R)), default=fewest)
    blocks = group // heads
    # two cores share a chip of v4 and v5p: both have work where a row of one group is all there is
    walks = 2 if G % 2 and blocks % 2 == 0 else 1
    return SSDCall(
        groups=G,
        walks=walks,
        blocks=blocks // walks,
        heads=heads,
        width=P,
        tokens=min(tiles.tokens, up(T, CHUNK)),
        scaled=scaled,
        interpret=interpret,
    )


def _run(call: SSDCall, inputs: Inputs, state: jax.Array) -> Results:
    return forward(call, inputs, state, saves=False)[0]


_ssd = jax.custom_vjp(_run, nondiff_argnums=(0,))


def _forward(call: SSDCall, inputs: Inputs, state: jax.Array):
    results, entering = forward(call, inputs, state, saves=True)
    return results, (inputs, entering)


def _backward(call: SSDCall, residuals: tuple[Inputs, jax.Array], dresults: Results):
    inputs, entering = residuals
    dinputs, dstate = gradients(call, inputs, entering, dresults)

    def summed(d_BWTN, x_BTE):
        B, _, T, N = d_BWTN.shape
        d_BGTN = d_BWTN.reshape(B, call.groups, call.walks, T, N).sum(axis=2)
        return d_BGTN.swapaxes(1, 2).reshape(x_BTE.shape).astype(x_BTE.dtype)

    return dinputs._replace(k=summed(dinputs.k, inputs.k), q=summed(dinputs.q, inputs.q)), dstate


_ssd.defvjp(_forward, _backward)

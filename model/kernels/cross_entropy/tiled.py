"""Cross-entropy in tiles of logits that are never all in memory, neither forward nor backward.

Each tile updates the running maximum and sum of its tokens' weights (Milakov and Gimelshein 2018, arXiv:1805.02867).
Gradients recompute the logits, as in Wijmans et al. 2024, arXiv:2411.09009. Tiles are plain jnp in stripes.py and
Pallas in tpu.py.

The backward pass runs over stripes of the vocabulary: it computes the gradient of a stripe's logits in tiles and stores
it in the dtype of the hidden states. Two products of it give the gradients of the hidden states and the head.
"""

# N tokens, V vocabulary, D model width, S entries of a stripe

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.cross_entropy import stripes
from model.kernels.cross_entropy.tiles import Cotangents, CrossEntropyCall, Scores, TileSizes
from model.kernels.derivatives import differentiable, tangent_of
from model.logprobs import ScoreOptions, TokenScores

# Sizes by chip. For each channel a step reads tokens + entries and multiplies tokens * entries times: their ratio is
# its flops for a byte in bfloat16, and is above what the chip has (v4 229, v5e 240, v5p 166, v6e 560, tpu7x 312).
# Products and logits in float32 fit a kernel's fast memory: 16 MiB on the smallest, 32 on v6e.
TILE_SIZES = {
    "v4": TileSizes(512, 1024),
    "v5e": TileSizes(512, 1024),
    "v5p": TileSizes(512, 1024),
    "v6e": TileSizes(1024, 1280),
    "tpu7x": TileSizes(512, 1024),
}


def make_call(
    kernel: bool,
    scale: float,
    softcap: float | None,
    score_options: ScoreOptions,
    stripe_bytes: int | None = None,
    tiles: TileSizes | None = None,
) -> CrossEntropyCall:
    """Scale and cap include the temperature, which divides capped logits.

    Args:
      kernel: whether the TPU kernel runs, with `tiles` or the chip's sizes; else plain jnp.
    """
    current = backend.current()
    if kernel and tiles is None:
        tiles = TILE_SIZES.get(current.chip or "", TileSizes())
    return CrossEntropyCall(
        scale=scale / score_options.temperature,
        softcap=None if softcap is None else softcap / score_options.temperature,
        mean=score_options.entropy,
        likeliest=score_options.likeliest,
        stripe_bytes=stripe_bytes or CrossEntropyCall.stripe_bytes,
        tiles=tiles if kernel else None,
        interpret=current.interpret,
    )


def token_scores(scores: Scores) -> TokenScores:
    """Scores over the whole vocabulary."""
    entropy_N = None if scores.mean is None else scores.log_z - scores.mean
    return TokenScores(scores.chosen - scores.log_z, scores.log_z, entropy_N, scores.likeliest)


def part_scores(call: CrossEntropyCall, hidden_ND, head_VD, bias_V, targets_N, choices) -> Scores:
    """Scores over a part of the vocabulary. Targets and choices count from its first entry, and may be outside."""
    N = len(hidden_ND)
    targets_N = jnp.where((targets_N >= 0) & (targets_N < len(head_VD)), targets_N, -1)
    if call.tiles is not None and N % (tokens := min(call.tiles.tokens, -(-N // 128) * 128)):
        short = -N % tokens
        hidden_ND = jnp.pad(hidden_ND, ((0, short), (0, 0)))
        targets_N = jnp.pad(targets_N, (0, short), constant_values=-1)
    derivatives = (functools.partial(f, call) for f in (_forward_and_save, _tangent, _backward))
    scores = differentiable(*derivatives)(hidden_ND, head_VD, bias_V, targets_N, choices)
    return jax.tree.map(lambda x: x[:N], scores)


def _forward(call: CrossEntropyCall, hidden_ND, head_VD, bias_V, targets_N, choices) -> Scores:
    return _of_tiles(call).forward(call, hidden_ND, head_VD, bias_V, targets_N, choices)


def _forward_and_save(call: CrossEntropyCall, hidden_ND, head_VD, bias_V, targets_N, choices):
    scores = _forward(call, hidden_ND, head_VD, bias_V, targets_N, choices)
    return scores, (hidden_ND, head_VD, bias_V, targets_N, choices, scores.log_z, scores.mean)


def _tangent(call: CrossEntropyCall, saved, tangents) -> Scores:
    if call.tiles is not None:
        raise NotImplementedError(
            "the kernel of cross-entropy has no forward-mode derivative. Use kernels.cross_entropy=stripes."
        )
    return tangent_of(functools.partial(_forward, call))(saved[:5], tangents)


def _backward(call: CrossEntropyCall, saved, gradients: Scores):
    hidden_ND, head_VD, bias_V, targets_N, _, log_z_N, mean_N = saved
    cotangents = _cotangents(log_z_N, mean_N, gradients)
    N, V = len(hidden_ND), len(head_VD)
    S = call.stripe(N, V, hidden_ND.dtype.itemsize)
    stripe_gradients = _of_tiles(call).stripe_gradients

    def step(sums, stripe):
        (dhidden_ND, dhead_VD, dbias_V), (first, fresh) = sums, stripe
        head_SD, bias_S = stripes.stripe_of(head_VD, bias_V, first, S)
        d_NS = stripe_gradients(call, hidden_ND, head_SD, bias_S, targets_N - first, cotangents)
        # entries of the previous stripe are written again unchanged, but added only once
        fresh_SD = jnp.where(first + jnp.arange(S)[:, None] < fresh, 0, head_SD)
        dhidden_ND += jnp.einsum("NS,SD->ND", d_NS, fresh_SD, preferred_element_type=jnp.float32)
        dhead_SD = jnp.einsum("NS,ND->SD", d_NS, hidden_ND, preferred_element_type=jnp.float32)
        write = lambda whole, x: jax.lax.dynamic_update_slice_in_dim(whole, x.astype(whole.dtype), first, 0)
        dbias_V = None if dbias_V is None else write(dbias_V, d_NS.sum(axis=0, dtype=jnp.float32))
        return (dhidden_ND, write(dhead_VD, dhead_SD), dbias_V), None

    zeros = jnp.zeros(hidden_ND.shape, jnp.float32), jnp.zeros_like(head_VD)
    zeros = *zeros, None if bias_V is None else jnp.zeros_like(bias_V)
    (dhidden_ND, dhead_VD, dbias_V), _ = jax.lax.scan(step, zeros, stripes.stripes(V, S))
    return dhidden_ND.astype(hidden_ND.dtype), dhead_VD, dbias_V, None, None


def _cotangents(log_z_N, mean_N, gradients: Scores) -> Cotangents:
    """d log Z / d logit = weight; d mean / d logit = weight * (1 + logit - mean)."""
    shift_N, slope_N = gradients.log_z, gradients.mean
    if slope_N is not None:
        shift_N += slope_N * (1 - mean_N)
    return jax.tree.map(lambda x_N: x_N[:, None], Cotangents(log_z_N, gradients.chosen, shift_N, slope_N))


def _of_tiles(call: CrossEntropyCall):
    """The module that computes tiles: its `forward` and `stripe_gradients`."""
    if call.tiles is None:
        return stripes
    from model.kernels.cross_entropy import tpu  # imports Pallas, which is slow

    return tpu

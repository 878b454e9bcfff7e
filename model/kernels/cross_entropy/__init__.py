"""Cross-entropy over a large vocabulary, whose logits [N, V] are never in memory, neither forward nor backward.

Tokens meet the vocabulary in tiles, which keep the running maximum and sum of each token's weights (Milakov and
Gimelshein 2018, arXiv:1805.02867), and logits are computed again for the gradients, as in Wijmans et al. 2024,
arXiv:2411.09009. `reference` is the plain form with all logits; tiles are plain jnp in cross_entropy_plain and Pallas
in tpu.

Backward, a stripe of the vocabulary after the other: the gradient of the stripe's logits is made in tiles and lies in
memory in the dtype of the hidden states; two matrix products of it, which the compiler has at full speed, are what the
hidden states and the head get.
"""

# N tokens, V vocabulary, D model width, S entries of a stripe

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.cross_entropy import stripes
from model.kernels.cross_entropy.tiles import Plan, Pull, Scores, Tiles
from model.logprobs import Ask, TokenScores, scores_of_logits

# Sizes by chip. For each channel a step reads tokens + entries and multiplies tokens * entries times: their ratio is
# its flops for a byte in bfloat16, and is above what the chip has (v4 229, v5e 240, v5p 166, v6e 560, tpu7x 312).
# Products and logits in float32 fit the fast memory that a kernel is given: 16 MiB on the smallest, 32 on v6e.
TILES = {
    "v4": Tiles(512, 1024),
    "v5e": Tiles(512, 1024),
    "v5p": Tiles(512, 1024),
    "v6e": Tiles(1024, 1280),
    "tpu7x": Tiles(512, 1024),
}


def cross_entropy(
    hidden_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    bias_V: jax.Array | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ask: Ask = Ask(),
    stripe_bytes: int | None = None,
    tiles: Tiles | None = None,
) -> TokenScores:
    """Scores [N] of targets under softmax(softcap * tanh(scale * (hidden head^T + bias) / softcap) / temperature).

    Hidden states, head and bias have gradients through log-probabilities, log Z and entropy alike. On one device; see
    `cross_entropy_sharded` for a mesh.

    Args:
      targets_N: int32, 0 to V - 1.
      softcap: None: no cap.
      stripe_bytes: most memory for the logits, or their gradients, of a stripe of the vocabulary.
      tiles: of the TPU kernels; None: those of the chip.
    """
    _check(hidden_ND, head_VD, targets_N, bias_V)
    plan = make_plan(scale, softcap, ask, stripe_bytes, tiles)
    choices = jnp.asarray(len(head_VD) if ask.choices is None else ask.choices, jnp.int32)
    return token_scores(part_scores(plan, hidden_ND, head_VD, bias_V, targets_N, choices))


def reference(
    hidden_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    bias_V: jax.Array | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ask: Ask = Ask(),
) -> TokenScores:
    """`cross_entropy` with all logits in memory."""
    logits_NV = jnp.einsum("ND,VD->NV", hidden_ND, head_VD, preferred_element_type=jnp.float32)
    logits_NV = (logits_NV if bias_V is None else logits_NV + bias_V) * scale
    if softcap is not None:
        logits_NV = softcap * jnp.tanh(logits_NV / softcap)
    return scores_of_logits(logits_NV, targets_N, ask)


def make_plan(
    scale: float, softcap: float | None, ask: Ask, stripe_bytes: int | None = None, tiles: Tiles | None = None
) -> Plan:
    """For the current back end. The temperature, which divides capped logits, goes into the scale and the cap."""
    current = backend.current()
    if current.name != "tpu":
        tiles = None
    elif tiles is None:
        tiles = TILES.get(current.chip or "", Tiles())
    return Plan(
        scale=scale / ask.temperature,
        softcap=None if softcap is None else softcap / ask.temperature,
        mean=ask.entropy,
        likeliest=ask.likeliest,
        stripe_bytes=stripe_bytes or Plan.stripe_bytes,
        tiles=tiles,
        interpret=current.interpret,
    )


def token_scores(scores: Scores) -> TokenScores:
    """Of scores over the whole vocabulary."""
    entropy_N = None if scores.mean is None else scores.log_z - scores.mean
    return TokenScores(scores.chosen - scores.log_z, scores.log_z, entropy_N, scores.likeliest)


def part_scores(plan: Plan, hidden_ND, head_VD, bias_V, targets_N, choices) -> Scores:
    """Over a part of the vocabulary: targets and choices are counted from its first entry, and may lie outside."""
    N = len(hidden_ND)
    targets_N = jnp.where((targets_N >= 0) & (targets_N < len(head_VD)), targets_N, -1)
    if plan.tiles is not None and N % (tokens := min(plan.tiles.tokens, -(-N // 128) * 128)):
        short = -N % tokens
        hidden_ND = jnp.pad(hidden_ND, ((0, short), (0, 0)))
        targets_N = jnp.pad(targets_N, (0, short), constant_values=-1)
    scores = _scores(plan, hidden_ND, head_VD, bias_V, targets_N, choices)
    return jax.tree.map(lambda x: x[:N], scores)


def _forward(plan: Plan, hidden_ND, head_VD, bias_V, targets_N, choices) -> Scores:
    return _of_tiles(plan).forward(plan, hidden_ND, head_VD, bias_V, targets_N, choices)


_scores = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _forward_and_save(plan: Plan, hidden_ND, head_VD, bias_V, targets_N, choices):
    scores = _forward(plan, hidden_ND, head_VD, bias_V, targets_N, choices)
    return scores, (hidden_ND, head_VD, bias_V, targets_N, scores.log_z, scores.mean)


def _backward(plan: Plan, saved, gradients: Scores):
    hidden_ND, head_VD, bias_V, targets_N, log_z_N, mean_N = saved
    pull = _pull(log_z_N, mean_N, gradients)
    N, V = len(hidden_ND), len(head_VD)
    S = plan.stripe(N, V, hidden_ND.dtype.itemsize)
    stripe_gradients = _of_tiles(plan).stripe_gradients

    def step(sums, stripe):
        (dhidden_ND, dhead_VD, dbias_V), (first, fresh) = sums, stripe
        head_SD, bias_S = stripes.stripe_of(head_VD, bias_V, first, S)
        d_NS = stripe_gradients(plan, hidden_ND, head_SD, bias_S, targets_N - first, pull)
        # entries that the stripe before had too are written again as they were, but added only once
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


_scores.defvjp(_forward_and_save, _backward)


def _pull(log_z_N, mean_N, gradients: Scores) -> Pull:
    """d log Z / d logit = weight; d mean / d logit = weight * (1 + logit - mean)."""
    shift_N, slope_N = gradients.log_z, gradients.mean
    if slope_N is not None:
        shift_N += slope_N * (1 - mean_N)
    return jax.tree.map(lambda x_N: x_N[:, None], Pull(log_z_N, gradients.chosen, shift_N, slope_N))


def _of_tiles(plan: Plan):
    """The module whose `forward` and `stripe_gradients` the plan takes."""
    if plan.tiles is None:
        return stripes
    from model.kernels.cross_entropy import tpu  # brings Pallas along

    return tpu


def _check(hidden_ND, head_VD, targets_N, bias_V) -> None:
    fits = hidden_ND.ndim == head_VD.ndim == 2 and hidden_ND.shape[1] == head_VD.shape[1]
    fits &= targets_N.shape == hidden_ND.shape[:1] and (bias_V is None or bias_V.shape == head_VD.shape[:1])
    if not fits:
        bias = None if bias_V is None else bias_V.shape
        raise ValueError(
            f"hidden states {hidden_ND.shape}, head {head_VD.shape}, targets {targets_N.shape} and bias {bias} "
            "don't fit: [N, D], [V, D], [N] and [V] (or None) are wanted."
        )
    if hidden_ND.dtype != head_VD.dtype:
        raise ValueError(
            f"hidden states are {hidden_ND.dtype} and the head is {head_VD.dtype}: cast one to the other's dtype."
        )

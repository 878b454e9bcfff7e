"""Cross-entropy over a large vocabulary: `cross_entropy` on one device, `cross_entropy_on_mesh` in sharded.py.

`CROSS_ENTROPY` has the implementations. One computes all logits [N, V]. The others compute tiles of logits, which are
never all in memory, neither forward nor backward.
"""

# N tokens, V vocabulary, D model width

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from model.kernels import backend
from model.kernels.choice import Implementation, Operation
from model.kernels.cross_entropy.reference import from_all_logits
from model.kernels.cross_entropy.tiled import make_call, part_scores, token_scores
from model.kernels.cross_entropy.tiles import TileSizes
from model.logprobs import ScoreOptions, TokenScores

# A device's float32 logits of at most this size are computed at once: on a CPU this is faster than tiles, which are
# computed twice (`python -m benchmarks.cross_entropy`).
WHOLE_LOGITS_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True)
class Request:
    """What an implementation reads to decide whether it can serve."""

    backend: backend.Backend
    logits_bytes: int  # of all float32 logits of one device


def cross_entropy(
    hidden_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    bias_V: jax.Array | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    score_options: ScoreOptions = ScoreOptions(),
    stripe_bytes: int | None = None,
    tiles: TileSizes | None = None,
) -> TokenScores:
    """Scores [N] of targets under softmax(softcap * tanh(scale * (hidden head^T + bias) / softcap) / temperature).

    Log-probabilities, log Z and entropy have gradients for hidden states, head and bias.

    Args:
      targets_N: int32, 0 to V - 1.
      softcap: None: no cap.
      stripe_bytes: most memory for a stripe of the vocabulary's logits, or their gradients.
      tiles: tile sizes of the TPU kernels; None: those of the chip.
    """
    _check(hidden_ND, head_VD, targets_N, bias_V)
    N, V = len(hidden_ND), len(head_VD)
    run = CROSS_ENTROPY.choose(Request(backend.current(), 4 * N * V)).run
    sizes = {} if run is from_all_logits else {"stripe_bytes": stripe_bytes, "tiles": tiles}
    options = {"scale": scale, "softcap": softcap, "score_options": score_options}
    return run(hidden_ND, head_VD, targets_N, bias_V, **options, **sizes)


def _in_stripes(*arrays, **options) -> TokenScores:
    return _in_tiles(False, *arrays, **options)


def _by_kernel(*arrays, **options) -> TokenScores:
    return _in_tiles(True, *arrays, **options)


def _in_tiles(
    kernel: bool, hidden_ND, head_VD, targets_N, bias_V, scale, softcap, score_options, stripe_bytes, tiles
) -> TokenScores:
    call = make_call(kernel, scale, softcap, score_options, stripe_bytes, tiles)
    choices = jnp.asarray(score_options.choices_of(len(head_VD)), jnp.int32)
    return token_scores(part_scores(call, hidden_ND, head_VD, bias_V, targets_N, choices))


def _logits_refusal(request: Request) -> str | None:
    if request.logits_bytes > WHOLE_LOGITS_BYTES:
        return f"a device's logits would take more than {WHOLE_LOGITS_BYTES >> 20} MiB"
    return None


_EVERYWHERE = ("plain", "gpu", "tpu")
CROSS_ENTROPY = Operation(
    "cross_entropy",
    {
        "logits": Implementation(_EVERYWHERE, from_all_logits, _logits_refusal),
        "stripes": Implementation(_EVERYWHERE, _in_stripes, cost="It computes logits twice."),
        "kernel": Implementation(("tpu",), _by_kernel),
    },
    preferred={"plain": ("logits", "stripes"), "gpu": ("logits", "stripes"), "tpu": ("kernel",)},
)


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

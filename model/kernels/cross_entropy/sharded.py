"""Cross-entropy on a mesh: each device scores its tokens under its part of the vocabulary, and log-sum-exps join the
parts, as in Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

# B batch, T tokens, N = B T tokens of one device, V vocabulary, D model width

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.kernels import backend, mesh
from model.kernels.cross_entropy import CROSS_ENTROPY, Request, TileSizes
from model.kernels.cross_entropy.reference import from_all_logits
from model.kernels.cross_entropy.tiled import make_call, part_scores, token_scores
from model.kernels.cross_entropy.tiles import NOWHERE, CrossEntropyCall, Scores
from model.logprobs import ScoreOptions, TokenScores, scores_of_logits
from model.sharding import Axes, ShardingRules


def cross_entropy_on_mesh(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    bias_V: jax.Array | None = None,
    rules: ShardingRules | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    score_options: ScoreOptions = ScoreOptions(),
    logits: Callable[[jax.Array], jax.Array] | None = None,
    stripe_bytes: int | None = None,
    tiles: TileSizes | None = None,
) -> TokenScores:
    """`cross_entropy`, [B, T], on the mesh set with `jax.set_mesh`; without one, on one device.

    Args:
      rules: None: every device of the mesh computes the whole.
      logits: hidden states -> all logits [B, T, V], if all of them are computed; None: uses the other arguments.
    """
    V = len(head_VD)
    name = CROSS_ENTROPY.chosen_name(request_on_mesh(targets_BT.size, V, rules))
    if name == "logits":
        if logits is not None:
            return scores_of_logits(logits(hidden_BTD), targets_BT, score_options)
        options = {"scale": scale, "softcap": softcap, "score_options": score_options}
        return from_all_logits(hidden_BTD, head_VD, targets_BT, bias_V, **options)
    call = make_call(name == "kernel", scale, softcap, score_options, stripe_bytes, tiles)
    choices = jnp.asarray(score_options.choices_of(V), jnp.int32)
    batch, length, vocab = mesh.split_by(rules, "batch", "length", "act_vocab")
    mesh.check_divides(vocab, mesh.Size(V, "entries of the vocabulary", "act_vocab"))
    return mesh.on_mesh(
        functools.partial(_part, call, vocab),
        in_specs=(
            PartitionSpec(batch, length, None),
            PartitionSpec(vocab, None),
            PartitionSpec(vocab),
            PartitionSpec(batch, length),
            PartitionSpec(),
        ),
        out_specs=PartitionSpec(batch, length),
    )(hidden_BTD, head_VD, bias_V, targets_BT, choices)


def request_on_mesh(tokens: int, V: int, rules: ShardingRules | None) -> Request:
    """The request of each device for these tokens."""
    splits = mesh.split_by(rules, "batch", "length", "act_vocab")
    parts = mesh.ways(tuple(axis for axes in splits for axis in axes))
    return Request(backend.current(), -(-4 * tokens * V // parts))


def _part(
    call: CrossEntropyCall, vocab: Axes, hidden_BTD, head_VD, bias_V, targets_BT, choices
) -> TokenScores:
    """The computation of one device."""
    first = jax.lax.axis_index(vocab) * len(head_VD) if vocab else 0
    hidden_ND, targets_N = hidden_BTD.reshape(-1, hidden_BTD.shape[2]), targets_BT.reshape(-1) - first
    scores = part_scores(call, hidden_ND, head_VD, bias_V, targets_N, choices - first)
    if vocab:
        scores = _join(scores, vocab, first)
    return jax.tree.map(lambda x_N: x_N.reshape(targets_BT.shape), token_scores(scores))


def _join(part: Scores, vocab: tuple[str, ...], first: jax.Array | int) -> Scores:
    """Scores over the whole vocabulary from those over its parts, equal on all devices with these tokens."""
    top = jax.lax.pmax(jax.lax.stop_gradient(part.log_z), vocab)
    log_z = top + jnp.log(jax.lax.psum(jnp.exp(part.log_z - top), vocab))
    mean = best = likeliest = None
    if part.mean is not None:
        mean = jax.lax.psum(jnp.exp(part.log_z - log_z) * part.mean, vocab)
    if part.best is not None and part.likeliest is not None:
        best = jax.lax.pmax(jax.lax.stop_gradient(part.best), vocab)
        likeliest = jax.lax.pmin(jnp.where(part.best == best, part.likeliest + first, NOWHERE), vocab)
    return Scores(jax.lax.psum(part.chosen, vocab), log_z, mean, best, likeliest)

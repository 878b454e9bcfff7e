"""Cross-entropy on a mesh: each device meets its tokens with its part of the vocabulary, and the parts become one by
their log-sum-exps, as in Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

# B batch, T tokens, N = B T tokens of one device, V vocabulary, D model width

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from model.kernels import backend
from model.kernels.cross_entropy import make_plan, part_scores, token_scores
from model.kernels.cross_entropy.tiles import NOWHERE, Plan, Scores, Tiles
from model.logprobs import Ask, TokenScores
from model.sharding import ShardingRules

# Of one device's float32 logits. Below it, all logits at once are quicker on a CPU than tiles that are computed twice;
# `python -m benchmarks.cross_entropy` measures where that ends.
WHOLE_LOGITS_BYTES = 512 << 20


def wants_tiles(tokens: int, V: int, rules: ShardingRules | None) -> bool:
    """Whether targets are scored in tiles: on TPUs always, elsewhere where the logits of a device would be large."""
    sizes = jax.sharding.get_abstract_mesh().shape
    ways = math.prod(sizes[axis] for axes in _splits(rules) for axis in axes)
    return backend.current().name == "tpu" or 4 * tokens * V > WHOLE_LOGITS_BYTES * ways


def cross_entropy_on_mesh(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    bias_V: jax.Array | None = None,
    rules: ShardingRules | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ask: Ask = Ask(),
    stripe_bytes: int | None = None,
    tiles: Tiles | None = None,
) -> TokenScores:
    """`cross_entropy`, [B, T], on the mesh set with `jax.set_mesh`; without one, on one device.

    Args:
      rules: None: every device of the mesh computes the whole.
    """
    plan = make_plan(scale, softcap, ask, stripe_bytes, tiles)
    V = len(head_VD)
    batch, length, vocab = _splits(rules)
    choices = jnp.asarray(V if ask.choices is None else ask.choices, jnp.int32)
    arrays = hidden_BTD, head_VD, bias_V, targets_BT, choices
    if not (ours := _axes()):
        return _part(plan, (), *arrays)
    if V % (ways := math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in vocab)):
        raise ValueError(
            f"mesh axes {'*'.join(vocab)} = {ways} do not divide the vocabulary of {V}. Use another size, or keep the "
            "vocabulary whole with sharding.act_vocab=()."
        )
    return jax.shard_map(
        functools.partial(_part, plan, vocab),
        in_specs=(
            PartitionSpec(batch, length, None),
            PartitionSpec(vocab, None),
            PartitionSpec(vocab),
            PartitionSpec(batch, length),
            PartitionSpec(),
        ),
        out_specs=PartitionSpec(batch, length),
        axis_names=ours,
        check_vma=False,
    )(*arrays)


def _axes() -> set[str]:
    """Mesh axes that no `shard_map` around has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}


def _splits(rules: ShardingRules | None) -> tuple[tuple[str, ...], ...]:
    """Which of them split rows, tokens and vocabulary."""
    ours = _axes()
    names = "batch", "length", "act_vocab"
    return tuple(tuple(axis for axis in getattr(rules, name, ()) if axis in ours) for name in names)


def _part(
    plan: Plan, vocab: tuple[str, ...], hidden_BTD, head_VD, bias_V, targets_BT, choices
) -> TokenScores:
    """What one device computes."""
    first = jax.lax.axis_index(vocab) * len(head_VD) if vocab else 0
    hidden_ND, targets_N = hidden_BTD.reshape(-1, hidden_BTD.shape[2]), targets_BT.reshape(-1) - first
    scores = part_scores(plan, hidden_ND, head_VD, bias_V, targets_N, choices - first)
    if vocab:
        scores = _join(scores, vocab, first)
    return jax.tree.map(lambda x_N: x_N.reshape(targets_BT.shape), token_scores(scores))


def _join(part: Scores, vocab: tuple[str, ...], first: jax.Array | int) -> Scores:
    """Scores over the whole vocabulary from those over its parts, the same on all devices that hold them."""
    top = jax.lax.pmax(jax.lax.stop_gradient(part.log_z), vocab)
    log_z = top + jnp.log(jax.lax.psum(jnp.exp(part.log_z - top), vocab))
    mean = best = likeliest = None
    if part.mean is not None:
        mean = jax.lax.psum(jnp.exp(part.log_z - log_z) * part.mean, vocab)
    if part.best is not None and part.likeliest is not None:
        best = jax.lax.pmax(jax.lax.stop_gradient(part.best), vocab)
        likeliest = jax.lax.pmin(jnp.where(part.best == best, part.likeliest + first, NOWHERE), vocab)
    return Scores(jax.lax.psum(part.chosen, vocab), log_z, mean, best, likeliest)

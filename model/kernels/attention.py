"""Grouped-query attention in plain jnp, the reference that every faster form must equal.

Ainslie et al. 2023, arXiv:2305.13245. Softmax runs in float32 whatever the dtype of the inputs. Sinks: Xiao et al.
2023, arXiv:2309.17453, as one learned logit a head; soft-capping: Gemma 2, arXiv:2408.00118.
"""

# B batch, T queries, S keys, H query heads, K key/value heads, G query heads of one key/value head
# C width of a query and a key, E width of a value

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.kernels import backend, order
from model.kernels.names import ATTENTION

MAX_QUERY_BLOCKS = 16  # a row is cut into at most this many blocks of queries
MIN_QUERY_BLOCK = 128  # and into none shorter than this

_MASKED = -1e30  # finite, so that a row with no key at all gives an average instead of NaN


@dataclasses.dataclass(frozen=True)
class Sight:
    """Which keys a query may look at, by position."""

    causal: bool = True  # none ahead of it
    window: int | None = (
        None  # none `window` or more positions away; so a causal query sees `window` keys at most
    )
    chunk: int | None = None  # only those in its own chunk of so many positions

    def sees(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """bool, for positions of any shapes that broadcast."""
        seen = (
            key <= query
            if self.causal
            else jnp.broadcast_to(True, jnp.broadcast_shapes(query.shape, key.shape))
        )
        if self.window is not None:
            seen &= query - key < self.window
            if not self.causal:
                seen &= key - query < self.window
        if self.chunk is not None:
            seen &= query // self.chunk == key // self.chunk
        return seen

    def reach(self) -> int | None:
        """How many keys a query sees at most, itself among them, to one side; None: all."""
        return min((n for n in (self.window, self.chunk) if n is not None), default=None)


@flax.struct.dataclass
class Scores:
    """How a query and a key become a score, beyond their product."""

    scale: float | None = flax.struct.field(pytree_node=False, default=None)  # None: C ** -0.5
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)  # scores stay within +-softcap
    sinks_H: jax.Array | None = None  # a score that takes a share of the weights and gives nothing
    # (key's position - query's position) [..., T, S] to what is added to the scores [..., H, T, S]
    bias: Callable[[jax.Array], jax.Array] | None = flax.struct.field(pytree_node=False, default=None)

    def scale_of(self, width: int) -> float:
        return width**-0.5 if self.scale is None else self.scale


def attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKE: jax.Array,
    mask_BTS: jax.Array,
    scores: Scores = Scores(),
    distance_BTS: jax.Array | None = None,
) -> jax.Array:
    """Attention with an explicit mask (True: may look).

    Args:
      distance_BTS: int32, key's position less query's; wanted where `scores.bias` is set.

    Returns:
      [B, T, H, E] in the dtype of `q`.
    """
    q_BKGTC, k_BKSC, v_BKSE = _heads_first(q_BTHC, k_BSKC, v_BSKE)
    return _tokens_first(_attend(q_BKGTC, k_BKSC, v_BKSE, mask_BTS, scores, distance_BTS)[0])


def in_query_blocks(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKE: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    sight: Sight = Sight(),
    scores: Scores = Scores(),
) -> jax.Array:
    """Attention of tokens among themselves (see `self_attention.self_attention`), [B, T, H, E]; each block of
    queries is given only the keys that some of it can see."""
    inputs = *_heads_first(q_BTHC, k_BTKC, v_BTKE), positions_BT, segment_ids_BT
    if scores.bias is not None:  # which may have parameters of its own
        return _in_blocks(sight, scores, *inputs)[0]
    return _in_blocks_by_hand(sight, dataclasses.replace(scores, sinks_H=None), scores.sinks_H, *inputs)


def _blocks(T: int, sight: Sight) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and of the keys that some of them see."""
    block, reach = max(MIN_QUERY_BLOCK, -(-T // MAX_QUERY_BLOCKS)), sight.reach()
    for start in range(0, T, block):
        stop = min(start + block, T)
        first = 0 if reach is None else max(0, start - reach + 1)
        last = stop if sight.causal else T if reach is None else min(T, stop + reach - 1)
        yield slice(start, stop), slice(first, last)


def _in_blocks(sight: Sight, scores: Scores, q_BKGTC, k_BKSC, v_BKSE, positions_BT, segment_ids_BT):
    """(what queries find [B, T, H, E], their scores' maximum and the sum of weights, both [B, K, G, T, 1])."""
    parts = []
    for at_T, at_S in _blocks(q_BKGTC.shape[3], sight):
        queries, keys = (jnp.arange(at.start, at.stop) for at in (at_T, at_S))
        mask_BTS = _self_mask(at_T, at_S, positions_BT, segment_ids_BT, sight)
        mask_BTS = mask_BTS if scores.bias is not None else _to_add(mask_BTS)
        distance_BTS = (keys[None] - queries[:, None])[None]
        block = q_BKGTC[:, :, :, at_T], k_BKSC[:, :, at_S], v_BKSE[:, :, at_S]
        out_BKGTE, *normalisers = _attend(*block, mask_BTS, scores, distance_BTS)
        parts.append((_tokens_first(out_BKGTE), *normalisers))
    if len(parts) == 1:
        return parts[0]
    outs, tops, totals = zip(*parts, strict=True)
    out_BTHE = order.once(functools.partial(jnp.concatenate, axis=1))(outs)  # in one form for both passes
    return out_BTHE, jnp.concatenate(tops, axis=3), jnp.concatenate(totals, axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_blocks_by_hand(sight: Sight, scores: Scores, sinks_H, *inputs) -> jax.Array:
    """What queries find in `_in_blocks`, [B, T, H, E]. The backward pass computes the weights anew instead of keeping
    them; it has no forward-mode derivative."""
    return _forward(sight, scores, sinks_H, *inputs)[0]


def _forward(sight, scores, sinks_H, *inputs):
    found = _in_blocks(sight, dataclasses.replace(scores, sinks_H=sinks_H), *inputs)
    found = tuple(checkpoint_name(x, ATTENTION) for x in found)
    return found[0], (sinks_H, inputs, found)


def _backward(sight: Sight, scores: Scores, saved, d_out_BTHE: jax.Array):
    """Scores with keys before queries, so no weight is transposed."""
    sinks_H, (q_BKGTC, k_BKSC, v_BKSE, positions_BT, segment_ids_BT), (out_BTHE, top_BKGT1, total_BKGT1) = (
        saved
    )
    heads_first = functools.partial(_queries_heads_first, K=k_BKSC.shape[1])
    d_out_BTHE = d_out_BTHE.astype(jnp.float32)
    delta_BKGT1 = heads_first(jnp.sum(d_out_BTHE * out_BTHE, axis=-1, keepdims=True)) / total_BKGT1
    d_out_BKGTE = heads_first(d_out_BTHE) / total_BKGT1
    # so that no weights are computed ahead, nor kept from the forward pass
    q_BKGTC = order.not_before(delta_BKGT1, q_BKGTC)
    k_BKSC, v_BKSE = (order.not_before(delta_BKGT1[:, :, 0], x) for x in (k_BKSC, v_BKSE))
    dq, dk_BKSC, dv_BKSE = [], jnp.zeros(k_BKSC.shape, jnp.float32), jnp.zeros(v_BKSE.shape, jnp.float32)
    for at_T, at_S in _blocks(q_BKGTC.shape[3], sight):
        mask_BTS = _self_mask(at_T, at_S, positions_BT, segment_ids_BT, sight)
        of_queries = (x[:, :, :, at_T] for x in (q_BKGTC, d_out_BKGTE, top_BKGT1, delta_BKGT1))
        block = k_BKSC[:, :, at_S], v_BKSE[:, :, at_S], mask_BTS.swapaxes(1, 2)
        dq_BKGTC, dk_part, dv_part = _block_gradients(scores, block, *of_queries)
        dq.append(dq_BKGTC)
        dk_BKSC, dv_BKSE = dk_BKSC.at[:, :, at_S].add(dk_part), dv_BKSE.at[:, :, at_S].add(dv_part)
    d_inputs = jnp.concatenate(dq, axis=3), dk_BKSC, dv_BKSE
    d_sinks_H = None
    if sinks_H is not None:
        sinks_KG1 = sinks_H.astype(jnp.float32).reshape(*q_BKGTC.shape[1:3], 1)
        d_sinks_KG = -jnp.sum(jnp.exp(sinks_KG1 - top_BKGT1[..., 0]) * delta_BKGT1[..., 0], axis=(0, 3))
        d_sinks_H = d_sinks_KG.reshape(-1).astype(sinks_H.dtype)
    wanted = (q_BKGTC, k_BKSC, v_BKSE)
    return d_sinks_H, *(d.astype(x.dtype) for d, x in zip(d_inputs, wanted, strict=True)), None, None


_in_blocks_by_hand.defvjp(_forward, _backward)


def _block_gradients(
    scores: Scores,
    keys: tuple[jax.Array, jax.Array, jax.Array],
    q_BKGTC: jax.Array,
    d_out_BKGTE: jax.Array,
    top_BKGT1: jax.Array,
    delta_BKGT1: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a block of queries and of its (keys, values, mask), float32; `d_out` and `delta` are divided by the sum of
    weights already."""
    k_BKSC, v_BKSE, mask_BST = keys
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # G and T as one dimension N in products: XLA would transpose queries in memory to merge them
    merged = lambda x_BKGTC: x_BKGTC.reshape(*x_BKGTC.shape[:2], -1, x_BKGTC.shape[-1])
    split = lambda x_N: x_N.reshape(*x_N.shape[:-1], *q_BKGTC.shape[2:4])
    row = lambda x_BKGT1: x_BKGT1[..., 0][:, :, None]
    q_BKNC, d_out_BKNE = merged(q_BKGTC), merged(d_out_BKGTE.astype(v_BKSE.dtype))
    raw_BKSGT = split(einsum("BKSC,BKNC->BKSN", k_BKSC, q_BKNC)) * scores.scale_of(q_BKGTC.shape[-1])
    capped_BKSGT = (
        raw_BKSGT if scores.softcap is None else scores.softcap * jnp.tanh(raw_BKSGT / scores.softcap)
    )
    mask_BKSGT = mask_BST[:, None, :, None]
    weights_BKSGT = jnp.exp(_masked(capped_BKSGT, _to_add(mask_BKSGT)) - row(top_BKGT1))
    weights_BKSN = weights_BKSGT.astype(v_BKSE.dtype).reshape(*weights_BKSGT.shape[:3], -1)
    dv_BKSE = einsum("BKSN,BKNE->BKSE", weights_BKSN, d_out_BKNE)
    d_weights_BKSGT = split(einsum("BKSE,BKNE->BKSN", v_BKSE, d_out_BKNE)) - row(delta_BKGT1)
    d_scores_BKSGT = jnp.where(mask_BKSGT, weights_BKSGT * d_weights_BKSGT, 0)
    if scores.softcap is not None:
        d_scores_BKSGT *= 1 - (capped_BKSGT / scores.softcap) ** 2
    d_scores_BKSGT = (d_scores_BKSGT * scores.scale_of(q_BKGTC.shape[-1])).astype(q_BKGTC.dtype)
    d_scores_BKSN = d_scores_BKSGT.reshape(weights_BKSN.shape)
    dk_BKSC = einsum("BKSN,BKNC->BKSC", d_scores_BKSN, q_BKNC)
    dq_BKCN = einsum("BKSC,BKSN->BKCN", k_BKSC, d_scores_BKSN)
    return split(dq_BKCN).transpose(0, 1, 3, 4, 2), dk_BKSC, dv_BKSE


def stretch_ids(
    positions_BT: jax.Array, segment_ids_BT: jax.Array | None, chunk: int | None
) -> jax.Array | None:
    """One id for each chunk of each segment, [B, T] int32; None where the row is one stretch."""
    if chunk is None:
        return segment_ids_BT
    chunk_BT = positions_BT // chunk
    if segment_ids_BT is None:
        return chunk_BT
    return segment_ids_BT * (jnp.max(chunk_BT) + 1) + chunk_BT


def self_attention_weights(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    sight: Sight = Sight(),
    scores: Scores = Scores(),
) -> jax.Array:
    """The weights with which `self_attention` mixes values, [B, H, T, S] float32: to be looked at."""
    B, T, H = q_BTHC.shape[:3]
    mask_BTS = _self_mask(slice(0, T), slice(0, T), positions_BT, segment_ids_BT, sight)
    distance_1TT = (jnp.arange(T)[None] - jnp.arange(T)[:, None])[None]
    q_BKGTC, k_BKSC, _ = _heads_first(q_BTHC, k_BTKC, k_BTKC)
    weights_BKGTS, _, total_BKGT1 = _weights(q_BKGTC, k_BKSC, mask_BTS, scores, distance_1TT)
    return (weights_BKGTS / total_BKGT1).reshape(B, H, T, T)


def _self_mask(
    queries: slice, keys: slice, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, sight: Sight
) -> jax.Array:
    """bool [B or 1, T, S], for two stretches of the row."""
    at_T, at_S = (jnp.arange(s.start, s.stop) for s in (queries, keys))
    mask_BTS = dataclasses.replace(sight, chunk=None).sees(at_T[:, None], at_S[None])[None]
    if sight.chunk is not None:
        chunk_BT = positions_BT // sight.chunk
        mask_BTS = mask_BTS & (chunk_BT[:, queries, None] == chunk_BT[:, None, keys])
    if segment_ids_BT is not None:
        mask_BTS = mask_BTS & (segment_ids_BT[:, queries, None] == segment_ids_BT[:, None, keys])
    return mask_BTS


def _attend(
    q_BKGTC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSE: jax.Array,
    mask_BTS: jax.Array,
    scores: Scores,
    distance_BTS: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(what queries find, their scores' maximum, the sum of weights)."""
    weights_BKGTS, top_BKGT1, total_BKGT1 = _weights(q_BKGTC, k_BKSC, mask_BTS, scores, distance_BTS)
    out_BKGTE = jnp.einsum(
        "BKGTS,BKSE->BKGTE", weights_BKGTS.astype(v_BKSE.dtype), v_BKSE, preferred_element_type=jnp.float32
    )
    out_BKGTE = (out_BKGTE / total_BKGT1).astype(q_BKGTC.dtype)  # divided last: over E numbers instead of S
    return out_BKGTE, top_BKGT1, total_BKGT1


def _weights(
    q_BKGTC: jax.Array,
    k_BKSC: jax.Array,
    mask_BTS: jax.Array,
    scores: Scores,
    distance_BTS: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weights not yet divided, the scores' maximum, what to divide the weights by), float32."""
    B, K, G, T, C = q_BKGTC.shape
    scores_BKGTS = jnp.einsum("BKGTC,BKSC->BKGTS", q_BKGTC, k_BKSC, preferred_element_type=jnp.float32)
    scores_BKGTS *= scores.scale_of(C)
    if scores.softcap is not None:
        scores_BKGTS = scores.softcap * jnp.tanh(scores_BKGTS / scores.softcap)
    if scores.bias is not None:
        if distance_BTS is None:
            raise ValueError("a bias of the scores needs the distances of queries and keys; none were given.")
        bias_BHTS = scores.bias(distance_BTS)
        scores_BKGTS += bias_BHTS.reshape(bias_BHTS.shape[0], K, G, *bias_BHTS.shape[2:])
    scores_BKGTS = _masked(scores_BKGTS, mask_BTS[:, None, None])
    top_BKGT1 = _over_keys(jnp.maximum, jnp.max, scores_BKGTS)
    if scores.sinks_H is not None:
        sinks_KG11 = scores.sinks_H.astype(jnp.float32).reshape(K, G, 1, 1)
        top_BKGT1 = jnp.maximum(top_BKGT1, sinks_KG11)
    top_BKGT1 = jax.lax.stop_gradient(top_BKGT1)
    weights_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
    total_BKGT1 = _over_keys(jnp.add, jnp.sum, weights_BKGTS)
    if scores.sinks_H is not None:
        total_BKGT1 += jnp.exp(sinks_KG11 - top_BKGT1)
    return weights_BKGTS, top_BKGT1, total_BKGT1


def _masked(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """By a mask that is bool, or from `_to_add`."""
    return jnp.where(mask, scores, _MASKED) if mask.dtype == bool else scores + mask


def _to_add(mask: jax.Array) -> jax.Array:
    """On a CPU 0 and `_MASKED`, which vectors add sooner than they choose; it hides no NaN, and lets gradients pass to
    the scores of a query that sees no key."""
    return jnp.where(mask, 0.0, _MASKED) if backend.for_cpu() else mask


def _over_keys(combine: Callable, reduce: Callable, x_S: jax.Array) -> jax.Array:
    """[..., 1], `reduce` over [..., S], which is `combine` of two: on a CPU by halves, as whole vectors; XLA would take
    windows of numbers."""
    while backend.for_cpu() and x_S.shape[-1] > 32 and x_S.shape[-1] % 2 == 0:
        x_S = combine(*jnp.split(x_S, 2, axis=-1))
    return reduce(x_S, axis=-1, keepdims=True)


def _heads_first(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKE: jax.Array):
    q_BKGTC = _queries_heads_first(q_BTHC, k_BSKC.shape[2])
    return q_BKGTC, k_BSKC.transpose(0, 2, 1, 3), v_BSKE.transpose(0, 2, 1, 3)


def _queries_heads_first(x_BTHC: jax.Array, K: int) -> jax.Array:
    B, T, H, C = x_BTHC.shape
    return x_BTHC.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)


def _tokens_first(out_BKGTE: jax.Array) -> jax.Array:
    B, K, G, T, E = out_BKGTE.shape
    return out_BKGTE.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, E)

"""Cross-entropy in stripes of the vocabulary, in plain jnp, for every platform."""

# N tokens, V vocabulary, D model width, S entries of a stripe

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.kernels.cross_entropy.tiles import (
    MASKED,
    NOWHERE,
    Cotangents,
    CrossEntropyCall,
    Scores,
    final_scores,
    initial_state,
    logits_of,
    product_gradients,
    update,
)


def stripes(V: int, S: int) -> tuple[jax.Array, jax.Array]:
    """(the start of each stripe of S entries, its first entry that no earlier stripe has), int32.

    The last stripe ends with the vocabulary, so it may overlap the one before.
    """
    fresh = jnp.arange(0, V, S, dtype=jnp.int32)
    return jnp.minimum(fresh, V - S), fresh


def stripe_of(head_VD: jax.Array, bias_V: jax.Array | None, first: jax.Array, S: int):
    """(head [S, D], bias [S] or None), starting at `first`."""
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, S)
    return cut(head_VD), None if bias_V is None else cut(bias_V)


def forward(call: CrossEntropyCall, hidden_ND, head_VD, bias_V, targets_N, choices) -> Scores:
    (N, _), V = hidden_ND.shape, len(head_VD)
    S = call.stripe(N, V, itemsize=4)

    def step(state, stripe):
        first, fresh = stripe
        head_SD, bias_S = stripe_of(head_VD, bias_V, first, S)
        logits_NS, entries_S = _logits(call, hidden_ND, head_SD, bias_S), first + jnp.arange(S)
        logits_NS = jnp.where(entries_S < fresh, MASKED, logits_NS)
        entries_NS = jnp.where(entries_S < fresh, NOWHERE, entries_S)[None]
        return update(call, state, logits_NS, entries_NS, targets_N[:, None], choices), None

    state, _ = jax.lax.scan(step, initial_state(call, N), stripes(V, S))
    return jax.tree.map(lambda x_N1: x_N1[:, 0], final_scores(state))


def stripe_gradients(
    call: CrossEntropyCall, hidden_ND, head_SD, bias_S, targets_N, cotangents: Cotangents
) -> jax.Array:
    """The gradient of the products of hidden states and a stripe of the head, [N, S] in the hidden states' dtype.

    Args:
      targets_N: counted from the stripe's first entry.
    """
    logits_NS, entries_1S = _logits(call, hidden_ND, head_SD, bias_S), jnp.arange(len(head_SD))[None]
    return product_gradients(call, logits_NS, entries_1S, targets_N[:, None], cotangents).astype(
        hidden_ND.dtype
    )


def _logits(call: CrossEntropyCall, hidden_ND, head_SD, bias_S) -> jax.Array:
    products_NS = jnp.einsum("ND,SD->NS", hidden_ND, head_SD, preferred_element_type=jnp.float32)
    return logits_of(call, products_NS, None if bias_S is None else bias_S[None])

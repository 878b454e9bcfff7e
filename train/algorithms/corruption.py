"""Rows rewritten for other objectives than the next token: fill in the middle, masked tokens.

Each works on packed rows on the device, a document (segment) at a time, with a key for each row.
"""

# B rows, T tokens

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from train.models import Batch


def fill_in_the_middle(
    batch: Batch, keys: jax.Array, ids: tuple[int, int, int], rate: float, spm_rate: float = 0.5
) -> Batch:
    """Documents with their middle at the end. Bavarian et al. 2022, arXiv:2207.14255.

    A document becomes <prefix> PREFIX <suffix> SUFFIX <middle> MIDDLE (PSM) or, with probability `spm_rate`, <prefix>
    <suffix> SUFFIX <middle> PREFIX MIDDLE (SPM), followed by its last token. The two cuts are drawn uniformly. The
    three new tokens take the places of the three before the last, so that packing stays as it is. Documents of fewer
    than 8 tokens, and dialogues, of which only the answers count, stay as they are.

    Args:
      keys: [B].
      ids: of the tokens prefix, suffix, middle.
      rate: share of documents.
    """
    new = jax.vmap(functools.partial(_rearranged, ids=ids, rate=rate, spm_rate=spm_rate))
    tokens_BT, moved_BT = new(batch["tokens"], batch["segment_ids"], batch["loss_weights"], keys)
    following_BT = jnp.roll(tokens_BT, -1, axis=1)
    same_BT = (batch["segment_ids"] == jnp.roll(batch["segment_ids"], -1, axis=1)).at[:, -1].set(False)
    # a document's last target, where a row cuts it, is beyond the row and stays
    targets_BT = jnp.where(moved_BT & same_BT, following_BT, batch["targets"])
    return batch | {"tokens": tokens_BT, "targets": targets_BT}


def _rearranged(tokens_T, segments_T, weights_T, key, ids, rate, spm_rate):
    """(tokens, whether a token's document was rearranged) of a row."""
    T = tokens_T.shape[0]
    count = lambda values: jax.ops.segment_sum(values, segments_T, T + 1)[segments_T]
    n_T = count(jnp.ones(T, jnp.int32))
    first_T = jax.ops.segment_min(jnp.arange(T), segments_T, T + 1)[segments_T]
    place_T = jnp.arange(T) - first_T
    draws = jax.vmap(lambda segment: jax.random.uniform(jax.random.fold_in(key, segment), (4,)))(segments_T)
    plain_T = count((weights_T == 0).astype(jnp.int32)) <= 1  # the last token of a document has no target
    moves_T = (draws[:, 0] < rate) & (segments_T > 0) & (n_T >= 8) & plain_T
    core_T = n_T - 4  # what remains of the document, without its last token
    cuts = jnp.floor(draws[:, 2:] * (core_T + 1)[:, None]).astype(jnp.int32)
    a_T, b_T = cuts.min(axis=1), cuts.max(axis=1)  # prefix [0, a), middle [a, b), suffix [b, core)
    suffix_T = core_T - b_T
    prefix_id, suffix_id, middle_id = ids

    def psm():
        j = place_T
        in_suffix = j <= a_T + 1 + suffix_T
        source = jnp.where(j <= a_T, j - 1, jnp.where(in_suffix, b_T + j - a_T - 2, j - suffix_T - 3))
        special = jnp.where(j == 0, prefix_id, jnp.where(j == a_T + 1, suffix_id, middle_id))
        is_special = (j == 0) | (j == a_T + 1) | (j == a_T + 2 + suffix_T)
        return source, special, is_special

    def spm():
        j = place_T
        source = jnp.where(j <= 1 + suffix_T, b_T + j - 2, j - suffix_T - 3)
        special = jnp.where(j == 0, prefix_id, jnp.where(j == 1, suffix_id, middle_id))
        is_special = (j <= 1) | (j == 2 + suffix_T)
        return source, special, is_special

    chosen = [jnp.where(draws[:, 1] < spm_rate, s, p) for s, p in zip(spm(), psm(), strict=True)]
    source_T, special_T, is_special_T = chosen
    moved = tokens_T[jnp.clip(first_T + source_T, 0, T - 1)]
    new_T = jnp.where(is_special_T, special_T, moved)
    new_T = jnp.where(place_T == n_T - 1, tokens_T, new_T)
    return jnp.where(moves_T, new_T, tokens_T), moves_T


def mask_tokens(batch: Batch, keys: jax.Array, mask_id: int, vocab_size: int, rate: float = 0.15) -> Batch:
    """BERT's objective: of the chosen tokens 80 % become the mask, 10 % a random token, and 10 % stay.

    Devlin et al. 2018, arXiv:1810.04805. Each token is its own target; those that were chosen count.

    Args:
      keys: [B].
      rate: share of tokens that are chosen.
    """
    tokens_BT = batch["tokens"]
    draw = jax.vmap(lambda key: jax.random.uniform(key, (tokens_BT.shape[1], 3)))(keys)
    real_BT = batch["segment_ids"] > 0
    chosen_BT = (draw[..., 0] < rate) & real_BT
    random_BT = (draw[..., 2] * vocab_size).astype(tokens_BT.dtype)
    corrupted_BT = jnp.where(draw[..., 1] < 0.8, mask_id, jnp.where(draw[..., 1] < 0.9, random_BT, tokens_BT))
    return batch | {
        "tokens": jnp.where(chosen_BT, corrupted_BT, tokens_BT),
        "targets": tokens_BT,
        "loss_weights": chosen_BT.astype(jnp.float32),
    }

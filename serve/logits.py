"""Changes of logits before sampling: penalties, biases, and masks of tokens that must not come next."""

# R rows, V vocabulary, H tokens of history, B biases of a row, W = ceil(V / 32) words of a packed mask

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from serve.request import MAX_BIASES, SamplingParams


@flax.struct.dataclass
class RowEdits:
    """Changes of each row's logits, on the host or on the device; see `SamplingParams`."""

    edited: Any  # [R] bool, whether this row has any of the following
    repetition: Any  # [R] float32
    presence: Any  # [R] float32
    frequency: Any  # [R] float32
    prompt: Any  # [R] int32, tokens of the prompt
    min_length: Any  # [R] int32, tokens of prompt and output before which no stop token may come
    bias_ids: Any  # [R, B] int32, filled up with -1
    bias: Any  # [R, B] float32

    @classmethod
    def none(cls, rows: int) -> RowEdits:
        """Of rows without changes, in numpy."""
        floats = lambda value: np.full(rows, value, np.float32)
        ints = lambda: np.zeros(rows, np.int32)
        ids, biases = np.full((rows, MAX_BIASES), -1, np.int32), np.zeros((rows, MAX_BIASES), np.float32)
        return cls(np.zeros(rows, bool), floats(1), floats(0), floats(0), ints(), ints(), ids, biases)

    def set(self, row: int, sampling: SamplingParams, prompt: int) -> None:
        """Write the changes of one request, in place."""
        self.edited[row] = sampling.edits_logits
        self.repetition[row] = sampling.repetition_penalty
        self.presence[row] = sampling.presence_penalty
        self.frequency[row] = sampling.frequency_penalty
        self.prompt[row], self.min_length[row] = prompt, prompt + sampling.min_tokens
        self.bias_ids[row] = -1
        for i, (token, value) in enumerate(sampling.logit_bias):
            self.bias_ids[row, i], self.bias[row, i] = token, value


def edit_logits(
    logits_RV: jax.Array,
    edits: RowEdits,
    stop_ids_RN: jax.Array,
    history_RH: jax.Array,
    length_R: jax.Array,
    allowed_RW: jax.Array,
) -> jax.Array:
    """The logits to choose from.

    Args:
      history_RH: int32, prompt and output, of which the first `length_R` count.
      length_R: int32, tokens so far; the new token's position.
      allowed_RW: uint32, a bit for each token, the lowest first; see `all_allowed`.
    """
    # Each `cond` saves work that no row asked for, without another program to compile.
    logits_RV = jax.lax.cond(
        jnp.any(edits.edited), _edit, lambda x, *_: x, logits_RV, edits, stop_ids_RN, history_RH, length_R
    )
    full = jnp.all(allowed_RW == jnp.uint32(0xFFFFFFFF))
    return jax.lax.cond(full, lambda x, _: x, _mask, logits_RV, allowed_RW)


def all_allowed(*shape: int, vocab_size: int) -> np.ndarray:
    """A mask that forbids nothing, [*shape, W]."""
    return np.full((*shape, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)


def _edit(logits_RV, edits: RowEdits, stop_ids_RN, history_RH, length_R):
    R, V = logits_RV.shape
    at_H, row_R1 = jnp.arange(history_RH.shape[1]), jnp.arange(R)[:, None]
    known_RH = at_H < length_R[:, None]
    of_output_RH = known_RH & (at_H >= edits.prompt[:, None])
    zeros = lambda dtype: jnp.zeros((R, V), dtype)
    seen_RV = zeros(bool).at[row_R1, history_RH].max(known_RH, mode="drop")
    count_RV = zeros(jnp.float32).at[row_R1, history_RH].add(of_output_RH.astype(jnp.float32), mode="drop")
    factor_R1 = edits.repetition[:, None]
    penalized_RV = jnp.where(logits_RV > 0, logits_RV / factor_R1, logits_RV * factor_R1)
    edited_RV = jnp.where(seen_RV, penalized_RV, logits_RV)
    edited_RV -= edits.frequency[:, None] * count_RV + edits.presence[:, None] * (count_RV > 0)
    # An index of -1 would be the last token, so that what fills up the lists goes beyond the vocabulary.
    inside = lambda ids: jnp.where(ids < 0, V, ids)
    edited_RV = edited_RV.at[row_R1, inside(edits.bias_ids)].add(edits.bias, mode="drop")
    early_R1 = (length_R < edits.min_length)[:, None]
    return edited_RV.at[row_R1, jnp.where(early_R1, inside(stop_ids_RN), V)].set(-jnp.inf, mode="drop")


def _mask(logits_RV, allowed_RW):
    token_V = jnp.arange(logits_RV.shape[1])
    bits_RV = allowed_RW[:, token_V // 32] >> (token_V % 32).astype(jnp.uint32)
    return jnp.where(bits_RV & 1 == 1, logits_RV, -jnp.inf)


def forbid(mask_W: np.ndarray, tokens: Sequence[int]) -> None:
    """Clear the bits of these tokens, in place."""
    for token in tokens:
        mask_W[token // 32] &= ~np.uint32(1 << (token % 32))


def ends_of_bad_words(words: Sequence[tuple[int, ...]], output: Sequence[int]) -> list[int]:
    """The tokens that would complete one of these sequences after the output."""
    return [word[-1] for word in words if len(word) == 1 or tuple(output[1 - len(word) :]) == word[:-1]]

"""Plain generation for a few prompts at once: one prefill, then one compiled loop. The engine in serve/ is for many."""

# B prompts, T prompt length, V vocabulary

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from model.cache import init_cache
from model.config import ModelConfig
from model.function import Params, apply
from model.inputs import Inputs


def generate(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
    encoder_prompts: Sequence[Sequence[int]] | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continue each prompt; greedy at temperature 0.

    Args:
      vocab_size: size of the tokenizer's vocabulary. Larger ids, which pad the model's, are never drawn; None: all may.
      encoder_prompts: the encoder tokens of an encoder-decoder, one list for each prompt; a prompt then starts the
        answer (T5: only its padding token).

    Returns:
      the new token ids of each prompt, with the stop token if it was reached.

    Raises:
      ValueError: an empty prompt, an encoder, or an encoder-decoder without `encoder_prompts`.
    """
    if not prompts or any(len(p) == 0 for p in prompts):
        raise ValueError(
            "generate needs at least one prompt and at least one token in each; begin with tokenizer.bos_id."
        )
    if (encoder_prompts is None) != (cfg.encoder is None):
        raise ValueError("give encoder_prompts to a model with an encoder, and to no other.")
    tokens = _in_rows(prompts)
    source = None
    if encoder_prompts is not None:
        if len(encoder_prompts) != len(prompts):
            raise ValueError(
                f"{len(encoder_prompts)} encoder_prompts for {len(prompts)} prompts; give one for each."
            )
        source = _in_rows(encoder_prompts), np.array([len(p) for p in encoder_prompts], np.int32)
    lengths = np.array([len(p) for p in prompts], np.int32)
    stops = np.array(sorted(stop_ids) or [-1], np.int32)
    new = np.asarray(
        _generate(
            cfg,
            vocab_size or cfg.vocab_size,
            params,
            tokens,
            lengths,
            stops,
            max_new_tokens,
            temperature,
            jax.random.key(seed),
            source,
        )
    )
    return [_until_stop(row.tolist(), set(stop_ids)) for row in new]


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def _generate(cfg, vocab_size, params, tokens_BT, lengths_B, stops, max_new_tokens, temperature, key, source):
    B, T = tokens_BT.shape
    real_BT = _real(T, lengths_B)
    cache = init_cache(
        cfg, B, T + max_new_tokens, encoder_length=None if source is None else source[0].shape[1]
    )
    inputs = Inputs(tokens_BT, segment_ids=real_BT)
    if source is not None:
        real_BS = _real(source[0].shape[1], source[1])
        inputs = dataclasses.replace(inputs, encoder_tokens=source[0], encoder_segment_ids=real_BS)
    out = apply(cfg, params, inputs, cache, logits_at=lengths_B[:, None] - 1)

    def choose(logits_BV, i):
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)
        noise_BV = jax.random.gumbel(jax.random.fold_in(key, i), logits_BV.shape)
        return jnp.argmax(logits_BV + temperature * noise_BV, axis=-1).astype(jnp.int32)

    def more(carry):
        i, _, _, _, done_B = carry
        return (i < max_new_tokens) & ~jnp.all(done_B)

    def step(carry):
        i, cache, token_B, new_BN, done_B = carry
        new_BN = new_BN.at[:, i].set(jnp.where(done_B, stops[0], token_B))
        done_B = done_B | jnp.isin(token_B, stops)
        out = apply(cfg, params, token_B[:, None], cache)
        return i + 1, out.cache, choose(out.logits[:, 0], i + 1), new_BN, done_B

    start = (
        0,
        out.cache,
        choose(out.logits[:, 0], 0),
        jnp.full((B, max_new_tokens), stops[0]),
        jnp.zeros((B,), bool),
    )
    return jax.lax.while_loop(more, step, start)[3]


def _in_rows(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Prompts padded on the right to a power of two, to compile few shapes."""
    longest = max(1, *(len(p) for p in prompts))
    tokens = np.zeros((len(prompts), 1 << (longest - 1).bit_length()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens


def _real(length: int, lengths_B: jax.Array) -> jax.Array:
    return (jnp.arange(length) < lengths_B[:, None]).astype(jnp.int32)


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in stops:
            return ids[: i + 1]
    return ids

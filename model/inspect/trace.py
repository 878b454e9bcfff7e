"""Traces a forward pass: the residual stream after each block, attention weights, the experts' loads.

The modules of the pure function sow these as intermediates. The logit lens applies the final norm and the head to the
residual stream at any depth: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

# B batch, T tokens, D model width, V vocabulary, H heads, E experts, L blocks, K likeliest tokens

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.function import Params, Transformer, final_norm_of, model_context
from model.inputs import Inputs
from model.inputs.tokens import embedding_table
from model.readouts.vocabulary import vocabulary_head


@dataclasses.dataclass(frozen=True)
class Trace:
    tokens: jax.Array  # [B, T]
    # L + 1 of [B, T, D]: the embedded tokens, then the residual stream after each block
    hidden: tuple[jax.Array, ...]
    attention: dict[int, jax.Array]  # block with attention -> [B, H, T, T] float32, a row for each query
    expert_load: dict[int, jax.Array]  # block with an MoE -> [E] float32, how often each expert was chosen


def trace(cfg: ModelConfig, params: Params, tokens: jax.Array, segment_ids: jax.Array | None = None) -> Trace:
    """Run the model on `tokens` [B, T] and return its trace; `segment_ids` as for `apply`."""
    if cfg.encoder is not None:
        raise ValueError("a trace needs a model with one stack; this one has an encoder beside its decoder.")
    if cfg.byte_latent is not None:
        raise ValueError(
            "a trace needs a model with one stack; a byte-latent model has one for bytes and one for patches."
        )
    tokens = jnp.asarray(tokens)
    found = _intermediates(cfg, params, tokens, segment_ids)
    hidden, attention, expert_load = list(found["embedded"]), {}, {}
    for name, _, numbers in cfg.runs():
        for i, number in enumerate(numbers):
            block = jax.tree.map(lambda x, i=i: x[i], found[name]) if cfg.scan else found[name]
            hidden += block["residual"]
            if maps := _attention_maps(block.get("mixer", {})):
                attention[number] = jnp.concatenate(maps, axis=1)
            if "expert_load" in block.get("ffn", {}):
                (expert_load[number],) = block["ffn"]["expert_load"]
    return Trace(tokens, tuple(hidden), attention, expert_load)


@functools.partial(jax.jit, static_argnums=0)
def logit_lens(cfg: ModelConfig, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """[B, T, V] float32: the final norm and the head, applied to a residual stream."""
    return _read_out(cfg, params, hidden_BTD)


@functools.partial(jax.jit, static_argnums=(0, 3))
def likeliest(
    cfg: ModelConfig, params: Params, hidden: tuple[jax.Array, ...], count: int = 5
) -> tuple[jax.Array, jax.Array]:
    """(ids, probabilities), each [L + 1, B, T, K]: the lens' next tokens at each depth, best first."""

    def read(hidden_BTD):  # one depth at a time, because V is large
        probabilities_BTV = jax.nn.softmax(_read_out(cfg, params, hidden_BTD), axis=-1)
        top_BTK, ids_BTK = jax.lax.top_k(probabilities_BTV, count)
        return ids_BTK, top_BTK

    return jax.lax.map(read, jnp.stack(hidden))


@functools.partial(jax.jit, static_argnums=0)
def _intermediates(cfg: ModelConfig, params: Params, tokens, segment_ids) -> dict[str, Any]:
    inputs = Inputs(tokens, segment_ids=segment_ids)
    _, found = Transformer(cfg).apply({"params": params}, inputs, mutable=["intermediates"])
    return cast(dict, found["intermediates"])


def _attention_maps(mixer: dict[str, Any]) -> list[jax.Array]:
    """The attention maps of a mixer and of its parallel mixers, but not those over chosen tokens."""
    inside = [
        leaf for name, part in mixer.items() if name.startswith("mixer_") for leaf in _attention_maps(part)
    ]
    return [*mixer.get("attention", ()), *inside]


def _read_out(cfg: ModelConfig, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    return cast(jax.Array, _Readout(cfg).apply({"params": params}, hidden_BTD))


class _Readout(nn.Module):
    """The final norm and head of the model, with the same parameters."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cfg, ctx = self.cfg, model_context(self.cfg)
        embedding_VD = embedding_table(self, cfg, ctx) if cfg.tied_head else None
        return vocabulary_head(self, cfg, ctx, embedding_VD).logits(final_norm_of(cfg, ctx)(x_BTD))

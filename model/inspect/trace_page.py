"""One self-contained HTML page of a trace: the logit lens, attention maps, the experts' loads."""

# T tokens, L blocks, H heads, K likeliest tokens

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.function import Params
from model.inspect.trace import Trace, likeliest, trace

MAX_TOKENS = 256  # browsers are slow with the maps of a longer text


def trace_page(
    cfg: ModelConfig, params: Params, tokens: list[int], text: str, name_of: Callable[[int], str], title: str
) -> str:
    """The page of one text.

    Args:
      tokens: ids, 1 to 256.
      text: the same as text.
      name_of: maps a token id to the shown text.
      title: the name of the model.

    Raises:
      ValueError: no tokens, or too many.
    """
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise ValueError(f"the text has {len(tokens)} tokens; a page shows 1 to {MAX_TOKENS}.")
    found = trace(cfg, params, jnp.array([tokens], jnp.int32))
    ids, probabilities = likeliest(cfg, params, found.hidden)
    data = {"text": text, **_page_data(cfg, found, ids, probabilities, name_of)}
    # "</" inside a string would end the script
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    page = Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    return page.replace("__TITLE__", html.escape(title)).replace("__DATA__", written)


def _page_data(
    cfg: ModelConfig, found: Trace, ids: jax.Array, probabilities: jax.Array, name_of: Callable[[int], str]
) -> dict[str, Any]:
    ids_LTK, probabilities_LTK = np.asarray(ids)[:, 0], np.asarray(probabilities)[:, 0]
    tokens = np.asarray(found.tokens)[0].tolist()
    return {
        "names": {i: name_of(i) for i in sorted({*tokens, *ids_LTK.ravel().tolist()})},
        "tokens": tokens,
        "ids": ids_LTK.tolist(),
        "probabilities": probabilities_LTK.round(4).tolist(),
        "mixers": [type(block.mixer).__name__ for block in cfg.blocks],
        "attention": {number: _bytes(weights) for number, weights in found.attention.items()},
        "heads": {number: weights.shape[1] for number, weights in found.attention.items()},
        "experts": {number: np.asarray(load).tolist() for number, load in found.expert_load.items()},
    }


def _bytes(weights: jax.Array) -> str:
    """[1, H, T, T] as base64, a byte a weight."""
    return base64.b64encode(np.asarray(weights[0] * 255).round().astype(np.uint8).tobytes()).decode()
